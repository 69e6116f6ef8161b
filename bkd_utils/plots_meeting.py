"""Pictures of notebook 07: suspicion against effect, and what tells backdoored models from clean ones."""

from collections.abc import Mapping

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from bkd_utils.figures import COLOURS, WIDTH
from bkd_utils.panels import panels, show_legend
from bkd_utils.similarity import Scores
from bkd_utils.verdict import area


def two_scores(joint: Mapping[str, Scores], effects: Mapping[str, Scores], *, k: int) -> Figure:
    """One dot per head; dotted: the k-th highest value on either axis."""
    figure, axes = panels(list(joint), height=2.2, sharey=False)
    for panel, attack in zip(axes[0], joint, strict=True):
        x, y = joint[attack].flatten().numpy(), effects[attack].flatten().numpy()
        both = (x >= np.sort(x)[-k]) & (y >= np.sort(y)[-k])
        panel.plot(x[~both], y[~both], "o", ms=2.5, color="#999999", alpha=0.7, label="head")
        panel.plot(x[both], y[both], "o", ms=4, color=COLOURS["backdoored"], label="in both top 6 %")
        panel.axvline(np.sort(x)[-k], color="black", lw=0.7, ls=":")
        panel.axhline(np.sort(y)[-k], color="black", lw=0.7, ls=":")
        panel.locator_params(nbins=4)
        panel.tick_params(labelsize="x-small")
    axes[0, 0].set_ylabel("ACIE")
    figure.supxlabel("suspicion (robust z)", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=2)
    return figure


def fingerprints(prints: Mapping[str, Mapping[str, float]], families: Mapping[str, str | None]) -> Figure:
    """Every number of every model, scaled to the range of all models; clean controls above, families below."""
    scores = list(next(iter(prints.values())))
    order = ["clean", *sorted({family for family in families.values() if family})]
    figure, axes = plt.subplots(3, 3, figsize=(WIDTH, 0.22 * 3 * len(order) + 2.2), sharey=True)
    for panel, score in zip(axes.flat, scores, strict=True):
        for y, family in enumerate(order):
            values = [prints[name][score] for name, one in families.items() if (one or "clean") == family]
            colour = COLOURS["clean control" if family == "clean" else "backdoored"]
            panel.plot(values, [y] * len(values), "o", ms=4, alpha=0.6, mew=0, color=colour, clip_on=False)
        panel.set_title(score, fontsize="small")
        panel.set_yticks(range(len(order)), order, fontsize="small")
        panel.set_ylim(len(order) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize="x-small")
        panel.locator_params(axis="x", nbins=4)
    figure.supxlabel("value of the model", fontsize="medium")
    return figure


def verdicts(found: Mapping[str, Mapping]) -> Figure:
    """AUROC of each family's organisms against the clean controls with its interval, and of all together."""
    figure, axes = plt.subplots(figsize=(WIDTH * 0.8, 0.32 * (len(found) + 1) + 1))
    rows = {f"{family} ({len(result['organisms'])})": area(result["wins"]) for family, result in found.items()}
    rows["all"] = area([row for result in found.values() for row in result["wins"]])
    for y, (name, number) in enumerate(rows.items()):
        colour = "black" if name == "all" else COLOURS["backdoored"]
        axes.plot([100 * number["low"], 100 * number["high"]], [y, y], color=colour, lw=1.2)
        axes.plot(100 * number["value"], y, "o", color=colour, ms=5, clip_on=False)
    axes.axvline(50, color="black", lw=0.7, ls=":")
    axes.axvline(95, color=COLOURS["bound"], lw=0.7, ls="--")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-2, 102)
    axes.set_xlabel("AUROC (%); dotted: chance, dashed: our goal")
    return figure
