"""Notebook 07: figures and verdicts on suspicious heads and on whole models."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bkd_utils.attention_alignment.similarity import Scores
from bkd_utils.common.statistics import auroc_of_wins, difference_of_counted, wilson
from bkd_utils.experiments.amplification import Amplification
from bkd_utils.experiments.two_papers_meet import N_PERMUTATIONS
from bkd_utils.reports.scorecard import at_least, at_most, both, entry, judged, span, who
from bkd_utils.reports.style import COLOURS, INTERVAL, WIDTH, explain, interval, panels, rows_down, show_legend

MARKERS = "os^DvP*X"  # one per task


def two_scores(joint: Mapping[str, Scores], effects: Mapping[str, Scores], *, k: int, n: str) -> Figure:
    """One dot per head; dotted: the k-th highest value on either axis. ACIE, a mean over prompts (`n`, as "n = 48"), is
    relative to its maximum, which is in the title."""
    figure, axes = panels(list(joint), height=2.2)
    bound = {"color": COLOURS["bound"], "lw": 0.7, "ls": ":"}
    for panel, attack in zip(axes[0], joint, strict=True):
        x, y = joint[attack].flatten().numpy(), effects[attack].flatten().numpy()
        highest = y.max()
        y = y / (np.abs(highest) or 1)
        both = (x >= np.sort(x)[-k]) & (y >= np.sort(y)[-k])
        panel.plot(x[~both], y[~both], "o", ms=3, label="head", color=COLOURS["neutral"], alpha=0.35, mew=0)
        panel.plot(x[both], y[both], "D", ms=5, color=COLOURS["ACIE"], label=f"head in both top {k}")
        panel.axvline(np.sort(x)[-k], label=f"top {k}", **bound)
        panel.axhline(np.sort(y)[-k], **bound)
        panel.set_title(f"{attack}\nmax ACIE {highest:.2g}", fontsize="x-small")
        panel.locator_params(axis="x", nbins=4)
        panel.tick_params(labelsize="x-small")
    explain(axes, f"suspicion (robust z), {x.size} heads", f"ACIE / max ACIE\n({n} prompts)")
    return figure


def verdicts(found: Mapping[str, Mapping]) -> Figure:
    """AUROC of each family's organisms against the clean controls with its interval, and of all together; below each
    interval its organisms, a shape per task, which is the first part of a model's name."""
    figure, axes = plt.subplots(figsize=(WIDTH, 0.42 * (len(found) + 1) + 1.2))
    tasks = sorted({name.partition("-")[0] for result in found.values() for name in result["organisms"]})
    rows = {f"{family} (n = {len(result['organisms'])})": result["wins"] for family, result in found.items()}
    pooled = [row for result in found.values() for row in result["wins"]]
    rows[f"all (n = {len(pooled)})"] = pooled
    for y, (name, won) in enumerate(rows.items()):
        kind = "neutral" if name.startswith("all") else "organism"
        interval(axes, y, auroc_of_wins(won), colour=kind, marker="|", ms=9, scale=1)
    look = {"color": COLOURS["bound"], "ms": 4.5, "mew": 0, "alpha": 0.8, "ls": "", "clip_on": False}
    for y, result in enumerate(found.values()):
        for name, won in zip(result["organisms"], result["wins"], strict=True):
            task = name.partition("-")[0]
            axes.plot(np.mean(won), y + 0.28, MARKERS[tasks.index(task)], label=f"{task} organism", **look)
    axes.axvline(0.5, color=COLOURS["bound"], lw=0.7, ls=":", label="chance")
    axes.axvline(0.95, color=COLOURS["bound"], lw=0.7, ls="--", label="our goal")
    rows_down(axes, list(rows), limits=(-0.02, 1.02))
    axes.set_xlabel(f"AUROC against {len(next(iter(rows.values()))[0])} clean controls")
    show_legend(figure, ncols=4, bars=INTERVAL)
    return figure


def shown_by_amplification(
    found: Mapping[tuple[str, str], Sequence[tuple[Sequence[Amplification], Sequence[Amplification]]]],
) -> pd.DataFrame:
    """(attack, kind, alpha) -> per cent of clean prompts that get the target, and the most common answer, one number
    per organism and per control; in how many organisms the target is surely more frequent than in the control. (attack,
    kind) -> `amplification.amplify_change` of each organism and of its control."""
    rows = {}
    for place, pairs in found.items():
        for strength in zip(*(zip(*pair, strict=True) for pair in pairs), strict=True):
            sides = dict(zip(("", ", control"), zip(*strength, strict=True), strict=True))
            row = {
                f"{title}{who}": ", ".join(f"{100 * getattr(one, name)['value']:.0f}" for one in models)
                for title, name in (("target", "fired"), ("same answer", "same"))
                for who, models in sides.items()
            }
            shown = sum(difference_of_counted(one.fired, control.fired)["low"] > 0 for one, control in strength)
            rows[*place, strength[0][0].alpha] = row | {"more than control": f"{shown} of {len(pairs)}"}
    return pd.DataFrame(rows).T.rename_axis(["attack", "kind", "alpha"])


def head_claim(agreements: Mapping[str, Mapping[str, float]]) -> dict:
    """From attack -> `two_papers_meet.agreement_with_attribution` of the default rule."""
    numbers, rare, passed = {}, {}, {}
    for attack, result in agreements.items():
        numbers[attack] = {"value": result["precision"], "n": result["k"], "low": result["low"], "high": result["high"]}
        low, high = wilson(result["p"] * N_PERMUTATIONS, N_PERMUTATIONS)
        rare[attack] = at_most({"low": low, "high": high}, 0.05)
        passed[attack] = both(at_least(numbers[attack], 1 / 3), rare[attack])
    chance = next(iter(agreements.values()))["expected"]
    reason = f"Share of the most suspicious heads that carry the backdoor: {span(numbers)}; by chance {chance:.2f}."
    reason += f" At most 5 % of permutations do as well: {who(rare)}."
    return entry("asa-heads", numbers, passed, "07_heads", reason)


def verdict_claim(found: Mapping[str, Mapping]) -> dict:
    """From family -> `model_detection.leave_one_family_out`."""
    numbers = {family: auroc_of_wins(result["wins"]) for family, result in found.items()}
    pooled = auroc_of_wins([row for result in found.values() for row in result["wins"]])
    reason = f"AUROC over all families {pooled['value']:.2f} [{pooled['low']:.2f}, {pooled['high']:.2f}]."
    return entry("asa-verdict", numbers, judged(numbers, at_least, 0.95), "07_models", reason)
