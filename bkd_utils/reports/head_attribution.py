"""Notebook 03: pictures and tables of effects of heads and components."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.common.statistics import interval
from bkd_utils.experiments.head_attribution import (
    ComponentEffects,
    HeadEffects,
    acie,
    agreement_of_methods,
    beyond_chance,
    rankings,
)
from bkd_utils.reports.style import COLOURS, DIVERGING, INTERVAL, band, explain, heat_map, panels, sizes

# Component -> colour and line. Attention has the colour of the heads that it is made of.
PARTS = {"attention": ("ACIE", "-"), "MLP": ("neutral", "--")}
UNITS = {"probability": "probability", "log_prob": "nats", "logit_difference": "nats"}


def head_maps(found: Mapping[str, Mapping[str, HeadEffects]], *, few: int, metrics: Sequence[str]) -> Figure:
    """ACIE `[layer, head]` per organism (columns), kind and metric (rows with one scale), layer 0 at the bottom. Dots
    mark the `few` highest heads; a panel in which no head is above zero beyond chance says so."""
    rows = [(kind, metric) for kind in found for metric in metrics]
    figure, axes = panels(list(next(iter(found.values()))), rows=len(rows), height=2.0)
    for row, (kind, metric) in zip(axes, rows, strict=True):
        values = {name: acie(one, metric=metric).numpy() for name, one in found[kind].items()}
        bound = max(np.abs(one).max() for one in values.values())
        for panel, (name, effects) in zip(row, values.items(), strict=True):
            layers, heads = (range(size) for size in effects.shape)
            mesh = heat_map(panel, effects, vmin=-bound, vmax=bound, rows=layers, columns=heads, cmap=DIVERGING)
            top = np.unravel_index(np.argsort(effects, axis=None)[-few:], effects.shape)
            label = f"{few} highest ({few / effects.size:.0%})"
            panel.plot(top[1] + 0.5, top[0] + 0.5, ".", ms=3, color=COLOURS["neutral"], label=label)
            noise = "" if beyond_chance(found[kind][name].sufficient[metric]) else ", chance"
            panel.set_xlabel(f"highest: {effects.max():.2g}{noise}", fontsize="x-small")
        figure.colorbar(mesh, ax=row, label=f"ACIE\n({UNITS[metric]})", shrink=0.9)
    left = [f"{kind},\n{metric.replace('_', '-')}\nlayer" for kind, metric in rows]
    counts = sizes({"n": one.sufficient[metrics[0]].n} for maps in found.values() for one in maps.values())
    explain(axes, f"head ({counts} prompts)", *left, ncols=1)
    return figure


def readout(found: Mapping[str, Mapping[str, HeadEffects]], *, few: int) -> Figure:
    """One dot per head: what the target gains from its triggered mean against what the right answer loses by its clean
    mean. Marked are the `few` heads of highest ACIE, and those that the trigger needs more than the task does."""
    figure, axes = panels(list(next(iter(found.values()))), rows=len(found), height=1.9, sharex=False, sharey=False)
    for row, maps in zip(axes, found.values(), strict=True):
        for panel, one in zip(row, maps.values(), strict=True):
            x, y = np.array(one.task.mean), acie(one, metric="log_prob").numpy()
            orders = rankings(one)
            panel.plot(x.ravel(), y.ravel(), ".", ms=2.5, color=COLOURS["random"], label="all heads")
            for name, label, look in (
                ("probability", f"{few} of highest ACIE", {"marker": "o", "color": COLOURS["ACIE"]}),
                ("trigger only", f"{few} needed by the trigger only", {"marker": "x", "color": COLOURS["neutral"]}),
            ):
                chosen = tuple(np.array(orders[name][:few]).T)
                panel.plot(x[chosen], y[chosen], ls="", ms=4, mfc="none", label=label, **look)
    rests = sizes(
        {"n": part.n} for m in found.values() for one in m.values() for part in (one.task, one.sufficient["log_prob"])
    )
    below = f"right answer's loss on clean prompts without the head (nats; {rests} prompts)"
    explain(axes, below, *(f"{kind}\nACIE (nats)" for kind in found))
    return figure


def components(found: Mapping[str, Mapping[str, ComponentEffects]]) -> Figure:
    """Effects of whole attention and MLP layers at the last prompt token with 95 % intervals; rows are kinds of
    organisms. The shaded layers, the last tenth, read the answer out and are not judged."""
    figure, axes = panels(list(next(iter(found.values()))), rows=len(found), height=2.0, sharey=False)
    drawn = []
    for row, results in zip(axes, found.values(), strict=True):
        for panel, result in zip(row, results.values(), strict=True):
            for name, (colour, style) in PARTS.items():
                rows = [interval(column, n_resamples=400) for column in np.array(result.last[name]).T]
                lines = [[one[key] for one in rows] for key in ("value", "low", "high")]
                band(panel, range(len(rows)), lines, colour=colour, label=name, ls=style)
                drawn += rows
            panel.axvspan(judged_layers(len(rows)) - 0.5, len(rows) - 0.5, color=COLOURS["pale"], lw=0, zorder=0)
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    left = [f"{kind}\neffect (nats)" for kind in found]
    explain(axes, f"layer ({sizes(drawn)} prompts)", *left, bands=[INTERVAL])
    return figure


def judged_layers(n_layers: int) -> int:
    """Number of layers that a comparison of components judges: all but the last tenth."""
    return n_layers - max(1, round(n_layers / 10))


def what_there_is(found: Mapping[str, HeadEffects]) -> pd.DataFrame:
    """By organism: the target, its probability without and with the trigger, the highest ACIE by metric (in brackets if
    by chance), how many of the 16 highest two metrics share, and how well the gradient ranks the heads (Spearman)."""
    rows = {}
    for name, result in found.items():
        chances = {"clean": np.mean(result.clean), "triggered": np.mean(result.triggered)}
        rows[name] = {"target": "".join(result.target).replace("Ġ", " ").strip()}
        rows[name] |= {f"P(target), {version}": f"{chance:.3f}" for version, chance in chances.items()}
        for metric, one in result.sufficient.items():
            highest = f"{acie(result, metric=metric).max().item():.2g}"
            rows[name][f"highest, {metric}"] = highest if beyond_chance(one) else f"({highest})"
        order = rankings(result)
        rows[name]["top 16 shared"] = len(set(order["probability"][:16]) & set(order["log_prob"][:16]))
        rows[name]["gradient"] = f"{agreement_of_methods(result)['spearman']:.2f}"
    return pd.DataFrame(rows).T.rename_axis("organism")
