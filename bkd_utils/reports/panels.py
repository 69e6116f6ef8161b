"""What pictures of several notebooks share: grids of panels, legends, matrices, a colour per model."""

from collections.abc import Iterable, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bkd_utils.reports.figures import WIDTH

SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"
MODELS = {"organism": "#D55E00", "clean control": "#0072B2", "base model": "#777777"}


def panels(
    names: Sequence[str], *, rows: int = 1, height: float = 2.1, sharey: bool | str = True
) -> tuple[Figure, np.ndarray]:
    """A grid with one column per name, titles on top, axes shared."""
    figure, axes = plt.subplots(
        rows,
        len(names),
        figsize=(WIDTH, height * rows + 0.6),
        sharex="row" if sharey else False,
        sharey="row" if sharey else False,
        squeeze=False,
    )
    for panel, name in zip(axes[0], names, strict=True):
        panel.set_title(name, fontsize="small")
    return figure, axes


def show_legend(figure: Figure, panel: Axes, *, ncols: int) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=ncols, fontsize="small")


def legend_once(figure: Figure, all_panels: Iterable[Axes], *, ncols: int) -> None:
    """A legend with every label of any panel once, however often it was drawn."""
    entries = {}
    for panel in all_panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=ncols, fontsize="small")


def matrix(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, label: str, vmax: float) -> Figure:
    """A small labelled matrix with its numbers: shares if `vmax` is 1, per cent if it is 100."""
    figure, axes = plt.subplots(figsize=(WIDTH * 0.75, 0.4 * len(rows) + 2.1))
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=vmax, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text, colour = f"{value:.{0 if vmax > 1 else 2}f}", "white" if value < vmax * 0.55 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize="small", color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=label)
    return figure
