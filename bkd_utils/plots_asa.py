"""Pictures of notebooks 05 to 07: similarity of heads, suspicious heads, cures."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.observe import VERSIONS, gap
from bkd_utils.panels import MODELS, panels, show_legend

VERSION_NAMES = {"triggered": "triggered", "near-miss": "look-alike", "same length": "same length"}


def gaps(found: Mapping[str, Mapping[str, Mapping]], *, readings: Sequence[str]) -> Figure:
    """What a trigger does to similarity, by layer, one row per reading; attack -> model -> `observe.observed`.

    Mean over prompts of triggered less clean, and the range that holds the middle half of the prompts.
    """
    figure, axes = panels(list(found), rows=len(readings), height=1.9, sharey="row")
    for column, models in enumerate(found.values()):
        for panel, name in zip(axes[:, column], readings, strict=True):
            for model, result in models.items():
                difference = gap(result, reading=name)
                layers = range(difference.shape[1])
                low, high = np.quantile(difference, [0.25, 0.75], axis=0)
                panel.plot(layers, difference.mean(0), color=MODELS[model], lw=1.3, label=model)
                panel.fill_between(layers, low, high, color=MODELS[model], alpha=0.15, lw=0)
            panel.axhline(0, color="black", lw=0.6)
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    for panel, name in zip(axes[:, 0], readings, strict=True):
        panel.set_ylabel(name.replace(", ", ",\n"), fontsize="small")
    figure.supxlabel("layer", fontsize="medium")
    figure.supylabel("similarity, triggered less clean", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=3)
    return figure


def gap_numbers(found: Mapping[str, Mapping[str, Mapping]], *, readings: Sequence[str]) -> dict:
    """What `gaps` draws: attack -> reading -> model -> mean over prompts by layer."""
    return {
        attack: {
            name: {model: gap(result, reading=name).mean(0).tolist() for model, result in models.items()}
            for name in readings
        }
        for attack, models in found.items()
    }


def separation_map(found: Mapping[str, Mapping[str, Mapping]], *, models: Sequence[str]) -> Figure:
    """AUROC of triggered against clean prompts, reading by attack, one panel per model.

    `found`: reading -> attack -> `observe.separates`.
    """
    attacks = list(next(iter(found.values())))
    figure, axes = panels(models, height=0.28 * len(found) + 1.1)
    for panel, model in zip(axes[0], models, strict=True):
        values = 100 * np.array(
            [[row[attack][model]["triggered"]["value"] for attack in attacks] for row in found.values()]
        )
        image = panel.imshow(values, cmap="PuOr_r", vmin=0, vmax=100, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            panel.text(
                x,
                y,
                f"{value:.0f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if abs(value - 50) > 35 else "black",
            )
        panel.set_xticks(range(len(attacks)), attacks, rotation=90, fontsize="small")
        panel.set_yticks(range(len(found)), list(found), fontsize="small")
        panel.grid(False)
    figure.colorbar(image, ax=axes, label="AUROC (%), above 50:\ntriggered more similar", shrink=0.9)
    return figure


def families(found: Mapping[str, Mapping[str, Mapping]], *, models: Sequence[str]) -> Figure:
    """AUROC of triggered, look-alike and lengthened prompts against clean ones, intervals; attack -> `separates`."""
    figure, axes = panels(list(found), height=1.9)
    for panel, result in zip(axes[0], found.values(), strict=True):
        for row, version in enumerate(VERSIONS[1:]):
            for i, model in enumerate(models):
                share, y = result[model][version], row + 0.22 * (i - (len(models) - 1) / 2)
                panel.plot([100 * share["low"], 100 * share["high"]], [y, y], color=MODELS[model], lw=1.2)
                panel.plot(100 * share["value"], y, "o", ms=4, color=MODELS[model], label=model if not row else None)
        panel.axvline(50, color="black", lw=0.6)
        panel.set_yticks(range(3), [VERSION_NAMES[version] for version in VERSIONS[1:]], fontsize="small")
        panel.set_ylim(2.5, -0.5)
        panel.set_xlim(-3, 103)
    figure.supxlabel("AUROC against clean prompts (%)", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=3)
    return figure


def detection_curves(found: Mapping[str, Mapping]) -> Figure:
    """ROC of input-level detection, one panel per attack; attack -> label -> (clean scores, triggered scores)."""
    figure, axes = panels(list(found), height=1.8)
    colours = ("#D55E00", "#0072B2", "#009E73")
    for panel, scores in zip(axes[0], found.values(), strict=True):
        for (label, (clean, triggered)), colour in zip(scores.items(), colours, strict=False):
            thresholds = np.unique(np.concatenate([clean, triggered, [np.inf, -np.inf]]))[::-1]
            refused = [100 * np.mean(clean >= t) for t in thresholds]
            caught = [100 * np.mean(triggered >= t) for t in thresholds]
            panel.plot(refused, caught, color=colour, lw=1.3, label=label)
        panel.plot([0, 100], [0, 100], ":", color="black", lw=0.8)
        panel.set_aspect("equal")
    axes[0, 0].set_ylabel("triggered caught (%)")
    figure.supxlabel("clean refused (%)", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=3)
    return figure
