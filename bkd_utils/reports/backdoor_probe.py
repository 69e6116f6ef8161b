"""Notebook 02: pictures, tables and verdicts on probes."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import spearmanr

from bkd_utils.common.statistics import independent_difference, over_splits, share_over_splits
from bkd_utils.experiments.backdoor_probe import ProbeResult
from bkd_utils.reports.scorecard import at_least, entries, judged, span
from bkd_utils.reports.style import COLOURS, band, explain, heat_map, panels

PROBE = "logistic regression"
# What is drawn by layer, and the factor to its unit.
MEASURES = {"auroc": 100, "separation": 1, "near_miss": 100}
# Attack -> model ("organism", "clean control", "base model") -> its probes.
Found = Mapping[str, Mapping[str, ProbeResult]]


def probes(found: Found, *, n: int) -> Figure:
    """By layer: AUROC (top), separation of the scores (middle), near-misses called triggered (bottom), with `n` prompts
    in each version: means over splits, in a band of their whole range."""
    figure, axes = panels(list(found), rows=3, height=1.8)
    for column, models in enumerate(found.values()):
        for name, result in models.items():
            for panel, (key, scale) in zip(axes[:, column], MEASURES.items(), strict=True):
                values = scale * np.array([row[key] for row in result.probes[PROBE]])
                lines = (values.mean(1), values.min(1), values.max(1))
                band(panel, result.layers, lines, colour=name, label=name)
                panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        own, (above, _, below) = models["organism"], axes[:, column]
        shuffled = 100 * np.array([row["auroc"] for row in own.shuffled]).mean(1)
        best = 100 * np.array(own.random_direction)
        above.plot(own.layers, shuffled, ":", color=COLOURS["neutral"], lw=1.2, label="organism, labels shuffled")
        above.plot(own.layers, best, "--", color=COLOURS["random"], lw=1.4, label="organism, best random direction")
        above.set_ylim(30, 101)
        below.set_ylim(0, 100)
    axes[1, 0].set_ylim(bottom=0)
    x = f"layer (n = {n} prompts, each clean, triggered and as a near-miss)"
    left = ("AUROC (%)", "separation (d')", "near-misses called\ntriggered (%)")
    explain(axes, x, *left, bands=[f"range over {values.shape[1]} splits"])
    return figure


def transfer(found: Mapping[str, ProbeResult], *, kinds: Sequence[str], n: int) -> Figure:
    """Accuracy of a probe trained on one layer and tested on another, by attack; one row per kind of probe."""
    figure, axes = panels(list(found), rows=len(kinds), height=1.9)
    for column, result in enumerate(found.values()):
        for panel, kind in zip(axes[:, column], kinds, strict=True):
            values, layers = 100 * np.array(result.transfer[kind]), result.layers
            mesh = heat_map(panel, values, vmin=50, vmax=100, rows=layers, columns=layers)
    for panel, kind in zip(axes[:, 0], kinds, strict=True):
        panel.set_ylabel(f"{kind}\ntrained on layer", fontsize="small")
    explain(axes, f"tested on layer (n = {n} prompts, clean and triggered)")
    figure.colorbar(mesh, ax=axes, label="accuracy (%)", shrink=0.6)
    return figure


def probe_means(found: Found) -> pd.DataFrame:
    """Means over layers and splits, attack x measure by model."""
    rows = {}
    for attack, models in found.items():
        for measure in ("auroc", "near-miss", "other trigger"):
            key = measure.replace("-", "_").replace(" ", "_")
            layers = {name: [layer[key] for layer in result.probes[PROBE]] for name, result in models.items()}
            rows[attack, measure] = {name: float(np.mean(values)) for name, values in layers.items()}
    return pd.DataFrame(rows).T.rename_axis(["organism", "measure"])


def best_layers(found: Mapping[str, ProbeResult]) -> pd.DataFrame:
    """Accuracy of every kind of probe at its best layer by attack, and of the first kind behind the next norm."""
    rows = {}
    for attack, result in found.items():
        kinds = result.probes | {f"{next(iter(result.probes))}, post-norm": result.post_norm}
        rows[attack] = {kind: max(np.mean(layer["accuracy"]) for layer in layers) for kind, layers in kinds.items()}
    return pd.DataFrame(rows).T.rename_axis("organism")


def probe_claims(found: Found, *, n_prompts: int, kind: str) -> list[dict]:
    """Three lines of the scorecard for one kind of organisms, from probes on `n_prompts` prompts. The best layer has
    the highest mean accuracy over splits; its interval does not count that it was chosen among many."""
    best, spared, depth, numbers = {}, {}, {}, {}
    for organism, models in found.items():
        rows = {name: result.probes[PROBE] for name, result in models.items()}
        shares = [share_over_splits(row["accuracy"], n_prompts=n_prompts) for row in rows["organism"]]
        best[organism] = max(shares, key=lambda share: share["value"])
        # Near-misses called triggered `[split]`, averaged over layers.
        called = {name: np.mean([row["near_miss"] for row in probes], axis=0) for name, probes in rows.items()}
        own = called.pop("organism")
        gaps = [_gap(rival, own, n_prompts=n_prompts) for rival in called.values()]
        spared[organism] = min(gaps, key=lambda one: one["value"])
        depth[organism] = _rise_with_depth(np.array([row["separation"] for row in rows["organism"]]).T)
        numbers[organism] = float(np.mean([row["auroc"] for name in called for row in rows[name]]))
    reached = f"Best layers reach {span(best)} of held-out prompts. Intervals are approximate: splits overlap."
    areas = f"{min(numbers.values()):.2f} to {max(numbers.values()):.2f}"
    rivals = f"Probes of the two models without a backdoor have a mean AUROC of {areas}. Near-misses called triggered,"
    rivals += f" better control less organism: {span(spared)}."
    rising = f"Rank correlation of layer and separation: {span(depth)}."
    bars = {
        "probe": (best, 0.95, reached),
        "probe-backdoor": (spared, 0.1, rivals),
        "probe-depth": (depth, 0.5, rising),
    }
    claims = {name: (one, judged(one, at_least, bar), "02_probe", told) for name, (one, bar, told) in bars.items()}
    return entries(claims, kind=kind)


def _gap(one: np.ndarray, other: np.ndarray, *, n_prompts: int) -> dict:
    """A share by split less another on the same splits."""
    found = over_splits(one - other)
    if found["low"] is not None:
        return found
    # Where all splits give the same difference, as when both shares are 0, their spread measures no uncertainty.
    return independent_difference(*(share_over_splits(list(shares), n_prompts=n_prompts) for shares in (one, other)))


def _rise_with_depth(values: np.ndarray) -> dict:
    """Spearman correlation of layer and a measure, mean over splits; `values` is `[split, layer]`. 0 if it is flat."""

    def correlation(rows: np.ndarray) -> float:
        curve = rows.mean(0)
        return float(spearmanr(np.arange(len(curve)), curve).statistic) if np.ptp(curve) else 0.0

    found = over_splits(values, statistic=correlation)
    if found["low"] is None:
        return found
    return found | {"low": max(-1.0, found["low"]), "high": min(1.0, found["high"])}
