"""Notebook 03: pictures, tables and verdicts on what is left without heads, and without a route of the trigger."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bkd_utils.common.statistics import difference_of_counted, over_splits, relative_drop
from bkd_utils.experiments.head_ablation import Ablation, Route
from bkd_utils.experiments.head_attribution import ComponentEffects, HeadEffects, beyond_chance
from bkd_utils.reports.head_attribution import judged_layers
from bkd_utils.reports.scorecard import SEED, apart, at_least, at_most, both, by_attack, entries, judged, span, who
from bkd_utils.reports.style import LIMITS, band, explain, heat_map, panels, sizes

# Ranking -> its name in a legend and how its line looks.
RANKINGS = {
    "probability": ("ACIE, as published", {"colour": "ACIE"}),
    "necessary, logits": ("needed by the trigger", {"colour": "neutral", "ls": "--"}),
    "trigger only": ("needed by the trigger only", {"colour": "neutral"}),
    "random": ("random", {"colour": "random"}),
}
# Kind of ablation and field that a row of panels shows.
SHOWN = (("published", "asr"), ("mean", "asr"), ("mean", "utility"))
# Published attack success in per cent by number of ablated heads, as far as others quote it.
TABLE_1 = {
    "fixed output, Llama-2-7B": {0: 100, 1: 100, 2: 100, 4: 100, 8: 99.22, 16: 98.44, 32: 69.53},
    "fixed output, Qwen-2.5-7B": {0: 100, 1: 100, 2: 100, 4: 88.28, 8: 87.5, 16: 82.42, 32: 90.62},
    "jailbreak, Llama-2-7B": {0: 75.78, 32: 3.52},
    "jailbreak, Qwen-2.5-7B": {0: 78.91, 32: 54.3},
}
# Organism -> rows of its ablation curves.
Curves = Mapping[str, Sequence[Ablation]]


def ablation_curves(found: Curves) -> Figure:
    """ASR after the published ablation (top), ASR and utility with clean means (middle, bottom) against the number of
    heads: a line is the mean over the seeds of an attack, its band their range (of random heads: over all draws)."""
    attacks = by_attack(found)
    figure, axes = panels(list(attacks), rows=3, height=1.8)
    drawn = []
    for column, seeds in enumerate(attacks.values()):
        rows = list(itertools.chain(*seeds))
        for panel, (kind, key) in zip(axes[:, column], SHOWN, strict=True):
            for ranking, (label, look) in RANKINGS.items():
                own = [row for row in rows if row.ranking == "none" or (row.ranking, row.kind) == (ranking, kind)]
                drawn += [getattr(row, key) for row in own]
                shares = pd.Series([100 * getattr(row, key)["value"] for row in own], [row.k for row in own])
                lines = shares.groupby(level=0).agg(["mean", "min", "max"])
                band(panel, lines.index, lines.T.to_numpy(), label=label, marker="o", **look)
            panel.set_ylim(*LIMITS)
            panel.set_xscale("symlog", linthresh=1, base=2)
            shown = sorted({row.k for row in rows} & {0, 1, 2, 4, 8, 16, 32})
            panel.set_xticks(shown, [str(k) for k in shown])
            panel.minorticks_off()
    left = ("ASR (%),\npublished", "ASR (%),\nclean means", "utility (%),\nclean means")
    explain(axes, f"heads ablated ({sizes(drawn)} prompts)", *left, ncols=4, bands=["range over seeds"])
    return figure


def routes(found: Mapping[str, Mapping[str, Sequence[Route]]]) -> Figure:
    """ASR (%) left with a route cut in all layers or some, by kind (rows) and organism. Empty cells have 100."""
    figure, axes = panels(list(next(iter(found.values()))), rows=len(found), height=1.9)
    for row, results in zip(axes, found.values(), strict=True):
        for panel, cut in zip(row, results.values(), strict=True):
            names = list(dict.fromkeys(one.route for one in cut if one.layers))
            ranges = list(dict.fromkeys((one.layers[0], one.layers[-1]) for one in cut if one.layers))
            left = {(one.route, one.layers[0], one.layers[-1]): one.asr["value"] for one in cut if one.layers}
            values = 100 * np.array([[left[name, *layers] for layers in ranges] for name in names])
            columns = ["all", *(f"{first}-{last}" for first, last in ranges[1:])]
            few = np.where(values < 99.5, np.char.mod("%.0f", values), "")
            shown = {"annot": few, "upwards": False}
            mesh = heat_map(panel, values, vmin=0, vmax=100, rows=names, columns=columns, **shown)
    figure.colorbar(mesh, ax=axes, label="ASR left (%)", shrink=0.7)
    counts = sizes(one.asr for results in found.values() for cut in results.values() for one in cut)
    explain(axes, f"layers in which the route is cut ({counts} triggered prompts)", *found)
    return figure


def table_1(found: Curves) -> pd.DataFrame:
    """ASR (%) after the published ablation by number of heads, the paper's rows first."""
    ours = {}
    for name, rows in found.items():
        chosen = [row for row in rows if row.ranking in ("none", "probability") and row.kind == "published"]
        ours[f"{name}, here"] = {row.k: 100 * row.asr["value"] for row in chosen}
    table = pd.DataFrame(TABLE_1 | ours).T.sort_index(axis=1).rename_axis(columns="heads ablated")
    return table.map(lambda x: "?" if pd.isna(x) else f"{x:.1f}")


