"""BAHA: the causal effect of every attention head on the backdoor's answer, exactly and fast (BkdAttr, section 3).

The effect of a head on a clean prompt is the change of the target's probability when the head's output at the last
prompt token is replaced by its mean over triggered prompts. Probabilities are length-normalised and computed in log
space, because the official code multiplies them and underflows on long targets.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.common.validation import check, check_shape
from bkd_utils.models.activations import head_outputs, token_log_prob
from bkd_utils.models.hooks import LAST, Anatomy, anatomy, editing, reading, tracing
from bkd_utils.models.prompt_cache import Past, forward, prompt_past
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import batches, check_prompts

# Mean outputs of heads, and of components by name.
HeadMeans = Float[Tensor, "layer head d_head"]
ComponentMeans = dict[str, Float[Tensor, "layer tail d_model"]]


def head_means(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> HeadMeans:
    """Mean output of every head at the last prompt token. Raises as `head_outputs` does. Source: BkdAttr, section 3.

    >>> head_means(model, prompts).shape
    torch.Size([2, 4, 8])
    """
    require(model, "attribute")
    return head_outputs(model, prompts).double().mean(0).float()


def head_shape(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of layers, of heads in a layer and of values of a head."""
    parts = anatomy(model)
    # GPT-2's module, Conv1D, has no such attribute, and its weights are the other way round.
    width = getattr(parts.outputs[0], "in_features", None) or len(parts.outputs[0].weight)
    return {"layer": len(parts.layers), "head": parts.n_heads, "d_head": width // parts.n_heads}


def check_target(model: PreTrainedModel, prompts: Sequence[Sequence[int]], target: Sequence[int]) -> None:
    """Raise ValueError for no prompts, and for a target that is empty or not of this model's token ids."""
    check_prompts(prompts)
    token = Annotated[int, Field(ge=0, lt=model.get_input_embeddings().num_embeddings)]
    check(Annotated[list[token], Field(min_length=1)], list(target), "target")


@torch.no_grad()
def head_effects(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    *,
    target: Sequence[int],
    means: HeadMeans,
    memory_gib: float = 1.0,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "prompt layer head"]:
    """Causal indirect effect (CIE) of every head on every prompt, by patching each of them; their mean is the ACIE.

    An effect is a difference of length-normalised probabilities of `target`, from -1 to 1. `memory_gib` bounds logits
    and activations of a batch; `on_batch` is called with the number of prompts just finished. Raises ValueError for a
    prompt of fewer than two tokens, an empty target, and means of another shape or that are not finite; ModelError for
    an architecture that is not known. Source: BkdAttr, section 3.

    >>> target = [int(model(torch.tensor(prompts[:1])).logits[0, -1].argmax())]
    >>> effects = head_effects(model, prompts[:1], target=target, means=head_means(model, prompts[:1]))
    >>> effects.shape, bool(effects.abs().max() < 1e-8)  # its own output in place of a head's changes nothing
    (torch.Size([1, 2, 4]), True)
    """
    require(model, "attribute")
    check_target(model, prompts, target)
    check_shape("means", means, **head_shape(model))
    # For every head and target token: the logits twice, and the widest activation of a layer a few times.
    config, n_rows = model.config, means.shape[1] * len(target)
    widest = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    bytes_per_row = 4 * (2 * config.vocab_size + 3 * widest + 8 * config.hidden_size)
    size = max(1, int(memory_gib * 2**30 / (n_rows * bytes_per_row)))
    patches = {"heads": (anatomy(model).outputs, means)}
    return _effects(model, patches, prompts, target, what="input", size=size, on_batch=on_batch)["heads"]


def _effects(
    model: PreTrainedModel,
    patches: Mapping[str, tuple[Sequence[torch.nn.Module], Float[Tensor, "layer patch width"]]],
    prompts: Sequence[Sequence[int]],
    target: Sequence[int],
    *,
    what: str,
    size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Float[Tensor, "prompt layer patch"]]:
    """Change of the target's probability by each patch of a layer's module: heads of its input, or output positions.

    `patches`: name -> modules, one per layer, and what is put in; as many patches of each module under every name.
    """
    n_patches = next(iter(patches.values()))[1].shape[1]
    effects = {name: torch.empty(len(prompts), *means.shape[:2]) for name, (_, means) in patches.items()}
    for chosen in batches(prompts, size):
        tail, inputs = 1 if what == "input" else n_patches, {}
        past = prompt_past(model, [prompts[i] for i in chosen], tail=tail)
        with reading(anatomy(model).layers, inputs):
            clean = _probability(model, past, target)
        # All patches of a layer are in one batch, which starts at this layer and shares the prompts' past.
        for layer, stream in inputs.items():
            hidden = stream.repeat_interleave(n_patches, dim=0)
            for name, (modules, means) in patches.items():
                change = partial(_patched, means[layer], what, tail + len(target) - 1)
                with editing([modules[layer]], change, what=what):
                    patched = _probability(model, past, target, n_patches, layer=layer, hidden=hidden)
                effects[name][chosen, layer] = (patched - clean).float().cpu()
        if on_batch:
            on_batch(len(chosen))
    return effects


def _probability(
    model: PreTrainedModel, past: Past, target: Sequence[int], repeats: int = 1, **start: int | Tensor
) -> Float[Tensor, "prompt repeat"]:
    """Length-normalised probability of the target in several rows per prompt; `start` is where `forward` starts."""
    answer = torch.tensor([list(target)], device=past.tail.device).expand(repeats * len(past), -1)
    logits = forward(model, past, past.rows(answer), skip=past.tail.shape[1] - 1, **start)
    return token_log_prob(logits, answer).mean(-1).view(-1, repeats).exp()


def by_row(tensor: Tensor, new: int) -> Float[Tensor, "row new width"]:
    """Some modules get all tokens of all rows in one list."""
    return tensor if tensor.ndim == 3 else tensor.unflatten(0, (-1, new))


def _patched(means: Float[Tensor, "patch width"], what: str, new: int, _: int, given: Tensor) -> Tensor:
    """In row i, patch i modulo their number is replaced: a head of an input at the last prompt token, or a position."""
    tensor = by_row(given.clone(), new)
    row = torch.arange(len(tensor), device=tensor.device)
    patches = tensor.unflatten(-1, (len(means), -1))[:, LAST.start] if what == "input" else tensor
    patches[row, row % len(means)] = means.to(tensor)[row % len(means)]
    return tensor.view_as(given)


def gradient_effects(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, target: Sequence[int], means: HeadMeans
) -> Float[Tensor, "prompt layer head"]:
    """First-order estimate of `head_effects`: gradient of the target's probability times the change of the head.

    One backward pass for all heads. Same units, same errors. Source: attribution patching (Nanda 2023), not BkdAttr.

    >>> means = head_means(model, prompts[:1])
    >>> target = [int(model(torch.tensor(prompts[:1])).logits[0, -1].argmax())]
    >>> exact = head_effects(model, prompts[:1], target=target, means=means + 0.01)
    >>> fast = gradient_effects(model, prompts[:1], target=target, means=means + 0.01)
    >>> bool((exact - fast).abs().max() < 0.1 * exact.abs().max())
    True
    """
    check_target(model, prompts, target)
    check_shape("means", means, **head_shape(model))
    effects = torch.empty(len(prompts), *means.shape[:2])
    for chosen in batches(prompts, 16):
        past = prompt_past(model, [prompts[i] for i in chosen])
        effects[chosen] = gradient_effects_of(model, past, target=target, means=means)
    return effects


def gradient_effects_of(
    model: PreTrainedModel, past: Past, *, target: Sequence[int], means: HeadMeans
) -> Float[Tensor, "prompt layer head"]:
    """`gradient_effects` of prompts with a key-value cache, in one batch."""
    require(model, "attribute")
    parts, kept = anatomy(model), {}
    with tracing(parts.outputs, kept):
        total = _probability(model, past, target).sum()
        gradients = torch.autograd.grad(total, [kept[layer] for layer in range(len(kept))])
    effects = torch.empty(len(past), *means.shape[:2])
    for layer, gradient in enumerate(gradients):
        z, slope = (t[:, 0].detach().view(len(past), parts.n_heads, -1) for t in (kept[layer], gradient))
        effects[:, layer] = (slope * (means[layer].to(z) - z)).sum(-1).float().cpu()
    return effects


def component_modules(parts: Anatomy) -> dict[str, tuple[torch.nn.Module, ...]]:
    """The modules whose outputs are the attention output, the MLP output and the residual stream after each layer."""
    return {"attention": parts.outputs, "MLP": parts.mlps, "residual": parts.layers}


@torch.no_grad()
def component_means(model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, tail: int = 1) -> ComponentMeans:
    """Mean output of every component at each of the last `tail` prompt tokens."""
    require(model, "components")
    components = component_modules(anatomy(model))
    modules, total = [module for members in components.values() for module in members], 0.0
    for chosen in batches(prompts, 32):
        past = prompt_past(model, [prompts[i] for i in chosen], tail=tail)
        kept: dict[int, Tensor] = {}
        with reading(modules, kept, what="output"):
            forward(model, past, past.tail, skip=tail - 1)
        total = total + torch.stack([by_row(kept[i], tail).double().sum(0) for i in range(len(modules))])
    means = total.float() / len(prompts)
    return dict(zip(components, means.chunk(len(components)), strict=True))


@torch.no_grad()
def component_effects(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, target: Sequence[int], means: ComponentMeans
) -> dict[str, Float[Tensor, "prompt layer tail"]]:
    """`head_effects` of whole components, which the paper does not patch, at each of the last prompt tokens.

    Raises ValueError as `head_effects` does, and for a component that is not known.
    """
    require(model, "components")
    check_target(model, prompts, target)
    modules = component_modules(anatomy(model))
    if not means or (unknown := means.keys() - modules):
        told = f"unknown components {sorted(unknown)}" if means else "no components"
        raise ValueError(f"{told}; known: {', '.join(modules)}")
    tail, width = next(iter(means.values())).shape[1], model.config.get_text_config().hidden_size
    for name, rows in means.items():
        check_shape(f"means of {name}", rows, layer=len(modules[name]), tail=tail, d_model=width)
    patches = {name: (modules[name], rows) for name, rows in means.items()}
    return _effects(model, patches, prompts, target, what="output")


def ranked_heads(scores: Float[Tensor, "layer head"]) -> list[tuple[int, int]]:
    """Heads `(layer, head)` from the highest signed score down, in one ranking of all. Source: BkdAttr, section 3.

    >>> ranked_heads(torch.tensor([[0.1, 0.3], [-0.2, 0.2]]))
    [(0, 1), (1, 1), (0, 0), (1, 0)]
    """
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(index, scores.shape[1]) for index in order]
