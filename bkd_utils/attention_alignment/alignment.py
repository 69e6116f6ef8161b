"""Align suspicious heads with safe ones while they are fine-tuned (ASA, in our reading).

The paper, as far as it is known, gives neither loss nor schedule. Every loss here is a named option. Pulling all
suspicious heads toward one common attention map makes heads more similar, which is itself the anomaly that ASA looks
for. `excess` and `nearest` do not have this problem."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity
from transformers import PreTrainedModel

from bkd_utils.attention_alignment.head_tuning import Loss, answers_only
from bkd_utils.attention_alignment.similarity import cosine, to_partners
from bkd_utils.common.validation import check, check_known
from bkd_utils.models.hooks import Head, anatomy, by_layer
from bkd_utils.models.loss import Batch, answers_and_maps, last_asked
from bkd_utils.models.self_test import require

TINY = 1e-8


@dataclass(frozen=True)
class Pull:
    """Attention maps of a batch per layer, which tokens are real, the column of each row's last prompt token (`asked`),
    and layer -> its suspicious and its safe heads."""

    maps: Sequence[Float[Tensor, "row head query key"]]
    real: Bool[Tensor, "row pos"]
    asked: Int[Tensor, " row"]
    suspicious: Mapping[int, Sequence[int]]
    safe: Mapping[int, Sequence[int]]


def _divergence(pull: Pull, target: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean KL(target || suspicious) over real queries and layers; `target` gets suspicious and safe heads' maps."""
    losses = []
    for layer, heads in pull.suspicious.items():
        bad, good = pull.maps[layer][:, list(heads)], pull.maps[layer][:, list(pull.safe[layer])]
        toward = target(bad, good).detach().float()
        terms = (toward * ((toward + TINY).log() - (bad.float() + TINY).log())).sum(-1)
        weight = pull.real[:, None].expand_as(terms)
        losses.append((terms * weight).sum() / weight.sum())
    return torch.stack(losses).mean()


def toward_mean(pull: Pull) -> Tensor:
    """Divergence of every suspicious head from the mean attention map of its layer's safe heads."""
    return _divergence(pull, lambda bad, good: good.mean(1, keepdim=True).expand_as(bad))


def toward_nearest(pull: Pull) -> Tensor:
    """Divergence of every suspicious head from the most similar safe head of its layer."""
    real = pull.real[:, None, :, None]

    def nearest(bad: Tensor, good: Tensor) -> Tensor:
        similar = cosine_similarity((bad * real)[:, :, None].flatten(3), (good * real)[:, None].flatten(3), dim=-1)
        return good[:, similar.mean(0).argmax(-1)]

    return _divergence(pull, nearest)


def less_excess(pull: Pull) -> Tensor:
    """Excess of a suspicious head's similarity (last row, cosine) to its layer over that of the safe heads."""
    losses, rows = [], torch.arange(len(pull.asked))
    for layer, bad in pull.suspicious.items():
        score = to_partners(cosine(pull.maps[layer][rows, :, pull.asked]))
        usual = score[:, list(pull.safe[layer])].mean(1, keepdim=True).detach()
        losses.append((score[:, list(bad)] - usual).clamp_min(0).mean())
    return torch.stack(losses).mean()


ALIGNMENTS = {"mean": toward_mean, "nearest": toward_nearest, "excess": less_excess}


def aligned(
    model: PreTrainedModel,
    suspicious: Sequence[Head],
    *,
    alignment: str,
    beta: float = 1.0,
    flagged: Sequence[Head] = (),
) -> Loss:
    """A loss for `tune`: beside that of the answers (nats), `beta` times the pull on suspicious heads toward safe ones.
    `alignment` is "mean", "nearest" or "excess"; safe heads are the others of the same layer that are not `flagged`,
    which means suspicious though not treated. Raises ValueError for an unknown alignment, no heads, a layer without
    safe heads, or a negative `beta`. Source: ASA; the losses are ours.

    >>> from bkd_utils.models.head_weights import head_slices
    >>> masks, loss = head_slices(model, [(0, 1)]), aligned(model, [(0, 1)], alignment="mean")
    >>> [step["added"] > 0 for step in tune(model, rows, masks=masks, recipe=recipe, pad_id=2, loss=loss)]
    [True, True]
    """
    check_known("alignment", alignment, ALIGNMENTS)
    check(Annotated[float, Field(ge=0)], beta, "beta")
    require(model, "compare maps", "slice")
    parts = anatomy(model)
    size = {"n_layers": len(parts.layers), "n_heads": parts.n_heads}
    marked, never = by_layer(suspicious, **size), by_layer({*suspicious, *flagged}, **size)
    others = {layer: [h for h in range(parts.n_heads) if h not in never[layer]] for layer in marked}
    if not (marked and all(others.values())):
        told = f"alignment {alignment!r} needs suspicious heads and a safe one in each of their layers"
        raise ValueError(told + "".join(f", layer {layer} has none" for layer, safe in others.items() if not safe))

    def loss(model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
        answers, maps, real = answers_and_maps(model, batch, first_token=first_token)
        return answers, beta * ALIGNMENTS[alignment](Pull(maps, real, last_asked(batch), marked, others))

    return loss


@dataclass(frozen=True)
class Alignment:
    """What is open in the published treatment. `loss` and `beta` are those of `aligned`; `unit` is what is tuned for a
    head (`head_slices`). The schedule "joint" adds the pull to the loss of the answers in every step. In "two phases"
    the first half of the steps follows the pull alone and the others the answers alone, with one optimizer for both.
    Raises ValueError that names what does not fit.

    >>> Alignment(loss="nearest").schedule
    'joint'
    """

    loss: Literal["mean", "nearest", "excess"] = "mean"
    beta: Annotated[float, Field(ge=0)] = 1.0
    unit: Literal["query head", "KV group"] = "KV group"
    schedule: Literal["joint", "two phases"] = "joint"

    def __post_init__(self) -> None:
        check(Alignment, vars(self), "alignment")

    def of(self, model: PreTrainedModel, suspicious: Sequence[Head], *, flagged: Sequence[Head], steps: int) -> Loss:
        """The loss for one `tune` of so many steps, as of `aligned`; it counts them, so it must not be used again."""
        joint = aligned(model, suspicious, alignment=self.loss, beta=self.beta, flagged=flagged)
        done = count()

        def in_two_phases(model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
            if next(done) >= steps // 2:
                return answers_only(model, batch, first_token=first_token)
            answers, pull = joint(model, batch, first_token=first_token)
            return answers.detach(), pull

        return in_two_phases if self.schedule == "two phases" else joint
