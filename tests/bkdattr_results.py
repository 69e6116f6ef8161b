"""Hand-made results of notebooks 02 to 04."""

import numpy as np

from bkd_utils.common.statistics import counted
from bkd_utils.experiments.head_ablation import Ablation, Route
from bkd_utils.experiments.head_attribution import METRICS, HeadEffects, HeadMap

N = 200


def head_map(mean, *, error=1e-6, n=96):
    """Effects of all heads, `[layer][head]`, each with the same standard error."""
    mean = np.array(mean, float)
    return HeadMap(n, mean.tolist(), np.full(mean.shape, error).tolist())


def effects(
    sufficient, *, gradient=None, necessary=None, task=None, error=1e-6, n=96, concentration=None, target=(), **shown
):
    """A result of `attribute_heads`. Effects are `[layer][head]` for all metrics, or by metric; those that are not
    given are those that are sufficient."""

    def maps(given):
        given = given if isinstance(given, dict) else dict.fromkeys(METRICS, given)
        return {metric: head_map(mean, error=error, n=n) for metric, mean in given.items()}

    given = {"clean": [0.0], "triggered": [1.0]} | shown
    one = {"value": 0.9, "n": n, "low": 0.85, "high": 0.95}
    first = next(iter(sufficient.values())) if isinstance(sufficient, dict) else sufficient
    return HeadEffects(
        target=list(target),
        **given,
        sufficient=maps(sufficient),
        gradient=maps(sufficient if gradient is None else gradient),
        necessary=maps(sufficient if necessary is None else necessary),
        task=head_map(np.zeros_like(np.array(first, float)) if task is None else task, error=error, n=n),
        concentration=dict.fromkeys(METRICS, one) | (concentration or {}),
    )


def hits(value, n=N):
    """A share of `n` prompts, of which the first ones hit."""
    return counted([i < round(value * n) for i in range(n)])


def ablated(ranking, kind, k, asr, *, right=0.5, utility=0.9, perplexity=2.0, draw=0, n=N):
    """A row of `ablation_curves`; shares are values or made already."""
    shares = {"asr": asr, "right": right, "utility": utility}
    shares = {name: one if isinstance(one, dict) else hits(one, n) for name, one in shares.items()}
    return Ablation(ranking=ranking, kind=kind, k=k, draw=draw, **shares, perplexity=perplexity)


def route(name, layers, asr, *, n=48):
    """A row of `trigger_routes`."""
    return Route(name, list(layers), asr=hits(asr, n), log_prob={"value": -1.0, "n": n, "low": -2.0, "high": 0.0})
