"""The picture of notebook 09."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from bkd_utils.figures import COLOURS, WIDTH

PASSED = {True: (COLOURS["clean control"], "o", "passes"), False: (COLOURS["backdoored"], "X", "does not")}


def scorecard(lines: Sequence[Mapping]) -> Figure:
    """One row per claim with its verdict, one mark per organism; the mark's colour and form say whether it passes."""
    figure, axes = plt.subplots(figsize=(WIDTH, 0.3 * len(lines) + 1))
    for y, line in enumerate(lines):
        for x, one in enumerate(line["by_organism"].values()):
            colour, marker, label = PASSED[one["passed"]]
            axes.plot(x, y, marker, color=colour, ms=7, mew=0, ls="", label=label)
    most = max(len(line["by_organism"]) for line in lines)
    for y, line in enumerate(lines):
        axes.text(most + 0.2, y, line["verdict"], va="center", fontsize="small")
    axes.set_yticks(range(len(lines)), [line["id"] for line in lines], fontsize="small")
    axes.set_ylim(len(lines) - 0.5, -0.5)
    axes.set_xlim(-0.5, most + 2)
    axes.set_xticks([])
    axes.set_xlabel("organisms or families tested, in the order of the scorecard")
    axes.grid(False)
    entries = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=2, fontsize="small")
    return figure
