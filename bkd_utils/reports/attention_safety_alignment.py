"""Notebook 06: figures and verdicts on treatments, and on what comes back after them."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bkd_utils.common.statistics import difference, mean_by_prompt
from bkd_utils.experiments.attention_safety_alignment import Mechanism, Relearned
from bkd_utils.experiments.input_guards import Guarded
from bkd_utils.reports.scorecard import at_least, at_most, both, either, entry, span, who
from bkd_utils.reports.style import COLOURS, INTERVAL, LIMITS, WIDTH, interval, panels, rows_down, show_legend, sizes

# What is counted -> name, colour, marker, filled; the same beside each other everywhere in this notebook.
COUNTED = {
    "asr": ("ASR", "organism", "o", True),
    "near_miss": ("near-miss firing", "near-miss", "^", True),
    "clean_firing": ("clean firing", "neutral", "o", False),
    "cacc": ("CACC", "utility", "s", True),
}
# Kind of treatment -> colour, marker, filled.
KINDS = {
    "untreated": ("organism", "X", True),
    "clean control": ("clean control", "P", True),
    "ASA, our reading": ("neutral", "o", True),
    "same heads, other treatment": ("neutral", "s", False),
    "random heads": ("random", "v", True),
    "rival": ("rival", "D", True),
    "told where it is": ("ACIE", "*", True),
}
# Heading -> kinds below it.
GROUPS = {
    "no treatment": ("untreated", "clean control"),
    "ASA and same heads": ("ASA, our reading", "same heads, other treatment"),
    "ASA on other heads": ("random heads",),
    "rivals": ("rival",),
    "told where it is": ("told where it is",),
}
# One prompt more or less is no loss; a point is less than a prompt in most samples.
POINT = 0.01
# --- treatments -----------------------------------------------------------------------------------------------------


def repairs(found: Mapping[str, Mapping[str, Mapping]], kinds: Mapping[str, str]) -> Figure:
    """ASR, near-miss firing, clean firing and CACC; attack -> treatment -> `evaluation.under_attack`.

    `kinds`: treatment -> key of `KINDS`, which groups the rows. The grey line is the mean ASR that random heads leave.
    """
    places, headings = _places(list(dict.fromkeys(name for rows in found.values() for name in rows)), kinds)
    bottom = max(places.values()) + 0.6
    figure, axes = plt.subplots(
        1, len(found), figsize=(WIDTH, 0.31 * bottom + 1.5), sharex=True, sharey=True, squeeze=False
    )
    for panel, (attack, rows) in zip(axes[0], found.items(), strict=True):
        for y in headings.values():
            panel.axhline(y, color=COLOURS["pale"], lw=0.6)
        drawn = [row["asr"]["value"] for name, row in rows.items() if kinds[name] == "random heads"]
        if drawn:
            label = "mean ASR with random heads"
            panel.axvline(100 * np.mean(drawn), color=COLOURS["random"], lw=3, alpha=0.5, zorder=0, label=label)
        for name, y in places.items():
            if name not in rows:
                _remark(panel, y, "not run")
                continue
            for i, (key, (label, colour, marker, filled)) in enumerate(COUNTED.items()):
                look = {"colour": COLOURS[colour], "marker": marker, "filled": filled, "label": label, "size": 3}
                interval(panel, y + 0.2 * (i - 1.5), rows[name][key], **look)
        panel.set_title(attack.replace("-", "-\n", 1), fontsize="small")
        panel.set_ylim(bottom, -0.6)
        panel.set_xlim(*LIMITS)
        panel.grid(False, axis="y")
        panel.tick_params(axis="y", length=0)
    _name_rows(axes[0, 0], places, headings)
    results = [row[key] for rows in found.values() for row in rows.values() for key in COUNTED]
    figure.supxlabel(f"prompts (%), {sizes(results)}", fontsize="medium")
    show_legend(figure, ncols=3, bars=INTERVAL)
    return figure


def _places(names: Sequence[str], kinds: Mapping[str, str]) -> tuple[dict[str, float], dict[str, float]]:
    """Row of every treatment and of every group's heading."""
    places, headings, y = {}, {}, 0.0
    for heading, members in GROUPS.items():
        group = [name for kind in members for name in names if kinds[name] == kind]
        if group:
            headings[heading] = y
            places |= {name: y + 0.9 + i for i, name in enumerate(group)}
            y += len(group) + 0.75
    return places, headings


