"""Head safety evaluation (ASA): importance on clean data and similarity, combined into a score of suspicion.

How the paper combines importance and similarity is not known; the rules here are named options."""

from collections.abc import Callable, Sequence
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.attention_alignment.similarity import Maps, Outputs, Scores
from bkd_utils.backdoor_attribution.attribution import head_effects, head_means, ranked_heads
from bkd_utils.common.validation import check, check_shape
from bkd_utils.models.hooks import Head, anatomy, tracing
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Row, batches


def gate_importance(model: PreTrainedModel, rows: Sequence[Row], *, pad_id: int) -> Scores:
    """Mean absolute slope of the loss in a gate on each head's output at all positions, on clean rows, in nats. Raises
    ValueError for no rows. Source: Michel et al. 2019; ASA's own measure of importance is not known.

    >>> model.model.layers[0].self_attn.o_proj.weight[:, :8] = 0.0  # head (0, 0) writes nothing now
    >>> (gate_importance(model, rows, pad_id=2) > 0).tolist()
    [[False, True, True, True], [True, True, True, True]]
    """
    if not rows:
        raise ValueError("importance needs at least one row")
    require(model, "train", "attribute")
    parts = anatomy(model)
    total = torch.zeros(len(parts.layers), parts.n_heads)
    for chosen in batches([row.prompt + row.answer for row in rows], 8):
        batch = collate([rows[i] for i in chosen], pad_id=pad_id, device=model.device)
        with tracing(parts.outputs) as kept:
            loss = answer_loss(model, batch, first_token=0.0)
            slopes = torch.autograd.grad(loss * len(chosen), [kept[layer] for layer in range(len(kept))])
        real = batch["attention_mask"].bool()[..., None]
        for layer, slope in enumerate(slopes):
            # Some attention kernels leave NaN as the gradient of padding.
            change = torch.where(real, slope * kept[layer].detach(), 0)
            gate = change.unflatten(-1, (parts.n_heads, -1)).sum((1, 3))
            total[layer] += gate.abs().sum(0).float().cpu()
    return total / len(rows)


def leave_one_out(model: PreTrainedModel, rows: Sequence[Row]) -> Scores:
    """Loss of the right answer's probability, as in `head_effects`, when a head's output is replaced by its clean mean.
    Mean over rows. Raises ValueError for no rows."""
    if not rows:
        raise ValueError("importance needs at least one row")
    means = head_means(model, [row.prompt for row in rows])
    by_answer: dict[tuple[int, ...], list[list[int]]] = {}
    for row in rows:
        by_answer.setdefault(row.answer, []).append(list(row.prompt))
    lost = [-head_effects(model, prompts, target=answer, means=means) for answer, prompts in by_answer.items()]
    return torch.cat(lost).mean(0)


def attention_variance(maps: Maps, _outputs: Outputs) -> Scores:
    """Variance of a head's attention row of the last prompt token, as in PURE; for `similarity.head_scores`."""
    return maps[:, :, -1].float().var(-1, unbiased=False)


def robust_z(scores: Scores) -> Scores:
    """Distance from the layer's median, in units of the median absolute deviation (MAD) over the whole model. Nine
    heads are too few for a deviation per layer. Raises ValueError if most heads have their layer's median, and for
    scores that are not finite."""
    check_shape("scores", scores, layer=None, head=None)
    centred = scores.double() - scores.double().median(dim=1, keepdim=True).values
    spread = 1.4826 * centred.abs().median()
    if spread == 0:
        raise ValueError("most heads have the same score as their layer's median: there is nothing to compare")
    return (centred / spread).float()


# Rule -> joint score of (similarity or its reaction, importance); the higher, the more suspicious.
RULES: dict[str, Callable[[Scores, Scores], Scores]] = {
    "similar": lambda similar, needed: robust_z(similar),
    "similar, little needed": lambda similar, needed: robust_z(similar) - robust_z(needed),
    "similar and needed": lambda similar, needed: torch.minimum(robust_z(similar), robust_z(needed)),
}


def suspicious(joint: Float[Tensor, "layer head"], *, threshold: float = 2.0, at_most: float = 0.25) -> list[Head]:
    """Heads above the threshold, most suspicious first, at most that share of all heads. May be none. `joint` is a
    score by one of `RULES`, in robust standard deviations. Raises ValueError for a share outside 0 to 1, and for scores
    or a threshold that are no numbers. Source: ASA; the rule is ours.

    >>> suspicious(torch.tensor([[0.0, 3.0], [2.5, 9.0]]), threshold=2.0, at_most=0.5)
    [(1, 1), (0, 1)]
    """
    check_shape("joint", joint, layer=None, head=None)
    check(Annotated[float, Field(ge=0, le=1)], at_most, "at_most")
    check(float, threshold, "threshold")
    return [head for head in ranked_heads(joint)[: int(at_most * joint.numel())] if joint[head] > threshold]
