"""Change what heads say, or what a layer adds, while a model runs; and see whether the answer is still the same.

Edits act on head outputs (`hook_z` in TransformerLens' words) or on what attention adds to the residual stream, as
context managers, at the tokens `at` of whatever runs inside. Behind a prompt cache, `LAST` is the last prompt token.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import Module
from transformers import PreTrainedModel

from bkd_utils.models.prompt_cache import Anatomy, Past, anatomy, editing, forward, reading, remember

Head = tuple[int, int]
LAST = slice(0, 1)
EVERYWHERE = slice(None)


@contextmanager
def head_edit(
    model: PreTrainedModel, heads: Sequence[Head], change: Callable[[int, Tensor], Tensor], *, at: slice
) -> Iterator[None]:
    """While this lasts, `change(layer, z)` replaces the outputs `z` `[row, pos, chosen head, d_head]` at tokens `at`.

    The chosen heads of a layer come in ascending order. Raises ValueError for a head that the model does not have, or
    that is named twice.
    """
    parts = anatomy(model)
    chosen = by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)

    def edit(i: int, z: Tensor) -> Tensor:
        layer = layers[i]
        z = z.clone()
        view = z.view(*z.shape[:-1], parts.n_heads, -1)
        view[:, at, chosen[layer]] = change(layer, view[:, at, chosen[layer]]).to(z.dtype)
        return z

    layers = list(chosen)
    with editing([parts.outputs[layer] for layer in layers], edit):
        yield


def by_layer(heads: Sequence[Head], *, n_layers: int, n_heads: int) -> dict[int, list[int]]:
    """layer -> its chosen heads in ascending order. Raises ValueError for unknown and for repeated heads."""
    if twice := [head for head, count in Counter(heads).items() if count > 1]:
        raise ValueError(f"head {twice[0]} is named twice")
    found: dict[int, list[int]] = defaultdict(list)
    for layer, head in sorted(heads):
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"no head {head} in layer {layer}: the model has {n_layers} layers of {n_heads} heads")
        found[layer].append(head)
    return dict(found)


@contextmanager
def added(model: PreTrainedModel, vectors: Mapping[int, Float[Tensor, "... d_model"]], *, at: slice) -> Iterator[None]:
    """While this lasts, attention of layer l adds `vectors[l]` more to the residual stream at the tokens `at`."""
    parts, layers = anatomy(model), list(vectors)

    def add(i: int, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, at] += vectors[layers[i]].to(output).unsqueeze(-2)
        return output

    with editing([parts.outputs[layer] for layer in layers], add, what="output"):
        yield


# --- what heads say at the last prompt token ------------------------------------------------------------------------


def batches(prompts: Sequence[Sequence[int]], size: int) -> Iterator[list[int]]:
    """Indices of prompts, those of like length together, so that little is padded."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return (order[start : start + size] for start in range(0, len(order), size))


@torch.no_grad()
def _at_last_token(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    modules: Sequence[Module],
    what: str,
    batch_size: int,
) -> Float[Tensor, "prompt layer width"]:
    found: list[Tensor | None] = [None] * len(prompts)
    for chosen in batches(prompts, batch_size):
        past = remember(model, [prompts[i] for i in chosen])
        kept: dict[int, Tensor] = {}
        with reading(modules, kept, what=what):
            forward(model, past, past.tail)
        rows = torch.stack([kept[layer][:, 0] for layer in range(len(modules))], dim=1)
        for i, row in zip(chosen, rows, strict=True):
            found[i] = row
    return torch.stack(found)


def head_outputs(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, batch_size: int = 32
) -> Float[Tensor, "prompt layer head d_head"]:
    """`hook_z` of every head at the last prompt token."""
    parts = anatomy(model)
    rows = _at_last_token(model, prompts, parts.outputs, "input", batch_size)
    return rows.unflatten(-1, (parts.n_heads, -1))


def residuals(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, batch_size: int = 32
) -> Float[Tensor, "prompt layer d_model"]:
    """The residual stream behind every layer at the last prompt token."""
    return _at_last_token(model, prompts, anatomy(model).layers, "output", batch_size)


@torch.no_grad()
def behind_norm(
    model: PreTrainedModel, residual: Float[Tensor, "prompt layer d_model"]
) -> Float[Tensor, "prompt layer_but_last d_model"]:
    """What attention of the next layer reads of `residuals`: layer l's stream through the norm of layer l + 1."""
    norms = anatomy(model).norms[1:]
    return torch.stack([norm(residual[:, layer]) for layer, norm in enumerate(norms)], dim=1)