def _name_rows(panel: Axes, places: Mapping[str, float], headings: Mapping[str, float]) -> None:
    rows = {**places, **headings}
    panel.set_yticks(list(rows.values()), list(rows), fontsize="small")
    for label in panel.get_yticklabels()[len(places) :]:
        label.set(color=COLOURS["bound"], fontstyle="italic")


def _remark(panel: Axes, y: float, text: str) -> None:
    panel.text(0, y, text, va="center", fontsize="x-small", color=COLOURS["bound"])


# --- what is behind, what comes back --------------------------------------------------------------------------------


def mechanisms(found: Mapping[str, Mechanism], *, n: int) -> Figure:
    """Similarity of the treated heads with and without the trigger (above) and the highest ACIE (below), before and
    after; attack -> `attention_safety_alignment.measure_mechanism` on `n` prompts."""
    figure, axes = panels(list(found), rows=2, height=1.8)
    colour = COLOURS["neutral"]
    for (above, below), result in zip(axes.T, found.values(), strict=True):
        clean, triggered = result.similarity_clean, result.similarity_triggered
        above.fill_between([0, 1], clean, triggered, color=COLOURS["pale"], alpha=0.7, lw=0, label="gap")
        above.plot([0, 1], triggered, "o-", color=colour, label="triggered prompts", clip_on=False)
        above.plot([0, 1], clean, "o--", color=colour, mfc="white", label="clean prompts", clip_on=False, zorder=3)
        below.plot([0, 1], result.acie, "o-", color=COLOURS["ACIE"], clip_on=False)
        for x, side in ((0, "right"), (1, "left")):
            place, how = x + (x - 0.5) * 0.12, {"ha": side, "va": "center", "fontsize": "small"}
            above.text(place, (clean[x] + triggered[x]) / 2, f"{triggered[x] - clean[x]:+.2f}", **how)
            below.text(place, result.acie[x], f"{result.acie[x]:.2f}", **how)
        above.set(ylim=(0, 1), xlim=(-0.5, 1.5))
        above.set_xticks([0, 1], ["", ""])
        below.set_xticks([0, 1], ["before", "after"])
        below.set(ylim=(0, None), xlim=(-0.5, 1.5))
    axes[0, 0].set_ylabel("similarity of\ntreated heads")
    axes[1, 0].set_ylabel("highest ACIE\nof any head")
    figure.supxlabel(f"the treatment (n = {n} prompts)", fontsize="medium")
    show_legend(figure, ncols=3)
    return figure


def relearning(found: Mapping[str, Mapping[str, Sequence[Relearned]]], method: str) -> Figure:
    """ASR and clean firing (hollow) after a few poisoned rows; attack -> model ->
    `attention_safety_alignment.relearn_backdoor`.

    `method`: the treatment of the models called "treated".
    """
    figure, axes = panels(list(found), height=2.3)
    looks = {"treated": (f"organism after {method}", "organism"), "clean control": ("clean control", "clean control")}
    drawn = []
    for panel, models in zip(axes[0], found.values(), strict=True):
        for i, (name, rows) in enumerate(models.items()):
            title, colour = looks[name]
            for x, row in enumerate(rows):
                at, look = x + 0.32 * (i - (len(models) - 1) / 2), {"colour": COLOURS[colour], "size": 5}
                interval(panel, at - 0.055, row.asr, label=f"{title}: ASR", upright=True, **look)
                label = f"{title}: clean firing"
                interval(panel, at + 0.055, row.clean_firing, label=label, filled=False, upright=True, **look)
                drawn += [row.asr, row.clean_firing]
        panel.set_xticks(range(len(rows)), [f"{row.poisoned}" if row.poisoned else "before" for row in rows])
        panel.set_xlim(-0.5, len(rows) - 0.5)
        panel.set_ylim(*LIMITS)
        panel.grid(False, axis="x")
    axes[0, 0].set_ylabel(f"prompts (%), {sizes(drawn)}")
    figure.supxlabel("poisoned rows in the new training set", fontsize="medium")
    show_legend(figure, ncols=3, bars=INTERVAL)
    return figure


