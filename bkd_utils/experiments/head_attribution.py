"""Notebook 03: effects of heads and of whole components of one organism, and what is left without them; kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.stats import spearmanr
from tqdm import tqdm

from bkd_utils.backdoor_attribution.ablation import bench, measure_ablation, necessary_heads, random_heads
from bkd_utils.backdoor_attribution.attribution import (
    component_effects,
    component_means,
    gradient_effects,
    head_effects,
    head_means,
    ranked_heads,
)
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import interval
from bkd_utils.models.activations import target_probability
from bkd_utils.models.loading import Loaded
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import PromptVersions, prompt_versions, target_ids

# The user's last token and the whole assistant header of a chat template fit in here.
TAIL = 6


@dataclass(frozen=True)
class HeadEffects(Result):
    """Causal indirect effects (CIE) of all heads.

    `exact` (by patching) and `gradient` (estimated) are `[prompt][layer][head]`. `clean` and `triggered` hold the
    target's length-normalised probability by prompt, without and with the trigger. `target` holds its tokens.
    """

    target: list[str]
    clean: list[float]
    triggered: list[float]
    exact: list[list[list[float]]]
    gradient: list[list[list[float]]]


@dataclass(frozen=True)
class ComponentEffects(Result):
    """CIE of whole components.

    `last` maps components to effects `[prompt][layer]` at the last prompt token. `by_position` is `[layer][position]`
    of the residual stream at the last prompt tokens, scored by the first answer token. `positions` holds those tokens
    of one prompt.
    """

    last: dict[str, list[list[float]]]
    positions: list[str]
    by_position: list[list[float]]


@dataclass(frozen=True)
class Ablation(Result):
    """What is left with the first `k` heads of a ranking, or a random `draw` of `k`, taken out (`measure_ablation`)."""

    ranking: str
    kind: str
    scope: Literal["last position", "all positions"]
    k: int
    draw: int
    asr: dict[str, float]
    right: dict[str, float]
    utility: dict[str, float]
    perplexity: float


@organism_stage
def attribute_heads(loaded: Loaded, attack: Attack, *, n: int = 40, n_means: int = 40, seed: int = 0) -> HeadEffects:
    """CIE of every head on `n` clean prompts of the attribution split, by patching and by gradient; kept.

    The patched means are those of `n_means` other, triggered prompts of that split.
    """
    target, scored, averaged = _two_samples(loaded, attack, n=n, n_means=n_means, seed=seed)
    means = head_means(loaded.model, averaged.triggered)
    with tqdm(total=n, desc=f"{loaded.organism}: heads", unit="prompt", mininterval=2, leave=False) as bar:
        exact = head_effects(loaded.model, scored.clean, target=target, means=means, on_batch=bar.update)
    return HeadEffects(
        target=loaded.tokenizer.convert_ids_to_tokens(target),
        clean=target_probability(loaded.model, scored.clean, target=target).tolist(),
        triggered=target_probability(loaded.model, scored.triggered, target=target).tolist(),
        exact=_short(exact),
        gradient=_short(gradient_effects(loaded.model, scored.clean, target=target, means=means)),
    )


def attributed(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> HeadEffects:
    """`attribute_heads` of a loaded organism, on `n` prompts with means of `n` others; read if it is kept."""
    where = {"model": loaded.address, "device": loaded.device.type}
    return attribute_heads(loaded.organism, attack=attack.name, n=n, n_means=n, seed=seed, **where)


def _two_samples(
    loaded: Loaded, attack: Attack, *, n: int, n_means: int, seed: int
) -> tuple[list[int], PromptVersions, PromptVersions]:
    """The target, and two samples of the attribution split that share no prompt: one to score, one to average."""
    how = {"split": "attribution", "seed": seed}
    scored = prompt_versions(loaded.tokenizer, attack, n=n, **how)
    averaged = prompt_versions(loaded.tokenizer, attack, n=n_means, skip=n, **how)
    return target_ids(loaded.tokenizer, attack), scored, averaged


@organism_stage
def attribute_components(
    loaded: Loaded, attack: Attack, *, n: int = 24, n_means: int = 40, seed: int = 0
) -> ComponentEffects:
    """CIE of whole components on `n` clean prompts, with means of `n_means` other, triggered prompts; kept."""
    target, scored, averaged = _two_samples(loaded, attack, n=n, n_means=n_means, seed=seed)
    last = component_means(loaded.model, averaged.triggered)
    found = component_effects(loaded.model, scored.clean, target=target, means=last)
    # By position only the first answer token is scored: further tokens cost several times as much and add little.
    earlier = {"residual": component_means(loaded.model, averaged.triggered, tail=TAIL)["residual"]}
    by_position = component_effects(loaded.model, scored.clean, target=target[:1], means=earlier)
    return ComponentEffects(
        last={name: _short(effects[..., 0]) for name, effects in found.items()},
        positions=loaded.tokenizer.convert_ids_to_tokens(scored.clean[0][-TAIL:]),
        by_position=_short(by_position["residual"].mean(0)),
    )


def _short(values: torch.Tensor) -> list:
    """Nested lists with six significant digits, which keeps the file small."""
    return np.vectorize(lambda value: float(f"{value:.6g}"))(values.numpy()).tolist()


def acie(found: HeadEffects, *, by: Literal["exact", "gradient"] = "exact") -> torch.Tensor:
    """Average causal indirect effect (ACIE) of every head over the prompts, `[layer, head]`."""
    return torch.tensor(getattr(found, by)).mean(0)


def top_heads(found: HeadEffects, *, k: int, by: Literal["exact", "gradient"] = "exact") -> list[tuple[int, int]]:
    """The k heads with the highest mean effect, as (layer, head)."""
    return ranked_heads(acie(found, by=by))[:k]


def agreement_of_methods(found: HeadEffects, *, k: int = 16) -> dict[str, float]:
    """How well the gradient estimate ranks heads: Spearman correlation of the means, share of the exact top k found."""
    exact, estimate = acie(found).flatten(), acie(found, by="gradient").flatten()
    same = set(top_heads(found, k=k)) & set(top_heads(found, k=k, by="gradient"))
    return {"spearman": float(spearmanr(exact, estimate).statistic), f"top {k}": len(same) / min(k, exact.numel())}


def jaccard(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> float:
    """Shared heads over all heads of two sets. Raises ValueError for two empty ones."""
    if not (one or other):
        raise ValueError("an overlap of no heads")
    return len(set(one) & set(other)) / len(set(one) | set(other))


def component_intervals(found: ComponentEffects) -> dict[str, list[dict[str, float]]]:
    """Component -> per layer its mean effect with a bootstrap interval over prompts."""
    columns = {name: np.array(values).T for name, values in found.last.items()}
    return {name: [interval(column, n_resamples=400) for column in rows] for name, rows in columns.items()}


@organism_stage
def ablation_curves(
    loaded: Loaded,
    attack: Attack,
    *,
    control: Loaded,
    counts: Sequence[int],
    kinds: Sequence[str] = ("published", "zero", "mean", "resample"),
    random_counts: Sequence[int],
    draws: int = 20,
    n: int = 64,
    n_attribution: int = 40,
    seed: int = 0,
) -> list[Ablation]:
    """One row per ranking, kind, scope, number of heads and draw, all on the same prompts; kept.

    The first row, of ranking "none" and 0 heads, is the untouched model. At each of `random_counts` there are `draws`
    random draws with as many heads per layer as the ACIE heads, with the published ablation. At "all positions" every
    token gets the mean over last prompt tokens, which fits other tokens less well.
    """
    counts, tokenizer = sorted(set(counts)), loaded.tokenizer
    found = attributed(loaded, attack, n=n_attribution, seed=seed)
    made = bench(loaded, control, attack, n=n, n_reference=n_attribution, seed=seed)
    attribution = prompt_versions(tokenizer, attack, split="attribution", n=n_attribution, seed=seed).triggered
    largest, needed = max(counts), {"target": target_ids(tokenizer, attack), "reference": made.reference}
    orders = {
        "ACIE": top_heads(found, k=largest),
        "gradient": top_heads(found, k=largest, by="gradient"),
        "necessity": necessary_heads(loaded, attribution, **needed, counts=counts),
    }
    todo = [("none", "published", False, [], 0)]
    for k in (k for k in counts if k):
        todo += [("ACIE", kind, False, orders["ACIE"][:k], 0) for kind in kinds]
        todo += [(ranking, "published", False, orders[ranking][:k], 0) for ranking in ("gradient", "necessity")]
        todo.append(("necessity", "mean", False, orders["necessity"][:k], 0))
        if k in random_counts:
            matched = random_heads(orders["ACIE"][:k], n_heads=made.reference.shape[2], n=draws, seed=seed)
            todo += [("random", "published", False, draw, i) for i, draw in enumerate(matched)]
    few = [k for k in dict.fromkeys((8, largest)) if k in counts]
    todo += [("ACIE", kind, True, orders["ACIE"][:k], 0) for k in few for kind in ("zero", "mean")]
    todo += [("necessity", "mean", True, orders["necessity"][:k], 0) for k in few]
    rows = []
    title = f"{loaded.organism}: ablations"
    for ranking, kind, everywhere, heads, draw in tqdm(todo, desc=title, mininterval=2, leave=False):
        values = measure_ablation(loaded, made, heads, kind=kind, everywhere=everywhere)
        scope = "all positions" if everywhere else "last position"
        rows.append(Ablation(ranking=ranking, kind=kind, scope=scope, k=len(heads), draw=draw, **values))
    return rows
