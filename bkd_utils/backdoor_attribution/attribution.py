"""BAHA: the causal effect of every attention head on the backdoor's answer, exactly and fast (BkdAttr, section 3).

The effect of a head on a clean prompt is the change of the target's score when the head's output at the last prompt
token is replaced by its mean over triggered prompts. The score is one of `METRICS`:

* `probability`, as published: the geometric mean over the target's tokens, computed in log space, because the official
  code multiplies probabilities and underflows on long targets. It hardly moves near 0 and 1.
* `log_prob`: its logarithm, in nats.
* `logit_difference`: logit of the target's first token less that of another token, in nats. For a model that chooses
  between two answers this is the log-odds of the target.

The reverse question, which heads a triggered prompt needs, is asked by the same functions: `prompts` are triggered ones
and `means` those of clean prompts, and a head that is needed has a negative effect.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Annotated

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.common.validation import check, check_known, check_shape
from bkd_utils.models.activations import by_row, head_outputs, token_log_prob
from bkd_utils.models.head_weights import head_width
from bkd_utils.models.hooks import LAST, anatomy, editing, reading, tracing
from bkd_utils.models.prompt_cache import Past, forward, prompt_past
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Ids, batches, check_prompts

METRICS = ("probability", "log_prob", "logit_difference")
HeadMeans = Float[Tensor, "layer head d_head"]
# Token ids of one target for all prompts, or of one for each.
Target = Sequence[int] | Ids


def head_means(model: PreTrainedModel, prompts: Ids) -> HeadMeans:
    """Mean output of every head at the last prompt token. Raises as `head_outputs` does. Source: BkdAttr, section 3.

    >>> head_means(model, prompts).shape
    torch.Size([2, 4, 8])
    """
    require(model, "attribute")
    return head_outputs(model, prompts).double().mean(0).float()


def head_shape(model: PreTrainedModel) -> dict[str, int]:
    """Numbers of layers, of heads in a layer and of values of a head."""
    parts = anatomy(model)
    return {"layer": len(parts.layers), "head": parts.n_heads, "d_head": head_width(parts, 0)}


def check_target(
    model: PreTrainedModel, prompts: Ids, target: Target, against: Sequence[int] | None
) -> tuple[Tensor, Tensor | None]:
    """Tokens of each prompt's target, `[prompt, token]`, and the one token that it is compared with, `[prompt]`. Raises
    ValueError for no prompts, and for targets that are empty, of different lengths, no token ids of this model, or, as
    tokens to compare with, not one for each prompt."""
    check_prompts(prompts)
    token = Annotated[int, Field(ge=0, lt=model.get_input_embeddings().num_embeddings)]
    rows = [target] * len(prompts) if not len(target) or not isinstance(target[0], Sequence) else target
    answers = Annotated[list[Annotated[list[token], Field(min_length=1)]], Field(min_length=len(prompts))]
    check(answers, [list(row) for row in rows], "target")
    if len({len(row) for row in rows}) > 1 or len(rows) != len(prompts):
        raise ValueError(f"target: {len(prompts)} prompts need as many targets of one length, or one for all")
    if against is not None:
        one_each = Field(min_length=len(prompts), max_length=len(prompts))
        check(Annotated[list[token], one_each], list(against), "against")
        against = torch.tensor(list(against), device=model.device)
    return torch.tensor([list(row) for row in rows], device=model.device), against


def head_effects(
    model: PreTrainedModel,
    prompts: Ids,
    *,
    target: Target,
    means: HeadMeans,
    metric: str = "probability",
    against: Sequence[int] | None = None,
    memory_gib: float = 1.0,
    on_batch: Callable[[int], None] | None = None,
) -> Float[Tensor, "prompt layer head"]:
    """Causal indirect effect (CIE) of every head on every prompt, by patching each of them; their mean is the ACIE.

    An effect is a difference of scores of `target`: of length-normalised probabilities from -1 to 1, otherwise in nats.
    `against` is the token of each prompt that a logit difference compares with. `memory_gib` bounds logits and
    activations of a batch; `on_batch` is called with the number of prompts just finished. Raises ValueError for a
    prompt of fewer than two tokens, a target as in `check_target`, an unknown metric, and means of another shape or
    that are not finite; ModelError for an architecture that is not known. Source: BkdAttr, section 3; the metrics but
    `probability` are ours.

    >>> target = [int(model(torch.tensor(prompts[:1])).logits[0, -1].argmax())]
    >>> effects = head_effects(model, prompts[:1], target=target, means=head_means(model, prompts[:1]))
    >>> effects.shape, bool(effects.abs().max() < 1e-8)  # its own output in place of a head's changes nothing
    (torch.Size([1, 2, 4]), True)
    """
    how = {"against": against, "memory_gib": memory_gib, "on_batch": on_batch}
    return chosen_metric(effects_by_metric(model, prompts, target=target, means=means, **how), metric=metric)


def chosen_metric(effects: Mapping[str, Tensor], *, metric: str) -> Tensor:
    """The effects by one metric. Raises ValueError for one that is unknown or was not computed."""
    check_known("metric", metric, METRICS)
    if metric not in effects:
        raise ValueError(f"metric {metric!r} needs `against`, a token of each prompt to compare the target with")
    return effects[metric]


@torch.no_grad()
def effects_by_metric(
    model: PreTrainedModel,
    prompts: Ids,
    *,
    target: Target,
    means: HeadMeans,
    against: Sequence[int] | None = None,
    memory_gib: float = 1.0,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, Float[Tensor, "prompt layer head"]]:
    """`head_effects` by each metric, from one pass for all of them; no logit difference without `against`."""
    require(model, "attribute")
    answers, others = check_target(model, prompts, target, against)
    check_shape("means", means, **head_shape(model))
    # For every head and target token: the logits twice, and the widest activation of a layer a few times.
    config, n_rows = model.config, means.shape[1] * answers.shape[1]
    widest = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    bytes_per_row = 4 * (2 * config.vocab_size + 3 * widest + 8 * config.hidden_size)
    size = max(1, int(memory_gib * 2**30 / (n_rows * bytes_per_row)))
    patches = {"heads": (anatomy(model).outputs, means)}
    found = patched_effects(model, patches, prompts, answers, others, what="input", size=size, on_batch=on_batch)
    return found["heads"]


def patched_effects(
    model: PreTrainedModel,
    patches: Mapping[str, tuple[Sequence[torch.nn.Module], Float[Tensor, "layer patch width"]]],
    prompts: Ids,
    answers: Int[Tensor, "prompt token"],
    against: Int[Tensor, " prompt"] | None,
    *,
    what: str,
    size: int = 16,
    on_batch: Callable[[int], None] | None = None,
) -> dict[str, dict[str, Float[Tensor, "prompt layer patch"]]]:
    """Change of the target's scores by each patch of a module's input or output (`what`) at the last prompt token: a
    head's part of it, or, of one patch, all. `patches`: name -> modules, one per layer, and what is put in. Effects are
    by that name and by metric."""
    effects: dict[str, dict[str, Tensor]] = {name: {} for name in patches}
    for chosen in batches(prompts, size):
        past, other = prompt_past(model, [prompts[i] for i in chosen]), None if against is None else against[chosen]
        with reading(anatomy(model).layers) as inputs:
            clean = _scores(model, past, answers[chosen], other)
        # All patches of a layer are in one batch, which starts at this layer and shares the prompts' past.
        for layer, stream in inputs.items():
            for name, (modules, means) in patches.items():
                n_patches = means.shape[1]
                hidden = stream.repeat_interleave(n_patches, dim=0)
                change = partial(_patched, means[layer], answers.shape[1])
                with editing([modules[layer]], change, what=what):
                    patched = _scores(model, past, answers[chosen], other, n_patches, layer=layer, hidden=hidden)
                for metric, scores in patched.items():
                    found = effects[name].setdefault(metric, torch.empty(len(prompts), *means.shape[:2]))
                    found[chosen, layer] = (scores - clean[metric]).float().cpu()
        if on_batch:
            on_batch(len(chosen))
    return effects


def _scores(
    model: PreTrainedModel, past: Past, answers: Tensor, against: Tensor | None, repeats: int = 1, **start: int | Tensor
) -> dict[str, Float[Tensor, "prompt repeat"]]:
    """Scores of the targets by metric in several rows per prompt; `start` is where `forward` starts."""
    rows = answers.repeat_interleave(repeats, dim=0)
    logits = forward(model, past, past.rows(rows), **start)
    log_prob = token_log_prob(logits, rows).mean(-1)
    found = {"probability": log_prob.exp(), "log_prob": log_prob}
    if against is not None:
        pair = torch.stack([rows[:, 0], against.repeat_interleave(repeats)], dim=1)
        both = logits[:, 0].float().gather(-1, pair)
        found["logit_difference"] = both[:, 0] - both[:, 1]
    return {metric: scores.view(-1, repeats) for metric, scores in found.items()}


def _patched(means: Float[Tensor, "patch width"], new: int, _: int, given: Tensor) -> Tensor:
    """At the last prompt token, patch i modulo their number is put in its place in row i."""
    tensor = by_row(given.clone(), new)
    row = torch.arange(len(tensor), device=tensor.device)
    patches = tensor.unflatten(-1, (len(means), -1))[:, LAST.start]
    patches[row, row % len(means)] = means.to(tensor)[row % len(means)]
    return tensor.view_as(given)


def gradient_effects(
    model: PreTrainedModel, prompts: Ids, *, target: Target, means: HeadMeans
) -> Float[Tensor, "prompt layer head"]:
    """First-order estimate of `head_effects`: gradient of the target's probability times the change of the head. One
    backward pass for all heads. Same units, same errors. Source: attribution patching (Nanda 2023), not BkdAttr.

    >>> means = head_means(model, prompts[:1])
    >>> target = [int(model(torch.tensor(prompts[:1])).logits[0, -1].argmax())]
    >>> exact = head_effects(model, prompts[:1], target=target, means=means + 0.01)
    >>> fast = gradient_effects(model, prompts[:1], target=target, means=means + 0.01)
    >>> bool((exact - fast).abs().max() < 0.1 * exact.abs().max())
    True
    """
    return gradients_by_metric(model, prompts, target=target, means=means)["probability"]


def gradients_by_metric(
    model: PreTrainedModel, prompts: Ids, *, target: Target, means: HeadMeans, against: Sequence[int] | None = None
) -> dict[str, Float[Tensor, "prompt layer head"]]:
    """`gradient_effects` by each metric, from one pass forward and one back for each."""
    require(model, "attribute")
    answers, others = check_target(model, prompts, target, against)
    check_shape("means", means, **head_shape(model))
    parts, effects = anatomy(model), {}
    for chosen in batches(prompts, 16):
        past, other = prompt_past(model, [prompts[i] for i in chosen]), None if others is None else others[chosen]
        with tracing(parts.outputs) as kept:
            scores, outputs = _scores(model, past, answers[chosen], other), list(kept.values())
            for metric, values in scores.items():
                found = effects.setdefault(metric, torch.empty(len(prompts), *means.shape[:2]))
                gradients = torch.autograd.grad(values.sum(), outputs, retain_graph=True)
                for layer, gradient in zip(kept, gradients, strict=True):
                    z, slope = (t[:, 0].detach().view(len(chosen), parts.n_heads, -1) for t in (kept[layer], gradient))
                    found[chosen, layer] = (slope * (means[layer].to(z) - z)).sum(-1).float().cpu()
    return effects


def ranked_heads(scores: Float[Tensor, "layer head"]) -> list[tuple[int, int]]:
    """Heads `(layer, head)` from the highest signed score down, in one ranking of all. Source: BkdAttr, section 3.

    >>> ranked_heads(torch.tensor([[0.1, 0.3], [-0.2, 0.2]]))
    [(0, 1), (1, 1), (0, 0), (1, 0)]
    """
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return [divmod(index, scores.shape[1]) for index in order]
