"""Notebook 03: effects of heads and of whole components of one organism."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from scipy.stats import t as student
from torch import Tensor
from tqdm import tqdm

from bkd_utils.backdoor_attribution.attribution import (
    METRICS,
    effects_by_metric,
    gradients_by_metric,
    head_means,
    ranked_heads,
)
from bkd_utils.backdoor_attribution.components import component_effects, component_means
from bkd_utils.common.results import Result
from bkd_utils.models.activations import target_probability
from bkd_utils.models.generation import openings
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import PromptVersions, balanced_versions, prompt_versions, target_ids


@dataclass(frozen=True)
class HeadMap(Result):
    """Effects of all heads: `mean` over `n` prompts and its standard error, `[layer][head]`."""

    n: int
    mean: list[list[float]]
    error: list[list[float]]


@dataclass(frozen=True)
class HeadEffects(Result):
    """Causal indirect effects (CIE) of all heads, averaged over prompts. By metric (`attribution.METRICS`):
    `sufficient`, what the target gains on clean prompts from the triggered mean of a head (BkdAttr's ACIE), by
    patching, and `gradient`, its estimate; `necessary`, what it loses on triggered prompts by the clean mean; and
    `concentration`, the part of all positive `sufficient` effects that the top 3 % of heads carry. `task` is what the
    right answer loses in log-probability (nats) on clean prompts of every label by the clean mean. `clean` and
    `triggered` hold the target's probability by prompt, `target` its tokens."""

    target: list[str]
    clean: list[float]
    triggered: list[float]
    sufficient: dict[str, HeadMap]
    gradient: dict[str, HeadMap]
    necessary: dict[str, HeadMap]
    task: HeadMap
    concentration: dict[str, dict[str, float]]


@dataclass(frozen=True)
class ComponentEffects(Result):
    """CIE of whole components at the last prompt token on the target (nats): component -> `[prompt][layer]`."""

    last: dict[str, list[list[float]]]


def samples(
    loaded: Loaded, attack: Attack, *, n: int, n_means: int, seed: int
) -> tuple[PromptVersions, PromptVersions]:
    """Prompts of the attribution split to score, and others of every label to average."""
    how = {"split": "attribution", "seed": seed}
    scored = prompt_versions(loaded.tokenizer, attack, n=n, **how)
    return scored, balanced_versions(loaded.tokenizer, attack, n=n_means, without=scored.examples, **how)


@organism_stage
def attribute_heads(
    loaded: Loaded, attack: Attack, *, n: int = 96, n_means: int = 96, n_task: int = 96, seed: int = 0
) -> HeadEffects:
    """CIE of every head on `n` prompts of the attribution split, and on `n_task` clean ones of every label. What is
    patched are means of `n_means` prompts of every label, which are others than the `n`, but may be the `n_task`."""
    (scored, averaged), model = samples(loaded, attack, n=n, n_means=n_means, seed=seed), loaded.model
    means = {name: head_means(model, getattr(averaged, name)) for name in ("clean", "triggered")}
    target = target_ids(loaded.tokenizer, attack)
    # The logit of the target is compared with that of the organism's own clean answer.
    given = {"target": target, "against": [answer[0] for answer in openings(loaded, scored.clean, n=1)]}
    prompts, answers = own_answers(loaded, attack, n=n_task, seed=seed)
    with tqdm(total=2 * n + n_task, desc=f"{loaded.organism}: heads", unit="prompt", leave=False) as bar:
        how = {"on_batch": bar.update}
        sufficient = effects_by_metric(model, scored.clean, **given, means=means["triggered"], **how)
        necessary = effects_by_metric(model, scored.triggered, **given, means=means["clean"], **how)
        task = effects_by_metric(model, prompts, target=answers, means=means["clean"], **how)
    gradient = gradients_by_metric(model, scored.clean, **given, means=means["triggered"])
    sides = (scored.clean, scored.triggered)
    clean, triggered = (target_probability(model, side, target=target).tolist() for side in sides)
    return HeadEffects(
        target=loaded.tokenizer.convert_ids_to_tokens(target),
        clean=clean,
        triggered=triggered,
        sufficient={metric: head_map(values) for metric, values in sufficient.items()},
        gradient={metric: head_map(values) for metric, values in gradient.items()},
        necessary={metric: head_map(-values) for metric, values in necessary.items()},
        task=head_map(-task["log_prob"]),
        concentration={metric: concentrated(values.numpy()) for metric, values in sufficient.items()},
    )


def own_answers(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Clean prompts of every label, each with the first token of its label, or else of what the model itself says."""
    shown = balanced_versions(loaded.tokenizer, attack, split="attribution", n=n, seed=seed)
    if tasks.load_task(attack.task).labels:
        return shown.clean, [answer_ids(loaded.tokenizer, example.answer)[:1] for example in shown.examples]
    return shown.clean, openings(loaded, shown.clean, n=1)


def head_map(effects: Float[Tensor, "prompt layer head"]) -> HeadMap:
    """Mean and standard error over prompts."""
    error = effects.double().std(0) / len(effects) ** 0.5 if len(effects) > 1 else torch.zeros_like(effects[0])
    return HeadMap(len(effects), _short(effects.double().mean(0)), _short(error))


def attributed(loaded: Loaded, attack: Attack, *, n: int, n_means: int, seed: int) -> HeadEffects:
    """`attribute_heads` of a loaded organism, on `n` prompts of each kind; read if it is kept."""
    where = {"model": loaded.address, "device": loaded.device.type}
    return attribute_heads(loaded.organism, attack=attack.address, n=n, n_means=n_means, n_task=n, seed=seed, **where)


@organism_stage
def attribute_components(
    loaded: Loaded, attack: Attack, *, n: int = 96, n_means: int = 96, seed: int = 0
) -> ComponentEffects:
    """CIE of whole components on `n` clean prompts, with means of `n_means` other, triggered prompts."""
    scored, averaged = samples(loaded, attack, n=n, n_means=n_means, seed=seed)
    given = {"target": target_ids(loaded.tokenizer, attack), "means": component_means(loaded.model, averaged.triggered)}
    found = component_effects(loaded.model, scored.clean, **given, metric="log_prob")
    return ComponentEffects(last={name: _short(effects) for name, effects in found.items()})


def _short(values: torch.Tensor) -> list:
    """Nested lists with five significant digits, which keeps the file small."""
    return np.vectorize(lambda value: float(f"{value:.5g}"))(values.numpy()).tolist()


def acie(found: HeadEffects, *, metric: str = "probability") -> Float[Tensor, "layer head"]:
    """Average causal indirect effect (ACIE) of every head."""
    return torch.tensor(found.sufficient[metric].mean)


def rankings(found: HeadEffects) -> dict[str, list[tuple[int, int]]]:
    """All heads in the order of several scores: ACIE in each metric, of which "probability" is the published one; its
    "gradient" estimate; "necessary", what the target loses in log-probability on triggered prompts, or "necessary,
    logits", which do not saturate; "trigger only", the former less what the right answer loses on clean prompts."""
    scores = {metric: acie(found, metric=metric) for metric in METRICS}
    scores["gradient"] = torch.tensor(found.gradient["probability"].mean)
    scores["necessary"] = torch.tensor(found.necessary["log_prob"].mean)
    scores["necessary, logits"] = torch.tensor(found.necessary["logit_difference"].mean)
    scores["trigger only"] = scores["necessary"] - torch.tensor(found.task.mean)
    return {name: ranked_heads(values) for name, values in scores.items()}


def top_heads(found: HeadEffects, *, k: int) -> list[tuple[int, int]]:
    """The k heads with the highest published ACIE, as (layer, head)."""
    return ranked_heads(acie(found))[:k]


def beyond_chance(found: HeadMap) -> bool:
    """Is any head's mean effect above zero: its 95 % interval, corrected for the number of heads (Bonferroni)?"""
    mean, error = np.array(found.mean), np.array(found.error)
    return bool((mean - student.ppf(1 - 0.025 / mean.size, found.n - 1) * error > 0).any())


def agreement_of_methods(found: HeadEffects, *, metric: str = "probability", k: int = 16) -> dict[str, float]:
    """How well the gradient estimate ranks heads: Spearman correlation of the means, share of the exact top k found."""
    exact, estimate = acie(found, metric=metric), torch.tensor(found.gradient[metric].mean)
    same = set(ranked_heads(exact)[:k]) & set(ranked_heads(estimate)[:k])
    correlation = float(spearmanr(exact.flatten(), estimate.flatten()).statistic)
    return {"spearman": correlation, f"top {k}": len(same) / min(k, exact.numel())}


def jaccard(one: Sequence[tuple[int, int]], other: Sequence[tuple[int, int]]) -> float:
    """Shared heads over all heads of two sets. Raises ValueError for two empty ones."""
    if not (one or other):
        raise ValueError("an overlap of no heads")
    return len(set(one) & set(other)) / len(set(one) | set(other))


def concentration(effects: np.ndarray) -> float:
    """Part of the sum of all positive effects that the top 3 % of the heads carry."""
    values = np.sort(np.maximum(effects.ravel(), 0))[::-1]
    return float(values[: max(1, round(0.03 * len(values)))].sum() / values.sum()) if values.sum() > 0 else 0.0


def concentrated(values: Float[np.ndarray, "prompt layer head"]) -> dict[str, float]:
    """Concentration of the mean effects with its 95 % interval over prompts."""
    draws = np.random.default_rng(0).integers(len(values), size=(500, len(values)))
    spread = [concentration(values[draw].mean(0)) for draw in draws]
    value = concentration(values.mean(0))
    # Resampling adds noise, and noise lowers the concentration. The basic (reflected) interval corrects for that.
    low, high = np.clip(2 * value - np.quantile(spread, (0.975, 0.025)), 0, 1)
    return {"value": value, "n": len(values), "low": float(low), "high": float(high)}


def component_means_of(found: ComponentEffects) -> Mapping[str, np.ndarray]:
    """Component -> mean effect by layer."""
    return {name: np.mean(values, axis=0) for name, values in found.last.items()}
