"""Shares, means, areas under ROC curves (AUROC) and differences, each with its 95 % interval."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import brentq
from scipy.stats import bootstrap, t
from statsmodels.stats.proportion import proportion_confint


def wilson(hits: float, n: float) -> tuple[float, float]:
    """95 % Wilson interval of a share; `hits` may be a fraction, such as a mean over draws."""
    low, high = proportion_confint(hits, n, method="wilson")
    return float(max(low, 0.0)), float(min(high, 1.0))


def without_interval(value: float, *, n: int) -> dict:
    """A number without an interval, because its spread is not known."""
    return {"value": float(value), "n": n, "low": None, "high": None}


def over_splits(
    values: Float[np.ndarray, "split ..."], *, statistic: Callable[[np.ndarray], float] = np.mean, ratio: float = 1.0
) -> dict:
    """A statistic of `n` splits with its approximate 95 % interval. Student's t with a jackknife standard error,
    leaving out one split at a time. Splits of the same prompts overlap, so the variance is multiplied by 1 + n *
    `ratio`, where `ratio` is test prompts over training prompts (Nadeau and Bengio 2003, Machine Learning 52, 239;
    derived for a mean, an approximation for anything else) and 0 for independent draws. There is no interval for fewer
    than two splits, or if leaving any of them out changes nothing."""
    values = np.asarray(values, dtype=float)
    n, value = len(values), float(statistic(values))
    if n < 2:
        return without_interval(value, n=n)
    left = np.array([statistic(np.delete(values, split, axis=0)) for split in range(n)])
    error = math.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum() * (1 + n * ratio))
    if error < 1e-12:
        return without_interval(value, n=n)
    half = float(t.ppf(0.975, n - 1)) * error
    return {"value": value, "n": n, "low": value - half, "high": value + half}


def share_over_splits(shares: Sequence[float], *, n_prompts: int) -> dict:
    """Mean of one share per split; its interval covers that of `over_splits` and Wilson's for the `n` prompts."""
    found = over_splits(np.asarray(shares))
    low, high = wilson(found["value"] * n_prompts, n_prompts)
    if found["low"] is not None:
        low, high = max(0.0, min(low, found["low"])), min(1.0, max(high, found["high"]))
    return {"value": found["value"], "n": n_prompts, "low": low, "high": high}


def independent_difference(one: Mapping[str, float], other: Mapping[str, float]) -> dict:
    """One number minus another of other prompts; the distances to the ends of the intervals are squared and added. For
    shares with Wilson intervals this is Newcombe's interval for independent samples (1998, Statistics in Medicine 17,
    873, method 10). For the same prompts it is too wide, which can only leave a verdict undecided."""
    value = one["value"] - other["value"]
    down = math.hypot(one["value"] - one["low"], other["high"] - other["value"])
    up = math.hypot(one["high"] - one["value"], other["value"] - other["low"])
    return {"value": value, "n": min(one["n"], other["n"]), "low": value - down, "high": value + up}


def independent_ratio(one: Mapping[str, float], other: Mapping[str, float]) -> dict:
    """One share divided by another of other prompts. The interval is MOVER-R (Donner and Zou 2012, Statistical Methods
    in Medical Research 21, 347). There is none if the interval of `other` reaches up to twice its value."""
    a, b = one["value"], other["value"]
    if not b or other["high"] >= 2 * b:
        return without_interval(a / b if b else 0.0, n=one["n"])

    def limit(near: float, far: float, sign: int) -> float:
        scale = far * (2 * b - far)
        inside = (a * b) ** 2 - near * (2 * a - near) * scale
        return (a * b + sign * math.sqrt(max(inside, 0.0))) / scale

    low, high = limit(one["low"], other["high"], -1), limit(one["high"], other["low"], 1)
    return {"value": a / b, "n": one["n"], "low": max(low, 0.0), "high": high}


def relative_drop(before: Mapping[str, float], after: Mapping[str, float]) -> dict:
    """Relative loss of a share, `1 - after / before`, over the same prompts; `n` is the number of hits before. The
    interval is Wilson's for lost hits among these, as if no miss became a hit. Without a hit before there is none."""
    hits = before["value"] * before["n"]
    if not hits:
        return without_interval(0.0, n=0)
    value = 1 - after["value"] / before["value"]
    low, high = wilson(max(value, 0.0) * hits, hits)
    return {"value": value, "n": round(hits), "low": min(low, value), "high": high}