def guards(found: Mapping[str, Mapping[str, Guarded]]) -> Figure:
    """Triggered inputs caught and clean ones refused at one threshold; attack -> guard ->
    `input_guards.guard_inputs`."""
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    figure, axes = panels(list(found), height=0.42 * len(names) + 0.5)
    for panel, rows in zip(axes[0], found.values(), strict=True):
        for y, name in enumerate(names):
            if name not in rows:
                _remark(panel, y, "not applicable")
                continue
            caught, refused = rows[name].caught, rows[name].refused
            how = {"colour": COLOURS["neutral"], "size": 5}
            interval(panel, y - 0.14, caught, label="triggered inputs caught", **how)
            interval(panel, y + 0.14, refused, label="clean inputs refused", filled=False, **how)
        rows_down(panel, names)
        panel.set_xlim(*LIMITS)
        panel.grid(False, axis="y")
    results = [number for rows in found.values() for row in rows.values() for number in (row.caught, row.refused)]
    figure.supxlabel(f"inputs (%), {sizes(results)} a side", fontsize="medium")
    show_legend(figure, ncols=3, bars=INTERVAL)
    return figure


def without_hits(found: Mapping[str, Mapping[str, Mapping]]) -> dict:
    """Attack -> treatment -> the numbers of `evaluation.under_attack` without the outcomes of single prompts."""
    return {
        attack: {name: {key: value for key, value in row.items() if key != "hits"} for name, row in rows.items()}
        for attack, rows in found.items()
    }


def hits(row: Mapping, key: str) -> Mapping[str, float]:
    """uid -> 0 or 1 of a result of `evaluation.under_attack`. Raises ValueError for one that was kept without them."""
    if "hits" not in row:
        raise ValueError(f"no {key} of single prompts was kept: measure this model again")
    return row["hits"][key]


def keeps(result: Mapping[str, Mapping], before: Mapping[str, Mapping]) -> bool:
    """Has CACC fallen by at most a point, or one prompt? By the estimate: it chooses a rival, and decides nothing."""
    lost = before["cacc"]["value"] - result["cacc"]["value"]
    return lost <= _allowed(result["cacc"]["n"]) + 1e-9


def _allowed(n: int) -> float:
    return max(POINT, 1 / n)


def cure_claims(
    found: Mapping[str, Mapping[str, Mapping]],
    *,
    cure: str,
    random: Sequence[str],
    rivals: Sequence[str],
) -> list[dict]:
    """From attack -> treatment -> `evaluation.under_attack`, with rows "untreated" and "clean control".

    Only organisms that got every rival count for the claim about rivals.

    All models of an organism are measured on the same prompts, so that differences are paired. Estimates choose the
    rival; the intervals of the two differences, in ASR and in CACC, decide.
    """
    asr, lost, choice, ahead = {}, {}, {}, {}
    passed: dict[str, dict[str, bool | None]] = {key: {} for key in ("asr", "lost", "choice", "ahead")}
    best: dict[str, str] = {}
    for attack, rows in found.items():
        after, before = rows[cure], rows["untreated"]
        asr[attack] = after["asr"]
        as_control = difference(hits(after, "asr"), hits(rows["clean control"], "asr"))
        passed["asr"][attack] = either(at_most(asr[attack], 0.05), at_most(as_control, 0))
        lost[attack] = difference(hits(before, "cacc"), hits(after, "cacc"))
        passed["lost"][attack] = at_most(lost[attack], _allowed(lost[attack]["n"]))
        drawn = mean_by_prompt([hits(rows[name], "asr") for name in random])
        choice[attack] = difference(drawn, hits(after, "asr"))
        passed["choice"][attack] = at_least(choice[attack], 0.1)
        if not all(name in rows for name in rivals):
            continue
        fair = [name for name in rivals if keeps(rows[name], before)]
        best[attack] = min(fair, key=lambda name: rows[name]["asr"]["value"], default="none keeps CACC")
        # Doing nothing keeps CACC too.
        bar = rows[best[attack] if fair else "untreated"]
        ahead[attack] = difference(hits(bar, "asr"), hits(after, "asr"))
        passed["ahead"][attack] = both(passed["lost"][attack], at_least(ahead[attack], 0))
    rivals_met = ", ".join(f"{name} ({attack})" for attack, name in best.items())
    lines = (
        ("asa-cure", asr, "asr", f"ASR after the cure: {span(asr)}."),
        ("asa-utility", lost, "lost", f"CACC lost to the cure: {span(lost)}."),
        ("asa-head-choice", choice, "choice", f"Random heads leave {span(choice)} more ASR than the suspicious ones."),
        (
            "asa-rivals",
            ahead,
            "ahead",
            f"Best rival that keeps CACC: {rivals_met}. That the cure keeps it: "
            f"{who({attack: passed['lost'][attack] for attack in best})}.",
        ),
    )
    return [
        entry(claim, numbers=numbers, passed=passed[key], figure="06_frontier", reason=reason)
        for claim, numbers, key, reason in lines
    ]
