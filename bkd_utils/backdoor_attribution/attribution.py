"""BAHA: the causal effect of every attention head on the backdoor's answer, exactly and fast (BkdAttr, section 3).

The effect of a head on a clean prompt is the change of the target's probability when the head's output at the last
prompt token is replaced by its mean over triggered prompts. Probabilities are length-normalised and computed in log
space, because the official code multiplies them and underflows on long targets.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.models.activations import head_outputs, token_log_prob
from bkd_utils.models.hooks import LAST, Anatomy, anatomy, editing, reading, tracing
from bkd_utils.models.prompt_cache import Past, forward, prompt_past
from bkd_utils.models.tokens import batches

# Mean outputs of heads, and of components by name.
HeadMeans = Float[Tensor, "layer head d_head"]
ComponentMeans = dict[str, Float[Tensor, "layer tail d_model"]]


def head_means(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> HeadMeans:
    """Mean output of every head at the last prompt token, in the model's own units.

    Raises as `models.head_outputs` does. Source: BkdAttr, section 3, the mean over triggered prompts.

    >>> means = head_means(model, prompts)
    >>> means.shape, torch.allclose(means, head_means(model, prompts * 2), atol=1e-5)
    (torch.Size([2, 4, 8]), True)
    """
    return head_outputs(model, prompts).double().mean(0).float()


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

    An effect is a difference of probabilities of `target`, length-normalised, from -1 to 1. `memory_gib` bounds the
    logits and activations of one batch; `on_batch` is called with the number of prompts just finished. Raises
    ValueError for a prompt of fewer than two tokens, ModelError for an architecture that is not known. Source: BkdAttr,
    section 3.

    >>> target = [int(model(torch.tensor(prompts[:1])).logits[0, -1].argmax())]
    >>> effects = head_effects(model, prompts[:1], target=target, means=head_means(model, prompts[:1]))
    >>> effects.shape, bool(effects.abs().max() < 1e-8)  # its own output in place of a head's changes nothing
    (torch.Size([1, 2, 4]), True)
    >>> bool(head_effects(model, prompts[:1], target=target, means=torch.ones(2, 4, 8)).abs().max() > 1e-4)
    True
    """
    parts, n_heads = anatomy(model), means.shape[1]
    effects, config = torch.empty(len(prompts), *means.shape[:2]), model.config
    # For every head and target token: the logits twice, and the widest activation of a layer a few times.
    widest = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    bytes_each = 4 * (2 * config.vocab_size + 3 * widest + 8 * config.hidden_size)
    size = max(1, int(memory_gib * 2**30 / (n_heads * len(target) * bytes_each)))
    for chosen in batches(prompts, size):
        run = _Run(model, parts, prompt_past(model, [prompts[i] for i in chosen]), target)
        # All heads of a layer are patched in one batch that starts at this layer and shares the prompts' past.
        for layer, output in enumerate(parts.outputs):
            with editing([output], _one_per_row(means[layer], of_heads=True)):
                effects[chosen, layer] = run.effects(layer, n_heads)
        if on_batch:
            on_batch(len(chosen))
    return effects


class _Run:
    """An unpatched pass over prompts with a target as answer; patched passes start at a layer's input of this one."""

    def __init__(self, model: PreTrainedModel, parts: Anatomy, past: Past, target: Sequence[int]) -> None:
        self.model, self.past, self.inputs = model, past, {}
        self.answer = torch.tensor(list(target), device=past.tail.device).expand(len(past), -1)
        self.skip = past.tail.shape[1] - 1
        with reading(parts.layers, self.inputs):
            logits = forward(model, past, past.rows(self.answer), skip=self.skip)
        self.clean = token_log_prob(logits, self.answer).mean(-1).exp()

    def effects(self, layer: int, n_patches: int) -> Float[Tensor, "prompt patch"]:
        """Change of the target's probability in a pass from a layer on, with `n_patches` rows per prompt."""
        rows, hidden, answer = (
            tensor.repeat_interleave(n_patches, dim=0)
            for tensor in (self.past.rows(self.answer), self.inputs[layer], self.answer)
        )
        logits = forward(self.model, self.past, rows, layer=layer, hidden=hidden, skip=self.skip)
        patched = token_log_prob(logits, answer).mean(-1).view(-1, n_patches).exp()
        return (patched - self.clean[:, None]).float().cpu()