def mean_by_prompt(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of several draws for each prompt, keyed by its uid. Raises ValueError if the draws differ in prompts."""
    for draw in draws[1:]:
        same_prompts(draws[0], draw)
    return {uid: float(np.mean([draw[uid] for draw in draws])) for uid in draws[0]}


def same_prompts(one: Mapping[str, float], other: Mapping[str, float]) -> None:
    """Raises ValueError, with the first uids that differ, unless both sides have the same prompts and at least one."""
    if not one:
        raise ValueError("a paired difference needs at least one prompt")
    if lone := sorted(map(str, one.keys() ^ other.keys())):
        raise ValueError(f"not the same prompts: {len(lone)} are on one side only, such as {', '.join(lone[:3])}")


def share(hits: Sequence[bool]) -> dict[str, Any]:
    """Share of hits, `{value, n, low, high}`, with its 95 % Wilson interval. Raises ValueError for no rows."""
    if not len(hits):
        raise ValueError("a share needs at least one row")
    low, high = wilson(sum(hits), len(hits))
    return {"value": sum(hits) / len(hits), "n": len(hits), "low": low, "high": high}


def counted(hits: Sequence[bool]) -> dict[str, Any]:
    """`share` with the outcomes behind it, one per row in the order of the rows, as `by_prompt`."""
    return share(hits) | {"by_prompt": [int(hit) for hit in hits]}


def averaged(values: Sequence[float]) -> dict[str, Any]:
    """`interval` with the values behind it, to six digits, as `by_prompt`."""
    return {**interval(values), "by_prompt": [float(f"{value:.6g}") for value in values]}


def interval(values: Sequence[float], *, seed: int = 0, n_resamples: int = 2000) -> dict[str, float]:
    """Mean of some values with its 95 % percentile-bootstrap interval. Raises ValueError for no values."""
    values = np.asarray(values, dtype=float)
    if not len(values):
        raise ValueError("an interval needs at least one value")
    value, rng = float(np.mean(values)), np.random.default_rng(seed)
    if len(values) < 2 or np.ptp(values) == 0:
        return {"value": value, "n": len(values), "low": value, "high": value}
    drawn = bootstrap((values,), np.mean, method="percentile", n_resamples=n_resamples, rng=rng).confidence_interval
    return {"value": value, "n": len(values), "low": float(drawn.low), "high": float(drawn.high)}


def area_interval(area: float, *, n_bad: int, n_good: int) -> dict[str, float]:
    """95 % interval of an AUROC, `low` and `high`: Newcombe (2006), Statistics in Medicine 25, 559, method 5. It holds
    all values within 1.96 of their own standard errors, by Hanley and McNeil, of `area`. Unlike a bootstrap interval it
    has a width at 0 and 1. Raises ValueError for no models on a side."""
    if min(n_bad, n_good) < 1:
        raise ValueError(f"an AUROC needs models on both sides, got {n_bad} and {n_good}")
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
    """AUROC of a table of wins, `[backdoored][clean]`; `n` is the number of models, which count as independent."""
    table = np.asarray(won)
    value, (n_bad, n_good) = float(table.mean()), table.shape
    return {"value": value, "n": n_bad + n_good, **area_interval(value, n_bad=n_bad, n_good=n_good)}


def difference(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """One share minus another over the same prompts, with its paired 95 % interval. The interval is Newcombe's (1998,
    Statistics in Medicine 17, 2635, method 10): the distances to the ends of the two Wilson intervals are squared and
    added, and reduced by the correlation phi of the two sides, which is corrected where it is positive. Both arguments
    map a prompt's uid to 0 or 1, or to a mean over draws, for which the interval is rather too wide. Raises ValueError
    unless both sides have the same prompts."""
    same_prompts(one, other)
    n = len(one)
    x, y = np.array([[one[uid], other[uid]] for uid in one], dtype=float).T
    p, q = float(x.mean()), float(y.mean())
    (low_p, high_p), (low_q, high_q) = wilson(x.sum(), n), wilson(y.sum(), n)
    scale = math.sqrt(p * (1 - p) * q * (1 - q))
    together = float((x * y).mean()) - p * q
    together = max(together - 1 / (2 * n), 0.0) if together > 0 else together
    phi = together / scale if scale > 0 else 0.0

    def distance(a: float, b: float) -> float:
        return math.sqrt(max(a * a - 2 * phi * a * b + b * b, 0.0))

    down, up = distance(p - low_p, high_q - q), distance(high_p - p, q - low_q)
    return {"value": p - q, "n": n, "low": p - q - down, "high": p - q + up}


def difference_of_counted(one: Mapping, other: Mapping) -> dict[str, float]:
    """`difference` of two results of `counted` or `averaged` over the same prompts in the same order."""
    return difference(*(dict(enumerate(side["by_prompt"])) for side in (one, other)))
