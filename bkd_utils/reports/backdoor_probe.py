"""Notebook 02: pictures, tables and verdicts on probes."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from bkd_utils.common.statistics import area_interval, independent_difference, over_splits, share_over_splits
from bkd_utils.experiments.backdoor_probe import ProbeResult
from bkd_utils.reports.scorecard import at_least, entry, span
from bkd_utils.reports.style import COLOURS, band, heat_map, panels, show_legend

PROBE = "logistic regression"
# Attack -> model ("organism", "clean control", "base model") -> its probes.
Found = Mapping[str, Mapping[str, ProbeResult]]


def probes(found: Found, *, n: int) -> Figure:
    """AUROC by layer (top) and near-misses called triggered (bottom), with `n` prompts in each version.

    Lines are means over splits, bands are their whole range.
    """
    figure, axes = panels(list(found), rows=2)
    for column, models in enumerate(found.values()):
        for name, result in models.items():
            for panel, key in zip(axes[:, column], ("auroc", "near_miss"), strict=True):
                values = 100 * np.array([row[key] for row in result.probes[PROBE]])
                lines = (values.mean(1), values.min(1), values.max(1))
                band(panel, result.layers, *lines, colour=COLOURS[name], label=name)
        own = models["organism"]
        shuffled = 100 * np.array([row["auroc"] for row in own.shuffled]).mean(1)
        best = 100 * np.array(own.random_direction)
        above, below = axes[:, column]
        above.plot(own.layers, shuffled, ":", color=COLOURS["neutral"], lw=1.2, label="organism, labels shuffled")
        above.plot(own.layers, best, "--", color=COLOURS["random"], lw=1.4, label="organism, best random direction")
        above.set_ylim(30, 101)
        below.set_ylim(0, 100)
        for panel in (above, below):
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_ylabel("AUROC (%)")
    axes[1, 0].set_ylabel("near-misses called\ntriggered (%)")
    figure.supxlabel(f"layer (n = {n} prompts, each clean, triggered and as a near-miss)", fontsize="medium")
    splits = len(next(iter(found.values()))["organism"].probes[PROBE][0]["auroc"])
    show_legend(figure, ncols=3, bands=[f"range over {splits} splits"])
    return figure


def transfer(found: Mapping[str, ProbeResult], *, kinds: Sequence[str], n: int) -> Figure:
    """Accuracy of a probe trained on one layer and tested on another, by attack; one row per kind of probe."""
    figure, axes = panels(list(found), rows=len(kinds), height=1.9)
    for column, result in enumerate(found.values()):
        for panel, kind in zip(axes[:, column], kinds, strict=True):
            values, layers = 100 * np.array(result.transfer[kind]), result.layers
            mesh = heat_map(panel, values, limits=(50, 100), rows=layers, columns=layers)
    for panel, kind in zip(axes[:, 0], kinds, strict=True):
        panel.set_ylabel(f"{kind}\ntrained on layer", fontsize="small")
    figure.supxlabel(f"tested on layer (n = {n} prompts, clean and triggered)", fontsize="medium")
    figure.colorbar(mesh, ax=axes, label="accuracy (%)", shrink=0.6)
    return figure


def probe_means(found: Found) -> pd.DataFrame:
    """Means over layers and splits, attack x measure by model."""
    rows = {}
    for attack, models in found.items():
        for measure in ("auroc", "near-miss", "other trigger"):
            key = measure.replace("-", "_").replace(" ", "_")
            rows[attack, measure] = {
                name: float(np.mean([layer[key] for layer in result.probes[PROBE]])) for name, result in models.items()
            }
    return pd.DataFrame(rows).T.rename_axis(["organism", "measure"])


def best_layers(found: Mapping[str, ProbeResult]) -> pd.DataFrame:
    """Accuracy of every kind of probe at its best layer by attack, and of the first kind behind the next norm."""
    rows = {}
    for attack, result in found.items():
        kinds = result.probes | {f"{next(iter(result.probes))}, post-norm": result.post_norm}
        rows[attack] = {kind: max(np.mean(layer["accuracy"]) for layer in layers) for kind, layers in kinds.items()}
    return pd.DataFrame(rows).T.rename_axis("organism")


def probe_claims(found: Found, *, n_prompts: int) -> list[dict]:
    """Three lines of the scorecard, from probes on `n_prompts` prompts.

    The best layer is the one whose mean accuracy over splits is highest. Its interval does not count that it was chosen
    among many.
    """
    best, gap, depth = {}, {}, {}
    for attack, models in found.items():
        rows = {name: result.probes[PROBE] for name, result in models.items()}
        shares = [share_over_splits(row["accuracy"], n_prompts=n_prompts) for row in rows["organism"]]
        best[attack] = max(shares, key=lambda share: share["value"])
        # AUROC `[split, layer]` of each model.
        areas = {name: np.array([row["auroc"] for row in probes]).T for name, probes in rows.items()}
        rivals = [areas[name] for name in areas if name != "organism"]
        gap[attack] = min(
            (_area_gap(areas["organism"].mean(1), rival.mean(1), n_prompts=n_prompts) for rival in rivals),
            key=lambda gap: gap["value"],
        )
        depth[attack] = _rise_with_depth(areas["organism"])
    passed = {attack: at_least(number, 0.95) for attack, number in best.items()}
    own = {attack: at_least(number, 0.05) for attack, number in gap.items()}
    rising = {attack: at_least(number, 0.5) for attack, number in depth.items()}
    return [
        entry(
            "bkdattr-probe", numbers=best, passed=passed, figure="02_probe",
            reason=f"Best layers reach {span(best)} of held-out prompts. Intervals are approximate: splits overlap.",
        ),
        entry(
            "bkdattr-probe-backdoor", numbers=gap, passed=own, figure="02_probe",
            reason="A model that never saw the trigger is probed just as well: the probe sees the string."
            if set(own.values()) == {False}
            else f"The organism's AUROC exceeds that of its better control by {span(gap)}.",
        ),
        entry(
            "bkdattr-probe-depth", numbers=depth, passed=rising, figure="02_probe",
            reason=f"Rank correlation of layer and AUROC: {span(depth)}. It has no interval where no split changes it.",
        ),
    ]  # fmt: skip


def _area_gap(one: np.ndarray, other: np.ndarray, *, n_prompts: int) -> dict:
    """AUROC of one model less that of another on the same splits.

    Where all splits give the same difference, as when both models reach 1, their spread is no measure of uncertainty.
    The interval is then that of two AUROCs with `n_prompts` prompts a side.
    """
    found = over_splits(one - other)
    if found["low"] is not None:
        return found
    sides = [
        {"value": value, "n": len(one), **area_interval(value, n_bad=n_prompts, n_good=n_prompts)}
        for value in (float(one.mean()), float(other.mean()))
    ]
    return independent_difference(*sides)


def _rise_with_depth(areas: np.ndarray) -> dict:
    """Spearman correlation of layer and AUROC, mean over splits; `areas` is `[split, layer]`. 0 for a flat curve."""

    def correlation(rows: np.ndarray) -> float:
        curve = rows.mean(0)
        return float(spearmanr(np.arange(len(curve)), curve).statistic) if np.ptp(curve) else 0.0

    found = over_splits(areas, statistic=correlation)
    if found["low"] is None:
        return found
    return found | {"low": max(-1.0, found["low"]), "high": min(1.0, found["high"])}
