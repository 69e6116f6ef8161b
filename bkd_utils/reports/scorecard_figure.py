"""Notebook 09: the picture of all claims and organisms."""

from collections.abc import Mapping, Sequence
from textwrap import fill

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from bkd_utils.reports.scorecard import PROVENANCE, SEED, count, named, published
from bkd_utils.reports.style import COLOURS, WIDTH, sizes

MARK = {"ls": "", "ms": 3.8, "mec": "black", "mfc": "black", "mew": 0.9}
# Marks that can be told apart without colour, which means models in the other notebooks.
OUTCOMES = {
    True: (MARK | {"marker": "o"}, "passes the criterion"),
    False: (MARK | {"marker": "x", "mew": 1.8}, "fails it"),
    None: (MARK | {"marker": "D", "mfc": "white"}, "undecided: the interval contains the bar, or there is none"),
}
# How we know of a claim -> one letter in the first column.
LETTERS = dict(zip(PROVENANCE.values(), "PSAO", strict=True))


def scorecard(lines: Sequence[Mapping]) -> Figure:
    """One row per claim with its provenance and verdict, one column per attack or family, a mark for each seed."""
    # Attacks that most claims were tested on come first.
    tested = [SEED.sub("", name) for line in lines for name in line["by_organism"]]
    columns = sorted(dict.fromkeys(tested), key=lambda name: -tested.count(name))
    # Row of every claim and of every paper's name, which stands above its claims.
    places, headings = [], {}
    for i, line in enumerate(lines):
        headings.setdefault(line["paper"], i + 0.8 * len(headings))
        places.append(i + 0.8 * len(headings))
    rows = max(places) + 0.6
    figure, axes = plt.subplots(figsize=(WIDTH, 0.37 * rows + 2.3))
    units = {name: about["unit"] for name, about in published().items()}
    beside = {"xytext": (6, 0), "textcoords": "offset points", "va": "center", "fontsize": "x-small"}
    for y, line in zip(places, lines, strict=True):
        axes.axhline(y, color=COLOURS["pale"], lw=0.5, zorder=0)
        axes.text(-1, y, LETTERS[line["provenance"]], ha="center", va="center", fontsize="small")
        for name, one in line["by_organism"].items():
            attack = SEED.sub("", name)
            seeds = [other for other in line["by_organism"] if SEED.sub("", other) == attack]
            x = columns.index(attack) + 0.33 * (seeds.index(name) - (len(seeds) - 1) / 2)
            axes.plot(x, y, **OUTCOMES[one["passed"]][0])
        text = f"{line['verdict']}: {count(line)}\n{sizes(line['by_organism'].values())} {units[line['id']]}"
        axes.annotate(text, (1, y), xycoords=("axes fraction", "data"), annotation_clip=False, **beside)
    names = [fill(named(line), 58) for line in lines]
    axes.set_yticks([*places, *headings.values()], [*names, *headings], fontsize="x-small")
    for label in axes.get_yticklabels()[len(lines) :]:
        label.set(fontweight="bold", fontsize="small")
    axes.set_xticks(range(-1, len(columns)), ["how we know", *columns], rotation=60, ha="left", fontsize="small")
    for label in axes.get_xticklabels():
        label.set_rotation_mode("anchor")
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set(ylim=(rows, -0.4), xlim=(-1.5, len(columns) - 0.5))
    axes.set_xlabel("attack, a mark for each seed, or family of triggers; empty: not tested", fontsize="small")
    axes.grid(False)
    axes.spines[:].set_visible(False)
    entries, used = list(OUTCOMES.values()), {line["provenance"] for line in lines}
    look = {"ls": "", "ms": 6, "color": "black", "mew": 0}
    entries += [(look | {"marker": f"${letter}$"}, how) for how, letter in LETTERS.items() if how in used]
    handles = [Line2D([], [], **mark, label=label) for mark, label in entries]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, fontsize="x-small")
    return figure
