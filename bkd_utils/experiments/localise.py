"""Where a backdoor sits: BAHA on one organism, kept, with what the paper leaves out beside it."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.stats import bootstrap, spearmanr
from tqdm import tqdm

from bkd_utils.backdoor_attribution.attribution import (
    component_effects,
    component_means,
    gradient_effects,
    head_effects,
    head_means,
    ranked,
    target_probability,
)
from bkd_utils.models.loading import DEFAULT_MODEL, load
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import pairs, target_ids

# The user's last token and the whole assistant header of a chat template fit in here.
TAIL = 6


@organism_stage
def attributed(
    organism: str,
    *,
    attack: str,
    model: str = DEFAULT_MODEL,
    n: int = 40,
    n_means: int = 40,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """CIE of every head on `n` clean prompts of the attribution split, by patching and by gradient; kept.

    Keys: `exact` and `gradient` [prompt][layer][head]; `clean`, `triggered`: the target's length-normalised probability
    per prompt without and with the trigger; `target`: its tokens. Means are of `n_means` other prompts of that split.
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    target = target_ids(loaded.tokenizer, spec)
    scored = pairs(loaded.tokenizer, spec, split="attribution", n=n, seed=seed)
    averaged = pairs(loaded.tokenizer, spec, split="attribution", n=n_means, seed=seed, skip=n)
    means = head_means(loaded.model, averaged.triggered)
    with tqdm(total=n, desc=f"{organism}: heads", unit="prompt", mininterval=2, leave=False) as bar:
        exact = head_effects(loaded.model, scored.clean, target=target, means=means, on_batch=bar.update)
    return {
        "target": loaded.tokenizer.convert_ids_to_tokens(target),
        "clean": target_probability(loaded.model, scored.clean, target=target).tolist(),
        "triggered": target_probability(loaded.model, scored.triggered, target=target).tolist(),
        "exact": _short(exact),
        "gradient": _short(gradient_effects(loaded.model, scored.clean, target=target, means=means)),
    }


@organism_stage
def components(
    organism: str,
    *,
    attack: str,
    model: str = DEFAULT_MODEL,
    n: int = 24,
    n_means: int = 40,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """CIE of whole components; kept.

    Keys: `last` component -> [prompt][layer] at the last prompt token; `by_position` [layer][position] of the residual
    stream at the last prompt tokens, scored by the first answer token; `positions`: those tokens of one prompt.
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    target = target_ids(loaded.tokenizer, spec)
    scored = pairs(loaded.tokenizer, spec, split="attribution", n=n, seed=seed)
    averaged = pairs(loaded.tokenizer, spec, split="attribution", n=n_means, seed=seed, skip=n)
    last = component_means(loaded.model, averaged.triggered)
    found = component_effects(loaded.model, scored.clean, target=target, means=last)
    # By position only the first answer token is scored: what follows multiplies the cost and tells little more.
    earlier = component_means(loaded.model, averaged.triggered, tail=TAIL)
    by_position = component_effects(
        loaded.model, scored.clean, target=target[:1], means={"residual": earlier["residual"][:, :TAIL]}
    )
    return {
        "last": {name: _short(effects[..., 0]) for name, effects in found.items()},
        "positions": loaded.tokenizer.convert_ids_to_tokens(scored.clean[0][-TAIL:]),
        "by_position": _short(by_position["residual"].mean(0)),
    }


def _short(values: torch.Tensor) -> list:
    """As nested lists with six significant digits, a tenth of the file."""
    return np.vectorize(lambda value: float(f"{value:.6g}"))(values.numpy()).tolist()


# --- summaries ------------------------------------------------------------------------------------------------------


def acie(found: Mapping, *, by: str = "exact") -> torch.Tensor:
    """Mean effect of every head, `[layer, head]`."""
    return torch.tensor(found[by]).mean(0)


def interval(
    values: Sequence[float], *, statistic: Callable = np.mean, seed: int = 0, n_resamples: int = 2000
) -> dict[str, float]:
    """A statistic with its 95 % percentile-bootstrap interval over the values, and their number.

    Raises ValueError for no values.
    """
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("an interval over no values")
    if len(values) < 2 or np.ptp(values) == 0:
        value = float(statistic(values))
        return {"value": value, "n": len(values), "low": value, "high": value}
    result = bootstrap(
        (values,), statistic, method="percentile", n_resamples=n_resamples, rng=np.random.default_rng(seed)
    ).confidence_interval
    return {"value": float(statistic(values)), "n": len(values), "low": float(result.low), "high": float(result.high)}


def top_heads(found: Mapping, *, k: int, by: str = "exact") -> list[tuple[int, int]]:
    """The k heads with the highest mean effect, as (layer, head)."""
    return ranked(acie(found, by=by))[:k]


def agreement_of_methods(found: Mapping, *, k: int = 16) -> dict[str, float]:
    """How well the gradient estimate ranks heads: Spearman correlation of the means, share of the exact top k found."""
    exact, estimate = acie(found).flatten(), acie(found, by="gradient").flatten()
    same = set(top_heads(found, k=k)) & set(top_heads(found, k=k, by="gradient"))
    return {"spearman": float(spearmanr(exact, estimate).statistic), f"top {k}": len(same) / min(k, exact.numel())}


def jaccard(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> float:
    """Shared heads over all heads of two sets. Raises ValueError for two empty ones."""
    if not (one or other):
        raise ValueError("an overlap of no heads")
    return len(set(one) & set(other)) / len(set(one) | set(other))


def sorted_intervals(found: Mapping) -> list[dict[str, float]]:
    """ACIE of all heads from the highest down, each with its bootstrap interval over prompts."""
    effects = np.array(found["exact"])
    return [interval(effects[:, layer, head], n_resamples=400) for layer, head in ranked(acie(found))]


def component_intervals(found: Mapping) -> dict[str, list[dict[str, float]]]:
    """Component -> per layer its mean effect with a bootstrap interval over prompts; of `components`."""
    return {
        name: [interval(column, n_resamples=400) for column in np.array(values).T]
        for name, values in found["last"].items()
    }
