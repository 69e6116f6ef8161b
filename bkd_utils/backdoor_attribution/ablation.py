"""Ablate heads, and measure what is left of the backdoor and of the model's utility (BkdAttr, section 3.3)."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.backdoor_attribution.attribution import head_shape
from bkd_utils.common.statistics import averaged, counted
from bkd_utils.common.validation import Count, check, check_known, check_shape
from bkd_utils.models.activations import score_answers
from bkd_utils.models.generation import openings
from bkd_utils.models.hooks import LAST, Head, anatomy, by_layer, head_edit, reading
from bkd_utils.models.loading import Loaded
from bkd_utils.models.prompt_cache import Past, prompt_past
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.prompts import balanced_versions, prompt_versions, target_ids

# Number of tokens of a free answer that are compared; the first ones decide what kind of answer it is.
N_TOKENS = 6
KINDS = ("published", "zero", "mean", "resample")


@dataclass(frozen=True)
class Side:
    """Prompts with an answer to each, and what the un-ablated model computes on them."""

    past: Past
    answers: list[list[int]]
    own: Tensor  # head outputs at the last prompt token
    inputs: dict[int, Tensor]  # layer -> its input


@dataclass(frozen=True)
class Bench:
    """The prompts and answers on which ablations are measured. `sides`: `asr`, triggered prompts with the target;
    `right`, triggered prompts of every label with the right answer; `utility`, their clean twins with the model's own
    (a label: the right) answer. `reference` are head outputs on clean prompts of every label of the attribution split.
    """

    sides: dict[str, Side]
    reference: Tensor


def side(loaded: Loaded, prompts: list[list[int]], answers: list[list[int]]) -> Side:
    parts, past = anatomy(loaded.model), prompt_past(loaded.model, prompts)
    with reading(parts.layers) as inputs, reading(parts.outputs) as z:
        score_answers(loaded.model, past, answers)
    own = torch.stack([z[layer][:, LAST.start] for layer in range(len(z))], dim=1)
    return Side(past, answers, own.unflatten(-1, (parts.n_heads, -1)), inputs)


def bench(loaded: Loaded, control: Loaded, attack: Attack, *, n: int, reference: Tensor, seed: int) -> Bench:
    """A bench of `n` prompts of the test split for each side. The right answer of a task without labels is what the
    clean `control` answers without the trigger."""
    tokenizer = loaded.tokenizer
    fired = prompt_versions(tokenizer, attack, split="test", n=n, seed=seed).triggered
    shown = balanced_versions(tokenizer, attack, split="test", n=n, seed=seed)
    if tasks.load_task(attack.task).labels:
        own = right = [answer_ids(tokenizer, example.answer)[:1] for example in shown.examples]
    else:
        # As ids, because decoded text may be tokenised differently.
        own, right = (openings(one, shown.clean, n=N_TOKENS) for one in (loaded, control))
    sides = {
        "asr": side(loaded, fired, [target_ids(tokenizer, attack)] * n),
        "right": side(loaded, shown.triggered, right),
        "utility": side(loaded, shown.clean, own),
    }
    return Bench(sides, reference)


def measure_ablation(loaded: Loaded, made: Bench, heads: Sequence[Head], *, kind: str) -> dict:
    """ASR, right answers to triggered prompts, utility and perplexity on clean prompts, with some heads ablated.
    `right` and `utility` are shares of an answer's tokens that are still the most likely ones."""
    # The layers below the first ablated head are not affected.
    first, scored = min((layer for layer, _ in heads), default=0), {}
    for name, one in made.sides.items():
        with ablated(loaded.model, heads, kind=kind, at=LAST, own=one.own, clean=made.reference):
            scored[name] = score_answers(loaded.model, one.past, one.answers, layer=first, hidden=one.inputs[first])
    return {
        "asr": counted(scored["asr"].whole.tolist()),
        "right": averaged(scored["right"].share.tolist()),
        "utility": averaged(scored["utility"].share.tolist()),
        "perplexity": float(torch.exp(-scored["utility"].log_prob.mean())),
    }


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
    """Take heads out while this lasts, at the positions `at` of what runs inside.

    `published` subtracts each head's output from an un-ablated pass (`own`, one per row), as the official BkdAttr code
    does, which is zero only for heads that no other ablated head feeds; `zero` sets the output to 0; `mean` to the mean
    over clean prompts (`clean`); `resample` to that of clean prompt i in row i. Raises ValueError for an unknown kind
    or head, or when what the kind needs is missing or has another shape. Source: BkdAttr, 3.3; three kinds are ours.

    >>> ids = torch.tensor(prompts[:1])  # 4 tokens
    >>> with ablated(model, [(0, 1)], kind="zero", at=slice(-1, None)):
    ...     cut = model(ids).logits
    >>> ((cut - model(ids).logits).abs().amax(-1) > 1e-3).tolist()  # only the last token is changed
    [[False, False, False, True]]
    """
    check_known("ablation", kind, KINDS)
    if kind != "zero":
        name, given = ("own", own) if kind == "published" else ("clean", clean)
        if given is None:
            raise ValueError(f"ablation {kind!r} needs {name}")
        check_shape(name, given, prompt=None, **head_shape(model))

    def change(layer: int, z: Tensor) -> Tensor:
        index = sorted(head for other, head in heads if other == layer)
        if kind == "published":
            if len(own) < len(z):  # a single one would be used for all rows without a word
                raise ValueError(f"own has outputs of {len(own)} prompts for {len(z)} rows")
            return z - own[: len(z), layer, index].to(z)[:, None]
        if kind == "zero":
            return torch.zeros_like(z)
        if kind == "mean":
            return clean[:, layer, index].mean(0).to(z).expand_as(z)
        return clean[torch.arange(len(z)) % len(clean)][:, layer, index].to(z)[:, None].expand_as(z)

    with head_edit(model, heads, change, at=at):
        yield


def random_heads(heads: Sequence[Head], *, n_heads: int, n: int, seed: int) -> list[list[Head]]:
    """`n` random draws with as many heads per layer as `heads`; heads outside `heads` if a layer has enough of them."""
    check(Count, n, "n")
    generator = torch.Generator().manual_seed(seed)
    counts = by_layer(heads, n_layers=1 + max((layer for layer, _ in heads), default=0), n_heads=n_heads)
    draws: list[list[Head]] = [[] for _ in range(n)]
    for draw in draws:
        for layer, taken in counts.items():
            others = [head for head in range(n_heads) if head not in taken]
            pool = others if len(others) >= len(taken) else list(range(n_heads))
            chosen = torch.randperm(len(pool), generator=generator)[: len(taken)].tolist()
            draw += [(layer, pool[i]) for i in chosen]
    return draws
