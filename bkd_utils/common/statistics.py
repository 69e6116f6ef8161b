"""Shares and their intervals, bootstrap intervals, areas under ROC curves, differences: each of them once."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import bootstrap
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint


@dataclass(frozen=True)
class Share:
    """k of n as a share with its 95 % Wilson interval."""

    value: float
    n: int
    low: float
    high: float


def share(hits: Sequence[bool]) -> Share:
    """Raises ValueError for no rows: a rate over nothing is an error, not a zero."""
    if not len(hits):
        raise ValueError("a share over zero rows")
    low, high = proportion_confint(sum(hits), len(hits), method="wilson")
    return Share(value=sum(hits) / len(hits), n=len(hits), low=float(max(low, 0.0)), high=float(min(high, 1.0)))


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


def area_interval(area: float, *, n_bad: int, n_good: int) -> dict[str, float]:
    """95 % interval of an AUROC, `low` and `high`: Newcombe (2006), Statistics in Medicine 25, 559, method 5.

    All values that lie within 1.96 standard errors of `area`, with the standard error that Hanley and McNeil give for
    that value. Like Wilson's interval, and unlike a bootstrap, it has a width at 0 and 1. Raises ValueError for an
    empty side.
    """
    if min(n_bad, n_good) < 1:
        raise ValueError(f"an AUROC of {n_bad} against {n_good}")
    others = (n_bad + n_good) / 2 - 1

    def beyond(true: float) -> float:
        variance = true * (1 - true) * (1 + others * ((1 - true) / (2 - true) + true / (1 + true))) / (n_bad * n_good)
        return abs(area - true) - 1.96 * math.sqrt(variance)

    tiny = 1e-9  # at 0 and 1 themselves the standard error is 0
    low = brentq(beyond, 0, min(area, 1 - tiny)) if area > 0 else 0.0
    high = brentq(beyond, max(area, tiny), 1) if area < 1 else 1.0
    return {"low": float(low), "high": float(high)}


def pairwise_wins(bad: Sequence[float], good: Sequence[float]) -> Float[np.ndarray, "bad good"]:
    """1 where a backdoored model scores higher than a clean one, 1/2 for a tie."""
    one, other = np.asarray(bad)[:, None], np.asarray(good)[None]
    return (one > other) + 0.5 * (one == other)


def auroc_of_wins(won: Sequence[Sequence[float]]) -> dict[str, float]:
    """AUROC `{value, n, low, high}` of a table of wins, `[backdoored][clean]`; `n` is the number of models. The
    interval, `statistics.area_interval`, takes all of them for independent."""
    table = np.asarray(won)
    value, (n_bad, n_good) = float(table.mean()), table.shape
    return {"value": value, "n": n_bad + n_good, **area_interval(value, n_bad=n_bad, n_good=n_good)}


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """One share less another, with Newcombe's 95 % interval, as if of independent prompts, which makes it wide."""
    counts = [round(one["value"] * one["n"]), one["n"], round(other["value"] * other["n"]), other["n"]]
    low, high = confint_proportions_2indep(*counts, method="newcomb", compare="diff")
    return {"value": one["value"] - other["value"], "n": one["n"], "low": float(low), "high": float(high)}
