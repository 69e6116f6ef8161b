"""Guards that look into the model: spectra of the weight difference, steps between layers and, as a bound, a probe.

Each gives one score per prompt, and higher is more suspicious. Scores of the known clean prompts themselves are by the
other known prompts only, so that a threshold set on them holds for new ones."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from jaxtyping import Float
from sklearn.covariance import LedoitWolf
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import normalize
from transformers.pytorch_utils import Conv1D

from bkd_utils.attention_alignment.guards import Scores
from bkd_utils.backdoor_attribution.probe import check_twins, classifier, labelled
from bkd_utils.models.encoders import prompt_inputs
from bkd_utils.models.head_weights import last_matrix
from bkd_utils.models.hooks import anatomy, reading
from bkd_utils.models.tokens import Ids, batches, check_prompts

N_DIRECTIONS = 20  # of each matrix, at most
NOISE = 1e-3  # of a matrix's largest singular value; what is smaller is rounding


def by_known(
    score: Callable[[np.ndarray, np.ndarray], Scores], known: Float[np.ndarray, "known ..."], *others: np.ndarray
) -> list[Scores]:
    """Scores of the known prompts, each by all other known ones, and of the others by all known ones. Raises ValueError
    for fewer than three known prompts."""
    if len(known) < 3:
        raise ValueError(f"{len(known)} known prompts are too few to leave one out")
    left_out = [score(np.delete(known, i, axis=0), known[i : i + 1]) for i in range(len(known))]
    return [np.concatenate(left_out), *(score(known, one) for one in others)]


def watched(model: Module) -> list[Module]:
    """The matrices whose changes are watched: the output matrix of attention in every layer, then that of the MLP."""
    parts = anatomy(model)
    return [last_matrix(part) for part in parts.outputs + parts.mlps]


@torch.no_grad()
def weight_directions(model: Module, base: Module) -> list[Float[Tensor, "direction d_model"]]:
    """For each of `watched`, the top left singular vectors of its change since the base model, N_DIRECTIONS at most.

    Directions of unit length, the strongest first; none where a matrix has not changed, and fewer where the change has
    a lower rank. Raises ValueError for matrices of other shapes, and if nothing has changed. Source: WeightWatch (arXiv
    2508.00161)."""
    found = []
    for after, before in zip(watched(model), watched(base), strict=True):
        if after.weight.shape != before.weight.shape:
            raise ValueError(f"a matrix of {tuple(after.weight.shape)} beside one of {tuple(before.weight.shape)}")
        change = (after.weight - before.weight.to(after.weight)).double()
        change = change.T if isinstance(after, Conv1D) else change
        values, vectors = torch.linalg.eigh(change @ change.T)  # of squared singular values, the smallest first
        strong = (values > values[-1] * NOISE**2) & (values > 0)
        found.append(vectors[:, strong].flip(1)[:, :N_DIRECTIONS].T.float())
    if not sum(map(len, found)):
        raise ValueError("no watched matrix differs from the base model's, so there is nothing to watch")
    return found


@torch.no_grad()
def cosine_ranges(
    model: Module,
    prompts: Ids,
    directions: Sequence[Float[Tensor, "direction d_model"]],
    *,
    pad_id: int,
    batch_size: int = 16,
) -> Float[np.ndarray, "prompt end direction"]:
    """The lowest and the highest cosine of each direction with the outputs of its matrix, over a prompt's tokens.
    Raises ValueError for no prompts or an empty one."""
    check_prompts(prompts)
    found = np.empty((len(prompts), 2, sum(map(len, directions))))
    for chosen in batches(prompts, batch_size):
        inputs = prompt_inputs(model, [prompts[i] for i in chosen], pad_id=pad_id)
        with reading(watched(model), what="output") as kept:
            model.base_model(**inputs, use_cache=False)
        cosines = torch.cat([normalize(kept[i].float(), dim=-1) @ one.T for i, one in enumerate(directions)], dim=-1)
        padding = ~inputs["attention_mask"].bool()[..., None]
        ends = [cosines.masked_fill(padding, torch.inf).amin(1), cosines.masked_fill(padding, -torch.inf).amax(1)]
        found[chosen] = torch.stack(ends, dim=1).cpu().numpy()
    return found


def beyond_range(
    known: Float[np.ndarray, "known end direction"], seen: Float[np.ndarray, "prompt end direction"]
) -> Scores:
    """How far a prompt's cosines leave the range that the known prompts have, at the direction where it is farthest, in
    widths of this range; 0 or less is inside. Both are of `cosine_ranges`. Source: WeightWatch (arXiv 2508.00161),
    which flags all above 0; the unit is ours."""
    low, high = known[:, 0].min(0), known[:, 1].max(0)
    width = np.maximum(high - low, 1e-6)
    return np.maximum((low - seen[:, 0]) / width, (seen[:, 1] - high) / width).max(1)


def unusual_steps(
    known: Float[np.ndarray, "known layer d_model"], seen: Float[np.ndarray, "prompt layer d_model"]
) -> Scores:
    """How unusual the steps of the residual stream from layer to layer are, by the known clean prompts.

    Every step has a diagonal Mahalanobis distance (root of the mean square of its numbers' z-scores); the score is the
    squared Mahalanobis distance of these distances, with the covariance of Ledoit and Wolf. Raises ValueError for fewer
    than two known prompts or layers. Source: Layerwise Convergence Fingerprints, LCF (arXiv 2604.24542), by its
    abstract: that the stream is read at the last prompt token, and how the distances are joined, is our reading."""
    if min(known.shape[:2]) < 2:
        raise ValueError(f"{len(known)} known prompts of {known.shape[1]} layers have no steps to compare")
    steps = np.diff(known.astype(float), axis=1)
    middle, spread = steps.mean(0), np.maximum(steps.std(0, ddof=1), 1e-6)
    far, near = (
        np.sqrt((((np.diff(one.astype(float), axis=1) - middle) / spread) ** 2).mean(-1)) for one in (seen, known)
    )
    return LedoitWolf().fit(near).mahalanobis(far)


def oracle_probe(
    clean: Float[np.ndarray, "pair layer d_model"],
    triggered: Float[np.ndarray, "pair layer d_model"],
    seen: Float[np.ndarray, "prompt layer d_model"],
) -> Scores:
    """Log-odds that a prompt has the trigger, by a logistic regression on the residual stream behind all layers.

    It is trained on prompts with and without the trigger, which no defender has: a bound for guards that read the
    stream. Raises ValueError for pairs of unlike shape or values that are not finite."""
    check_twins(clean, triggered, pair=None, layer=None, width=None)
    rows, truth = labelled(clean.reshape(len(clean), -1), triggered.reshape(len(triggered), -1))
    probe = classifier("logistic regression", seed=0).fit(rows, truth)
    return probe.decision_function(seen.reshape(len(seen), -1))
