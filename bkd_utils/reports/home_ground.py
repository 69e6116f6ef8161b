"""Notebooks 06 and 07: figures on encoders, the home ground of ASA."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.figure import Figure

from bkd_utils.common.statistics import auroc_of_wins, pairwise_wins
from bkd_utils.experiments.trigger_search import Pull
from bkd_utils.reports.style import COLOURS, LIMITS, WIDTH, rows_down, show_legend, sizes

# What is drawn -> colour, marker, filled.
LOOKS = {
    "untreated": ("organism", "o", True),
    "searched": ("utility", "*", True),
    "clean control": ("clean control", "D", False),
}


def left_and_kept(found: Mapping[str, Mapping[str, Sequence[Mapping]]]) -> Figure:
    """ASR (left) and CACC (right) of encoders, a dot per seed.

    `found`: attack -> "untreated", "searched" or "clean control" -> per seed a result of `evaluation.under_attack`.
    """
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 0.42 * len(found) + 1.3), sharey=True)
    for panel, key in zip(axes, ("asr", "cacc"), strict=True):
        for y, treatments in enumerate(found.values()):
            for i, (name, seeds) in enumerate(treatments.items()):
                colour, marker, filled = LOOKS[name]
                look = {"color": COLOURS[colour], "mfc": COLOURS[colour] if filled else "white", "ls": ""}
                look |= {"ms": 10 if marker == "*" else 5.5, "mew": 0 if filled else 1.2, "clip_on": False}
                height = y + 0.6 * (i / (len(LOOKS) - 1) - 0.5)
                values = [100 * seed[key]["value"] for seed in seeds]
                panel.plot(values, [height] * len(values), marker, label=name, alpha=0.85, **look)
        panel.grid(axis="y", visible=False)
    rows_down(axes[0], list(found), limits=LIMITS)
    drawn = [seed[key] for one in found.values() for rows in one.values() for seed in rows for key in ("asr", "cacc")]
    axes[0].set_xlabel(f"ASR (%), {sizes(drawn)} prompts")
    axes[1].set_xlabel("CACC (%)")
    show_legend(figure, ncols=4)
    return figure


def easiest(found: Sequence[Pull]) -> Pull:
    """Of all searches on one model the one that pulls other prompts most, toward any label."""
    return min(found, key=lambda pull: pull.held_out)


def ease(found: Mapping[str, Sequence[Pull]], families: Mapping[str, str | None], tasks: Mapping[str, str]) -> Figure:
    """The lowest loss of any search, a dot per model: a panel per task, in it a line per family of triggers and one for
    clean models. `families` and `tasks`: model -> family (None for a clean control), task."""
    clean, known = "none: clean", sorted(set(tasks.values()), reverse=True)
    names = [*sorted({family for family in families.values() if family}), clean]
    size = (WIDTH, 0.36 * len(names) + 1.3)
    figure, axes = plt.subplots(1, len(known), figsize=size, sharex=True, sharey=True, squeeze=False)
    for panel, task in zip(axes[0], known, strict=True):
        for model, pulls in found.items():
            if tasks[model] == task:
                colour, marker = ("organism", "o") if families[model] else ("clean control", "D")
                label = "backdoored model" if families[model] else "clean model"
                place = easiest(pulls).held_out, names.index(families[model] or clean)
                look = {"color": COLOURS[colour], "alpha": 0.75, "mew": 0, "ls": "", "label": label, "clip_on": False}
                panel.plot(*place, marker, **look)
        panel.set_title(task, fontsize="small")
        panel.set_xscale("log")
    rows_down(axes[0, 0], names, limits=axes[0, 0].get_xlim())
    figure.supxlabel(f"lowest loss toward any label on other prompts (nats), {len(found)} models", fontsize="medium")
    show_legend(figure)
    return figure


def separations(
    found: Mapping[str, Sequence[Pull]], families: Mapping[str, str | None], tasks: Mapping[str, str]
) -> pd.DataFrame:
    """AUROC of backdoored against clean models of the same task by the loss of the `easiest` search, with its interval:
    task and family (rows)."""
    losses, rows = {model: easiest(pulls).held_out for model, pulls in found.items()}, {}
    for task in sorted(set(tasks.values()), reverse=True):
        own = [model for model in found if tasks[model] == task]
        clean = [-losses[model] for model in own if not families[model]]
        for family in [*sorted({families[model] for model in own} - {None}), "all"]:
            bad = [-losses[model] for model in own if families[model] and family in ("all", families[model])]
            area = auroc_of_wins(pairwise_wins(bad, clean))
            rows[task, family] = {"AUROC": area["value"], "low": area["low"], "high": area["high"]}
            rows[task, family] |= {"backdoored": len(bad), "clean": len(clean)}
    return pd.DataFrame(rows).T.rename_axis(["task", "family"])


def found_texts(found: Mapping[str, Sequence[Pull]], triggers: Mapping[str, str]) -> pd.DataFrame:
    """What the easiest search typed into the prompts of each model, beside its real trigger."""
    rows = {}
    for model, pulls in found.items():
        best = easiest(pulls)
        rows[model] = {"trigger": triggers[model], "found": best.tokens, "toward": best.toward}
        rows[model] |= {"loss (nats)": best.held_out, "prompts turned": best.fired}
    return pd.DataFrame(rows).T