def contributions(
    parts: Anatomy, layer: int, heads: Sequence[int], z: Float[Tensor, "... head d_head"]
) -> Float[Tensor, "... head d_model"]:
    """What each of some heads of a layer adds to the residual stream: its slice of the output matrix, no bias."""
    full = z.new_zeros(*z.shape[:-1], parts.n_heads, z.shape[-1])
    for row, head in enumerate(heads):
        full[..., row, head, :] = z[..., row, :]
    module = parts.outputs[layer]
    return module(full.flatten(-2)) - module(torch.zeros_like(full[..., :1, :, :].flatten(-2)))


# --- ablation -------------------------------------------------------------------------------------------------------

KINDS = ("published", "zero", "mean", "resample")


@contextmanager
def ablated(
    model: PreTrainedModel,
    heads: Sequence[Head],
    *,
    kind: str,
    at: slice,
    own: Float[Tensor, "prompt layer head d_head"] | None = None,
    clean: Float[Tensor, "reference layer head d_head"] | None = None,
) -> Iterator[None]:
    """Take heads out while this lasts.

    `published` subtracts each head's output from an un-ablated pass (`own`, one per row), as the official BkdAttr code
    does, which is zero only for heads that no other ablated head feeds; `zero` sets the output to 0; `mean` to the
    mean over clean prompts (`clean`); `resample` to that of a clean prompt, row i taking reference i. Raises
    ValueError for an unknown kind or when what it needs is missing.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown ablation {kind!r}; known: {', '.join(KINDS)}")
    needed = {"published": ("own", own), "mean": ("clean", clean), "resample": ("clean", clean)}.get(kind)
    if needed and needed[1] is None:
        raise ValueError(f"ablation {kind!r} needs {needed[0]}")
    parts = anatomy(model)
    chosen = by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)

    def change(layer: int, z: Tensor) -> Tensor:
        index = chosen[layer]
        if kind == "published":
            return z - own[: len(z), layer, index].to(z)[:, None]
        if kind == "zero":
            return torch.zeros_like(z)
        if kind == "mean":
            return clean[:, layer, index].mean(0).to(z).expand_as(z)
        return clean[torch.arange(len(z)) % len(clean)][:, layer, index].to(z)[:, None].expand_as(z)

    with head_edit(model, heads, change, at=at):
        yield


# --- what the model says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """How a model's greedy answers compare with given answers, one entry per prompt.

    `whole`: greedy decoding would give the whole answer; `share`: share of its tokens that are the most likely ones
    behind those before them; `log_prob`: mean log-probability of its tokens, in nats.
    """

    whole: Bool[Tensor, " prompt"]
    share: Float[Tensor, " prompt"]
    log_prob: Float[Tensor, " prompt"]


@torch.no_grad()
def says(
    model: PreTrainedModel,
    past: Past,
    answers: Sequence[Sequence[int]],
    *,
    layer: int = 0,
    hidden: Float[Tensor, "row new d_model"] | None = None,
) -> Said:
    """Would greedy decoding give these answers? One pass for a whole answer instead of one per token, and exact.

    Teacher forcing decides it: greedy decoding follows an answer to its end if and only if each of its tokens is the
    most likely one behind those before it. Answers may differ in length; there may be several in a row per prompt.
    `layer` and `hidden` are those of `prompt_cache.forward`. Raises ValueError for an empty answer or a wrong number
    of them.
    """
    if not answers or len(answers) % len(past) or not all(map(len, answers)):
        raise ValueError(f"{len(past)} prompts need as many non-empty answers, or a multiple; got {len(answers)}")
    longest = max(map(len, answers))
    target = torch.tensor([[*a, *[0] * (longest - len(a))] for a in answers], device=past.tail.device)
    real = torch.tensor([[1] * len(a) + [0] * (longest - len(a)) for a in answers], device=past.tail.device).bool()
    rows = torch.cat([past.tail.repeat_interleave(len(answers) // len(past), dim=0), target[:, :-1]], dim=1)
    logits = forward(model, past, rows, layer=layer, hidden=hidden, skip=past.tail.shape[1] - 1)
    same = logits.argmax(-1) == target
    return Said(
        whole=(same | ~real).all(-1),
        share=(same & real).sum(-1) / real.sum(-1),
        log_prob=(token_log_prob(logits, target) * real).sum(-1) / real.sum(-1),
    )


def token_log_prob(logits: Float[Tensor, "row new vocab"], target: Int[Tensor, "row new"]) -> Float[Tensor, "row new"]:
    """Log-probability (nats) of each target token."""
    return logits.gather(-1, target[..., None])[..., 0] - logits.logsumexp(-1)
