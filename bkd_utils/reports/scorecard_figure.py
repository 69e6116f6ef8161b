"""Notebook 09: the picture of all claims and organisms."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bkd_utils.reports.style import WIDTH

# Filled or hollow, so that it can be told without colour: those mean models in the other notebooks.
PASSED = {True: ("black", "passes the criterion"), False: ("white", "does not pass")}
PALE = "#CCCCCC"


def scorecard(lines: Sequence[Mapping]) -> Figure:
    """One row per claim with its verdict, one column per organism or family; a filled mark passes, a hollow one not."""
    columns, places, headings = _columns(lines), *_places(lines)
    rows = max(places) + 0.6
    figure, axes = plt.subplots(figsize=(WIDTH, 0.34 * rows + 1.9))
    for y, line in zip(places, lines, strict=True):
        axes.axhline(y, color=PALE, lw=0.5, zorder=0)
        for name, one in line["by_organism"].items():
            inside, label = PASSED[one["passed"]]
            axes.plot(columns.index(name), y, "o", ms=7, mec="black", mew=0.9, mfc=inside, ls="", label=label)
        beside = {"xycoords": ("axes fraction", "data"), "xytext": (6, 0), "textcoords": "offset points"}
        axes.annotate(line["verdict"], (1, y), va="center", fontsize="small", annotation_clip=False, **beside)
    names = [fill(line["claim"], 62) for line in lines]
    axes.set_yticks([*places, *headings.values()], [*names, *headings], fontsize="x-small")
    for label in axes.get_yticklabels()[len(lines) :]:
        label.set(fontweight="bold", fontsize="small")
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="left", rotation_mode="anchor", fontsize="small")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_ylim(rows, -0.4)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xlabel("organism, or family of triggers; empty: not tested", fontsize="small")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=2, fontsize="small")
    return figure


def _columns(lines: Sequence[Mapping]) -> list[str]:
    """Every organism or family, those that most claims were tested on first."""
    names = [name for line in lines for name in line["by_organism"]]
    return sorted(dict.fromkeys(names), key=lambda name: -names.count(name))


def _places(lines: Sequence[Mapping]) -> tuple[list[float], dict[str, float]]:
    """Row of every claim and of every paper's name, which stands above its claims."""
    places: list[float] = []
    headings: dict[str, float] = {}
    for i, line in enumerate(lines):
        headings.setdefault(line["paper"], i + 0.8 * len(headings))
        places.append(i + 0.8 * len(headings))
    return places, headings
