"""Pictures of notebook 02: what probes see."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.reports.panels import MODELS, SEQUENTIAL, panels, show_legend


def probes(found: Mapping[str, Mapping[str, Mapping]], *, kind: str = "logistic regression") -> Figure:
    """AUROC by layer (top) and near-misses called triggered (bottom); attack -> model -> `probe.probed`."""
    figure, axes = panels(list(found), rows=2)
    for column, models in enumerate(found.values()):
        for name, result in models.items():
            layers, rows = result["layers"], result["probes"][kind]
            for panel, key in zip(axes[:, column], ("auroc", "near-miss"), strict=True):
                values = 100 * np.array([row[key] for row in rows])
                _band(panel, layers, values, colour=MODELS[name], label=name)
        own = models["organism"]
        shuffled = 100 * np.array([row["auroc"] for row in own["shuffled"]])
        axes[0, column].plot(
            own["layers"], shuffled.mean(1), ":", color="black", lw=1.2, label="organism, labels shuffled"
        )
        best = 100 * np.array(own["random direction"])
        axes[0, column].plot(own["layers"], best, "--", color="black", lw=1, label="organism, best random direction")
        axes[0, column].set_ylim(30, 101)
        axes[1, column].set_ylim(0, 100)
        for panel in axes[:, column]:
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_ylabel("AUROC (%)")
    axes[1, 0].set_ylabel("near-misses called\ntriggered (%)")
    figure.supxlabel("layer", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=3)
    return figure


def _band(panel: Axes, x: Sequence[float], values: np.ndarray, *, colour: str, label: str) -> None:
    """Mean over the last axis, and the whole range of its values as a band."""
    panel.plot(x, values.mean(1), color=colour, lw=1.4, label=label)
    panel.fill_between(x, values.min(1), values.max(1), color=colour, alpha=0.15, lw=0)


def transfer(found: Mapping[str, Mapping], *, kinds: Sequence[str]) -> Figure:
    """Accuracy of a probe trained on one layer and tested on another; attack -> `probe.probed`, one row per kind."""
    figure, axes = panels(list(found), rows=len(kinds), height=1.9)
    for column, result in enumerate(found.values()):
        for panel, kind in zip(axes[:, column], kinds, strict=True):
            layers = result["layers"]
            image = panel.imshow(
                100 * np.array(result["transfer"][kind]),
                vmin=50,
                vmax=100,
                cmap=SEQUENTIAL,
                origin="lower",
                aspect="auto",
            )
            ticks = range(0, len(layers), max(1, len(layers) // 4))
            panel.set_xticks(ticks, [layers[i] for i in ticks])
            panel.set_yticks(ticks, [layers[i] for i in ticks])
            panel.grid(False)
    for panel, kind in zip(axes[:, 0], kinds, strict=True):
        panel.set_ylabel(f"{kind}\ntrained on layer", fontsize="small")
    figure.supxlabel("tested on layer", fontsize="medium")
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.6)
    return figure