def _one_per_row(means: Float[Tensor, "patch width"], *, of_heads: bool) -> Callable[[int, Tensor], Tensor]:
    """An edit that, in row i, replaces patch i modulo their number: a head at the last prompt token, or a position."""

    def edit(_: int, output: Tensor) -> Tensor:
        output = output.clone()
        row = torch.arange(len(output), device=output.device)
        patches = output.unflatten(-1, (len(means), -1))[:, LAST.start] if of_heads else output
        patches[row, row % len(means)] = means.to(output)[row % len(means)]
        return output

    return edit


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
    effects = torch.empty(len(prompts), *means.shape[:2])
    for chosen in batches(prompts, 16):
        past = prompt_past(model, [prompts[i] for i in chosen])
        effects[chosen] = gradient_effects_of(model, past, target=target, means=means)
    return effects


def gradient_effects_of(
    model: PreTrainedModel, past: Past, *, target: Sequence[int], means: HeadMeans
) -> Float[Tensor, "prompt layer head"]:
    """`gradient_effects` of prompts with a key-value cache, in one batch."""
    parts, kept = anatomy(model), {}
    answer = torch.tensor(list(target), device=past.tail.device).expand(len(past), -1)
    with tracing(parts.outputs, kept):
        log_prob = token_log_prob(forward(model, past, past.rows(answer)), answer).mean(-1)
        gradients = torch.autograd.grad(log_prob.exp().sum(), [kept[layer] for layer in range(len(kept))])
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
    components = component_modules(anatomy(model))
    modules, total = [module for members in components.values() for module in members], 0.0
    for chosen in batches(prompts, 32):
        past = prompt_past(model, [prompts[i] for i in chosen], tail=tail)
        kept: dict[int, Tensor] = {}
        with reading(modules, kept, what="output"):
            forward(model, past, past.tail, skip=tail - 1)
        total = total + torch.stack([kept[i].double().sum(0) for i in range(len(modules))])
    means = total.float() / len(prompts)
    return dict(zip(components, means.chunk(len(components)), strict=True))


@torch.no_grad()
def component_effects(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], *, target: Sequence[int], means: ComponentMeans
) -> dict[str, Float[Tensor, "prompt layer tail"]]:
    """`head_effects` for components that the paper does not patch: all heads of a layer at once, its MLP, and the
    residual stream after it, at each of the last `tail` prompt tokens."""
    parts, tail = anatomy(model), next(iter(means.values())).shape[1]
    effects = {name: torch.empty(len(prompts), len(parts.layers), tail) for name in means}
    for chosen in batches(prompts, 16):
        run = _Run(model, parts, prompt_past(model, [prompts[i] for i in chosen], tail=tail), target)
        for name in means:
            for layer, module in enumerate(component_modules(parts)[name]):
                with editing([module], _one_per_row(means[name][layer], of_heads=False), what="output"):
                    effects[name][chosen, layer] = run.effects(layer, tail)
    return effects


def ranked_heads(scores: Float[Tensor, "layer head"]) -> list[tuple[int, int]]:
    """Heads `(layer, head)` from the highest score down, signed: a head that works against the target comes last.

    Source: BkdAttr, section 3; one ranking over all layers.

    >>> ranked_heads(torch.tensor([[0.1, 0.3], [-0.2, 0.2]]))
    [(0, 1), (1, 1), (0, 0), (1, 0)]
    """
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(index, scores.shape[1]) for index in order]