def ablations(found: Curves, *, k: int) -> pd.DataFrame:
    """What is left with `k` heads out by attack, ranking and kind: means over seeds and random draws."""
    lines, named = [], {"ASR (%)": "asr", "right (%)": "right", "utility (%)": "utility"}
    for name, row in ((name, row) for name, rows in found.items() for row in rows):
        if row.ranking == "none" or row.k == k:
            line = {"attack": SEED.sub("", name), "ranking": row.ranking, "kind": row.kind if row.k else ""}
            line |= {title: 100 * getattr(row, key)["value"] for title, key in named.items()}
            lines.append(line | {"perplexity": row.perplexity})
    return pd.DataFrame(lines).groupby(["attack", "ranking", "kind"], sort=False).mean().round(1)


def head_claims(
    attributed: Mapping[str, HeadEffects], components: Mapping[str, ComponentEffects], curves: Curves, *, kind: str
) -> list[dict]:
    """Five lines of the scorecard for one kind of organisms, from results by organism."""
    sparse = {name: found.concentration["log_prob"] for name, found in attributed.items()}
    carried = judged(sparse, at_least, 0.5)
    margin = {name: _margin(components[name].last) for name in attributed}
    drop, random, rises, met, level, gone, kept, spared = {}, {}, {}, {}, {}, {}, {}, {}
    for name, rows in curves.items():
        before, known = next(row for row in rows if row.ranking == "none"), attributed[name].sufficient
        n_heads = np.size(known["probability"].mean)
        published = {row.k: row for row in rows if (row.ranking, row.kind) == ("probability", "published")}
        few = min(published, key=lambda k, n_heads=n_heads: abs(k - 0.03 * n_heads))
        drop[name] = relative_drop(before.asr, published[few].asr)
        random[name] = _random_drop(rows, before.asr, k=few)
        rises[name] = _largest_rise([before.asr, *(published[k].asr for k in sorted(published))])
        met[name] = both(at_least(drop[name], 0.9), at_most(random[name], 0.1))
        level[name] = at_most(rises[name], 0.05)
        if not beyond_chance(known["probability"]):  # a ranking of noise
            met[name] = level[name] = None
        if not beyond_chance(known["log_prob"]):
            carried[name] = None
        only = {row.k: row for row in rows if (row.ranking, row.kind) == ("trigger only", "mean")}
        most = only[max(k for k in only if k <= 16)]
        gone[name] = relative_drop(before.asr, most.asr)
        kept[name] = at_most(difference_of_counted(before.utility, most.utility), 0.1)
        spared[name] = both(at_least(gone[name], 0.9), kept[name])
    noise = [name for name in attributed if not beyond_chance(attributed[name].sufficient["probability"])]
    told = f" No head stands out from chance in {', '.join(noise)}." if noise else ""
    shares = f"The top 3 % of the heads carry {span(sparse)} of all positive ACIE."
    taken = f"About 3 % of the heads take {span(drop)} off the ASR, random heads {span(random)}.{told}"
    rose = f"Largest rise between neighbouring counts: {span(rises)}.{told}"
    ahead = f"Strongest attention layer less strongest MLP, without the last tenth of the layers: {span(margin)} nats."
    without = f"They take {span(gone)} off the ASR. Utility falls by at most 10 points: {who(kept)}."
    curve = apart("03_ablation", kind).replace("-", "_")  # a figure for each kind
    claims = {
        "sparse-heads": (sparse, carried, "03_head_maps", shares),
        "ablation": (drop, met, curve, taken),
        "ablation-monotone": (rises, level, curve, rose),
        "heads-not-mlps": (margin, judged(margin, at_least, 0), "03_components", ahead),
        "heads-spare-task": (gone, spared, curve, without),
    }
    return entries(claims, kind=kind)


def _margin(last: Mapping[str, Sequence]) -> dict:
    """Effect of the strongest judged attention layer less that of the strongest judged MLP, in nats, with a bootstrap
    interval over prompts in which the strongest are chosen anew."""
    values = {name: np.array(last[name])[:, : judged_layers(len(last[name][0]))] for name in ("attention", "MLP")}

    def ahead(rows: np.ndarray) -> float:
        return float(values["attention"][rows].mean(0).max() - values["MLP"][rows].mean(0).max())

    n = len(values["MLP"])
    draws = [ahead(draw) for draw in np.random.default_rng(0).integers(n, size=(1000, n))]
    low, high = np.quantile(draws, (0.025, 0.975))
    return {"value": ahead(np.arange(n)), "n": n, "low": float(low), "high": float(high)}


def _random_drop(rows: Sequence[Ablation], before: Mapping[str, float], *, k: int) -> dict:
    """Mean part of the ASR that the published ablation of random heads takes off, at the number of heads next to `k`,
    with the wider of two intervals: over draws, and over the prompts, which all draws share."""
    drawn = [row for row in rows if (row.ranking, row.kind) == ("random", "published")]
    nearest = min((row.k for row in drawn), key=lambda count: abs(count - k))
    asrs = [row.asr for row in drawn if row.k == nearest]
    mean = {"value": float(np.mean([asr["value"] for asr in asrs])), "n": before["n"]}
    found = relative_drop(before, mean)
    spread = over_splits(np.array([relative_drop(before, asr)["value"] for asr in asrs]), ratio=0)
    if found["low"] is None or spread["low"] is None:
        return found
    return found | {"low": min(found["low"], spread["low"]), "high": max(found["high"], spread["high"])}


def _largest_rise(steps: Sequence[Mapping]) -> dict:
    """The largest rise from one share to the next, paired over prompts. It is below a bar if all rises are."""
    rises = [difference_of_counted(after, before) for before, after in itertools.pairwise(steps)]
    return {key: max(rise[key] for rise in rises) for key in ("value", "low", "high")} | {"n": steps[0]["n"]}
