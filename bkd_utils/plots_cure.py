"""Pictures of notebook 06: what treatments leave of backdoor and model, and what comes back."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bkd_utils.figures import COLOURS, WIDTH
from bkd_utils.panels import panels, show_legend

# What is counted -> colour; the same three beside each other everywhere in this notebook.
COUNTED = {"asr": COLOURS["backdoored"], "near_miss": COLOURS["near-miss"], "cacc": COLOURS["utility"]}
NAMES = {"asr": "ASR", "near_miss": "near-miss firing", "cacc": "CACC"}
# Kind of treatment -> colour and marker.
KINDS = {
    "untreated": ("#000000", "X"),
    "clean control": (COLOURS["clean control"], "P"),
    "ASA, our reading": ("#D55E00", "o"),
    "same heads, other treatment": ("#E69F00", "s"),
    "random heads": ("#777777", "v"),
    "rival": ("#56B4E9", "D"),
    "told where it is": ("#CC79A7", "*"),
}


def repairs(found: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """ASR, near-miss firing and CACC with 95 % intervals; attack -> treatment -> `organisms.under_attack`."""
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    figure, axes = plt.subplots(
        1, len(found), figsize=(WIDTH, 0.3 * len(names) + 1.2), sharex=True, sharey=True, squeeze=False
    )
    for panel, (attack, rows) in zip(axes[0], found.items(), strict=True):
        for i, (key, colour) in enumerate(COUNTED.items()):
            for y, name in enumerate(names):
                if name in rows:
                    _interval(panel, y + 0.22 * (i - 1), rows[name][key], colour=colour, label=NAMES[key])
        panel.set_title(attack.replace("-", "-\n", 1), fontsize="small")
        panel.set_yticks(range(len(names)), names, fontsize="small")
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(-3, 103)
    figure.supxlabel("prompts (%)", fontsize="medium")
    _legend_once(figure, axes[0, 0], ncols=len(COUNTED))
    return figure


def _interval(panel: Axes, y: float, share: Mapping[str, float], *, colour: str, label: str) -> None:
    panel.plot([100 * share["low"], 100 * share["high"]], [y, y], color=colour, lw=1)
    panel.plot(100 * share["value"], y, "o", ms=3, color=colour, label=label, clip_on=False)


def _legend_once(figure: Figure, panel: Axes, *, ncols: int) -> None:
    """A legend with every label once, however often it was drawn."""
    entries = dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=ncols, fontsize="small")


def frontier(found: Mapping[str, Mapping[str, Mapping]], kinds: Mapping[str, str]) -> Figure:
    """ASR against what CACC has lost, one dot per treatment; `kinds`: treatment -> key of `KINDS`."""
    figure, axes = panels(list(found), height=2.6)
    for panel, rows in zip(axes[0], found.values(), strict=True):
        start = rows["untreated"]["cacc"]["value"]
        for name, result in rows.items():
            colour, marker = KINDS[kinds[name]]
            lost = 100 * (start - result["cacc"]["value"])
            size = 9 if marker == "*" else 6
            panel.plot(
                lost, 100 * result["asr"]["value"], marker, ms=size, color=colour, alpha=0.85, mew=0, ls="",
                label=kinds[name], clip_on=False,
            )  # fmt: skip
        panel.axhline(5, color="black", lw=0.7, ls=":")
        panel.axvline(1, color="black", lw=0.7, ls=":")
        panel.set_ylim(-3, 103)
    axes[0, 0].set_ylabel("ASR (%)")
    figure.supxlabel("CACC lost (points); dotted: our goal", fontsize="medium")
    _legend_once(figure, axes[0, 0], ncols=4)
    return figure


def mechanisms(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Similarity of the treated heads under the trigger (left) and the highest ACIE (right), before and after."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.6))
    colours = plt.get_cmap("cividis")(np.linspace(0, 0.85, len(found)))
    for (attack, result), colour in zip(found.items(), colours, strict=True):
        for panel, key in zip(axes, ("similarity", "acie"), strict=True):
            panel.plot([0, 1], result[key], "o-", color=colour, label=attack, clip_on=False)
    axes[0].set_ylabel("similarity of treated heads")
    axes[1].set_ylabel("highest ACIE of any head")
    for panel in axes:
        panel.set_xticks([0, 1], ["before", "after"])
        panel.set_xlim(-0.15, 1.15)
    axes[0].set_ylim(0, 1)
    axes[1].set_ylim(bottom=0)
    show_legend(figure, axes[0], ncols=3)
    return figure


def relearning(found: Mapping[str, Mapping[str, Sequence[Mapping]]]) -> Figure:
    """ASR and clean firing (dotted) after a few poisoned rows; attack -> model -> `relearn.relearned`."""
    figure, axes = panels(list(found), height=2.2)
    colours = {"treated": COLOURS["backdoored"], "clean control": COLOURS["clean control"]}
    for panel, models in zip(axes[0], found.values(), strict=True):
        for name, rows in models.items():
            x = range(len(rows))
            value, low, high = (np.array([100 * row["asr"][key] for row in rows]) for key in ("value", "low", "high"))
            bars = [np.maximum(value - low, 0), np.maximum(high - value, 0)]
            panel.errorbar(x, value, yerr=bars, fmt="o-", ms=4, lw=1.2, color=colours[name], label=f"{name}: ASR")
            clean = [100 * row["clean firing"]["value"] for row in rows]
            panel.plot(x, clean, ":", color=colours[name], lw=1.4, label=f"{name}: clean firing")
        panel.set_xticks(x, [str(row["poisoned"]) for row in rows])
        panel.set_ylim(-3, 103)
    axes[0, 0].set_ylabel("prompts (%)")
    figure.supxlabel("poisoned rows in the new training set (0: before)", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=2)
    return figure


def guards(found: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """Triggered inputs caught and clean ones refused at one threshold; attack -> guard -> `screen.screened`."""
    figure, axes = panels(list(found), height=1.9)
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    for panel, rows in zip(axes[0], found.values(), strict=True):
        for name, result in rows.items():
            y = names.index(name)
            _interval(panel, y - 0.12, result["caught"], colour=COUNTED["asr"], label="triggered inputs caught")
            _interval(panel, y + 0.12, result["refused"], colour=COUNTED["cacc"], label="clean inputs refused")
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(-3, 103)
    figure.supxlabel("inputs (%)", fontsize="medium")
    _legend_once(figure, axes[0, 0], ncols=2)
    return figure
