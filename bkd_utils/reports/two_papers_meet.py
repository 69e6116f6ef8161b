"""Notebook 07: pictures and verdicts on suspicious heads and on whole models."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D

from bkd_utils.attention_alignment.similarity import Scores
from bkd_utils.common.statistics import auroc_of_wins
from bkd_utils.reports.scorecard import entry, span
from bkd_utils.reports.style import COLOURS, SEQUENTIAL, WIDTH, panels, show_legend

MARKERS = "os^DvP*X"  # one per task
KINDS = {"clean": COLOURS["clean control"], "backdoored": COLOURS["backdoored"]}


# --- heads ----------------------------------------------------------------------------------------------------------


def two_scores(joint: Mapping[str, Scores], effects: Mapping[str, Scores], *, k: int) -> Figure:
    """One dot per head; dotted: the k-th highest value on either axis. ACIE relative to its maximum, in the title."""
    figure, axes = panels(list(joint), height=2.2, sharey=True)
    for panel, attack in zip(axes[0], joint, strict=True):
        x, y = joint[attack].flatten().numpy(), effects[attack].flatten().numpy()
        highest = y.max()
        y = y / (np.abs(highest) or 1)
        both = (x >= np.sort(x)[-k]) & (y >= np.sort(y)[-k])
        panel.plot(x[~both], y[~both], "o", ms=2.5, color="#999999", alpha=0.7, label="head")
        panel.plot(x[both], y[both], "o", ms=4, color=COLOURS["backdoored"], label=f"in both top {k}")
        panel.axvline(np.sort(x)[-k], color="black", lw=0.7, ls=":")
        panel.axhline(np.sort(y)[-k], color="black", lw=0.7, ls=":")
        panel.set_title(f"{attack}\nmax ACIE {highest:.2g}", fontsize="small")
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(labelsize="x-small")
    axes[0, 0].set_ylabel("ACIE / max ACIE")
    figure.supxlabel("suspicion (robust z)", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=2)
    return figure


def options(found: pd.DataFrame, *, k: int, n_heads: int) -> Figure:
    """How many of the top `k` ACIE heads each reading of ASA has in its own top `k`, from
    `two_papers_meet.overlap_by_reading`.

    A panel per reading (down) and rule (across) with sources as rows and organisms as columns; importance alone at the
    right. The mark in the colour bar is what `k` heads drawn from all `n_heads` find.
    """
    blocks = _blocks(found.index)
    readings, rules = (list(dict.fromkeys(key[side] for key in blocks if key[1])) for side in (0, 1))
    rows = max(map(len, blocks.values()))
    figure, axes = plt.subplots(
        len(readings), len(rules) + 1, figsize=(WIDTH, 0.26 * rows * len(readings) + 2.9), squeeze=False
    )
    places = {(reading, rule): axes[y, x] for y, reading in enumerate(readings) for x, rule in enumerate(rules)}
    places["importance", ""] = axes[-1, -1]
    for panel in set(axes.flat) - {places[key] for key in blocks}:
        panel.remove()
    counts = k * found
    for key, sources in blocks.items():
        panel = places[key]
        image = _heads_found(panel, counts.loc[list(sources.values())], highest=max(1, counts.to_numpy().max()))
        panel.set_yticks(range(len(sources)), sources, fontsize="small")
        panel.tick_params(labelbottom=panel in axes[-1], labelleft=panel in axes[:, 0], length=0)
        if panel in axes[0] or not key[1]:
            panel.set_title((key[1] or "importance only").replace(", ", ",\n"), fontsize="small")
    axes[-1, -1].tick_params(labelright=True, labelleft=False)
    for panel, reading in zip(axes[:, 0], readings, strict=True):
        panel.set_ylabel(reading, fontsize="small")
    bar = figure.colorbar(image, ax=figure.axes, location="bottom", shrink=0.5, aspect=30, label=f"heads found, of {k}")
    chance = k * k / n_heads
    bar.ax.axvline(chance, color="white", lw=1.5)
    bar.ax.annotate("chance", (chance, 1), (0, 2), textcoords="offset points", ha="center", fontsize="x-small")
    return figure


def _blocks(names: Sequence[str]) -> dict[tuple[str, str], dict[str, str]]:
    """(reading, rule) -> source -> name of the row. Importance has no rule, and its kinds are its sources."""
    blocks: dict[tuple[str, str], dict[str, str]] = {}
    for name in names:
        reading, _, rest = name.partition(": ")
        rule, _, source = rest.rpartition(", ")
        blocks.setdefault((reading, rule), {})[source] = name
    return blocks


def _heads_found(panel: Axes, counts: pd.DataFrame, *, highest: float) -> AxesImage:
    """One block with its numbers."""
    image = panel.imshow(counts, cmap=SEQUENTIAL, vmin=0, vmax=highest, aspect="auto")
    for (y, x), value in np.ndenumerate(counts.to_numpy()):
        colour = "white" if value < 0.55 * highest else "black"
        panel.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize="x-small", color=colour)
    panel.set_xticks(range(counts.shape[1]), counts.columns, rotation=90, fontsize="small")
    panel.grid(False)
    return image


# --- models ---------------------------------------------------------------------------------------------------------


def fingerprints(prints: Mapping[str, Mapping[str, float]], families: Mapping[str, str | None]) -> Figure:
    """Every number of every model; clean controls above, families of triggers below, a shape per task.

    A model's task is the first part of its name, as in its attack's.
    """
    scores = list(next(iter(prints.values())))
    order = ["clean", *sorted({family for family in families.values() if family})]
    tasks = _tasks(prints)
    lines = -(-len(scores) // 3)
    figure, axes = plt.subplots(lines, 3, figsize=(WIDTH, 0.3 * lines * len(order) + 2.4), sharey=True, squeeze=False)
    for panel, score in zip(axes.flat, scores, strict=False):
        for name, family in families.items():
            task = _task(name)
            y = order.index(family or "clean") + 0.6 * (tasks.index(task) - (len(tasks) - 1) / 2) / len(tasks)
            colour = KINDS["backdoored" if family else "clean"]
            panel.plot(
                prints[name][score], y, MARKERS[tasks.index(task)], ms=4, alpha=0.75, mew=0, color=colour, clip_on=False
            )
        panel.set_title(score, fontsize="small")
        panel.set_yticks(range(len(order)), order, fontsize="small")
        panel.set_ylim(len(order) - 0.5, -0.5)
        panel.tick_params(axis="x", labelsize="x-small")
        panel.locator_params(axis="x", nbins=4)
    for panel in list(axes.flat)[len(scores) :]:
        panel.set_visible(False)
    figure.supxlabel("value of the model", fontsize="medium")
    _task_legend(figure, tasks)
    return figure


def _task(model: str) -> str:
    return model.partition("-")[0]


def _tasks(names: Iterable[str]) -> list[str]:
    return sorted({_task(name) for name in names})


def _task_legend(figure: Figure, tasks: Sequence[str]) -> None:
    handles = [
        Line2D([], [], marker=MARKERS[i], ls="", color=COLOURS["bound"], ms=5, label=task)
        for i, task in enumerate(tasks)
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(tasks), fontsize="small")


def verdicts(found: Mapping[str, Mapping]) -> Figure:
    """AUROC of each family's organisms against the clean controls with its interval, and of all together; below each
    interval its organisms, a shape per task."""
    figure, axes = plt.subplots(figsize=(WIDTH * 0.8, 0.42 * (len(found) + 1) + 1.2))
    tasks = _tasks(name for result in found.values() for name in result["organisms"])
    rows = {f"{family} ({len(result['organisms'])})": auroc_of_wins(result["wins"]) for family, result in found.items()}
    rows["all"] = auroc_of_wins([row for result in found.values() for row in result["wins"]])
    for y, (name, number) in enumerate(rows.items()):
        colour = "black" if name == "all" else COLOURS["backdoored"]
        axes.plot([number["low"], number["high"]], [y, y], color=colour, lw=1.2)
        axes.plot(number["value"], y, "|", color=colour, ms=9, mew=2, clip_on=False)
    for y, result in enumerate(found.values()):
        for name, won in zip(result["organisms"], result["wins"], strict=True):
            marker = MARKERS[tasks.index(_task(name))]
            axes.plot(np.mean(won), y + 0.28, marker, ms=4.5, alpha=0.8, mew=0, color=COLOURS["bound"], clip_on=False)
    axes.axvline(0.5, color="black", lw=0.7, ls=":")
    axes.axvline(0.95, color=COLOURS["bound"], lw=0.7, ls="--")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.02)
    axes.set_xlabel("AUROC; dotted: chance, dashed: our goal")
    _task_legend(figure, tasks)
    return figure


def head_claim(agreements: Mapping[str, Mapping[str, float]]) -> dict:
    """From attack -> `two_papers_meet.agreement_with_attribution` of the default rule."""
    numbers, passed = {}, {}
    for attack, result in agreements.items():
        numbers[attack] = {"value": result["precision"], "n": result["k"], "low": result["low"], "high": result["high"]}
        passed[attack] = result["precision"] >= 1 / 3 - 1e-9 and result["p"] <= 0.05
    chance = next(iter(agreements.values()))["expected"]
    reason = f"Share of the most suspicious heads that carry the backdoor: {span(numbers)}; by chance {chance:.2f}."
    return entry("asa-heads", numbers=numbers, passed=passed, figure="07_heads", reason=reason)


def verdict_claim(found: Mapping[str, Mapping]) -> dict:
    """From family -> `model_detection.leave_one_family_out`."""
    numbers = {family: auroc_of_wins(result["wins"]) for family, result in found.items()}
    passed = {family: number["value"] >= 0.95 for family, number in numbers.items()}
    pooled = auroc_of_wins([row for result in found.values() for row in result["wins"]])
    reason = f"AUROC over all families {pooled['value']:.2f} [{pooled['low']:.2f}, {pooled['high']:.2f}]."
    return entry("asa-verdict", numbers=numbers, passed=passed, figure="07_models", reason=reason)
