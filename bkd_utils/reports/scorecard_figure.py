"""Notebook 09: the picture of all claims and organisms."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bkd_utils.reports.scorecard import PROVENANCE, count, named, published
from bkd_utils.reports.style import COLOURS, WIDTH

# Marks that can be told apart without colour, which means models in the other notebooks.
OUTCOMES = {
    True: ({"marker": "o", "mfc": "black", "mew": 0.9}, "passes the criterion"),
    False: ({"marker": "x", "mfc": "black", "mew": 1.8}, "fails it"),
    None: ({"marker": "D", "mfc": "white", "mew": 0.9}, "undecided: the interval contains the bar, or there is none"),
}
MARK = {"ls": "", "ms": 6, "mec": "black"}
# One letter for how we know of a claim, in the first column.
LETTERS = {"read": "P", "second hand": "S", "abstract": "A"}


def scorecard(lines: Sequence[Mapping]) -> Figure:
    """One row per claim with how we know of it and its verdict, one column per organism or family of triggers."""
    columns, places, headings = _columns(lines), *_places(lines)
    rows = max(places) + 0.6
    figure, axes = plt.subplots(figsize=(WIDTH, 0.37 * rows + 2.3))
    units = {name: about["unit"] for name, about in published().items()}
    letter_of = {PROVENANCE[key]: letter for key, letter in LETTERS.items()}
    for y, line in zip(places, lines, strict=True):
        axes.axhline(y, color=COLOURS["pale"], lw=0.5, zorder=0)
        axes.text(-1, y, letter_of[line["provenance"]], ha="center", va="center", fontsize="small")
        for name, one in line["by_organism"].items():
            mark, _ = OUTCOMES[one["passed"]]
            axes.plot(columns.index(name), y, **MARK, **mark)
        _beside(axes, y, f"{line['verdict']}: {count(line)}\nn = {_sizes(line)} {units[line['id']]}")
    names = [fill(named(line), 58) for line in lines]
    axes.set_yticks([*places, *headings.values()], [*names, *headings], fontsize="x-small")
    for label in axes.get_yticklabels()[len(lines) :]:
        label.set(fontweight="bold", fontsize="small")
    axes.set_xticks(range(-1, len(columns)), ["how we know", *columns], rotation=60, ha="left", fontsize="small")
    for label in axes.get_xticklabels():
        label.set_rotation_mode("anchor")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_ylim(rows, -0.4)
    axes.set_xlim(-1.5, len(columns) - 0.5)
    axes.set_xlabel("organism, or family of triggers; empty: not tested", fontsize="small")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    figure.legend(handles=_legend(lines), loc="outside lower left", ncols=2, fontsize="x-small")
    return figure


def _beside(axes: Axes, y: float, text: str) -> None:
    axes.annotate(
        text, (1, y), xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points", va="center",
        fontsize="x-small", annotation_clip=False,
    )  # fmt: skip


def _legend(lines: Sequence[Mapping]) -> list[Line2D]:
    """The three marks, and the letters that the lines have."""
    marks = [Line2D([], [], **MARK, **mark, label=label) for mark, label in OUTCOMES.values()]
    used = {line["provenance"] for line in lines}
    letters = [
        Line2D([], [], marker=f"${letter}$", ls="", ms=6, color="black", mew=0, label=PROVENANCE[key])
        for key, letter in LETTERS.items()
        if PROVENANCE[key] in used
    ]
    return marks + letters


def _sizes(line: Mapping) -> str:
    """n of the organisms, from the least to the largest."""
    sizes = sorted({one["n"] for one in line["by_organism"].values()})
    return f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"


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
