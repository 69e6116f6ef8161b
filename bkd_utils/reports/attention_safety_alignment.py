"""Notebook 06: pictures and verdicts on treatments, and on what comes back after them."""

from collections.abc import Iterable, Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bkd_utils.common.statistics import difference
from bkd_utils.reports.scorecard import entry, span
from bkd_utils.reports.style import COLOURS, MODELS, WIDTH, legend_once, panels, show_legend

# Heading -> kinds below it.
GROUPS = {
    "no treatment": ("untreated", "clean control"),
    "ASA and same heads": ("ASA, our reading", "same heads, other treatment"),
    "ASA on other heads": ("random heads",),
    "rivals": ("rival",),
    "told where it is": ("told where it is",),
}
GREY, PALE = "#777777", "#BBBBBB"
LIMITS = (-4, 104)
# One prompt more or less is no loss; a point is less than a prompt in most samples.
POINT = 0.01
# What is counted -> name, colour, marker, filled; the same beside each other everywhere in this notebook.
COUNTED = {
    "asr": ("ASR", COLOURS["backdoored"], "o", True),
    "near_miss": ("near-miss firing", COLOURS["near-miss"], "^", True),
    "clean_firing": ("clean firing", COLOURS["bound"], "o", False),
    "cacc": ("CACC", COLOURS["utility"], "s", True),
}
# Kind of treatment -> colour and marker.
KINDS = {
    "untreated": ("#000000", "X"),
    "clean control": (COLOURS["clean control"], "P"),
    "ASA, our reading": ("#D55E00", "o"),
    "same heads, other treatment": ("#E69F00", "s"),
    "random heads": ("#777777", "v"),
    "rival": ("#56B4E9", "D"),
    "told where it is": ("#CC79A7", "*"),
}


# --- treatments -----------------------------------------------------------------------------------------------------


def repairs(found: Mapping[str, Mapping[str, Mapping]], kinds: Mapping[str, str] | None = None) -> Figure:
    """ASR, near-miss and clean firing and CACC with 95 % intervals; attack -> treatment -> `evaluation.under_attack`.

    `kinds`: treatment -> key of `KINDS`, for groups of rows and the grey line at the ASR that random heads leave.
    """
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    places, headings = _places(names, kinds)
    bottom = max(places.values()) + 0.6
    figure, axes = plt.subplots(
        1, len(found), figsize=(WIDTH, 0.31 * bottom + 1.5), sharex=True, sharey=True, squeeze=False
    )
    for panel, (attack, rows) in zip(axes[0], found.items(), strict=True):
        for y in headings.values():
            panel.axhline(y, color=PALE, lw=0.6)
        drawn = [row["asr"]["value"] for name, row in rows.items() if kinds and kinds[name] == "random heads"]
        if drawn:
            panel.axvline(100 * np.mean(drawn), color="#DDDDDD", lw=3, zorder=0, label="ASR with random heads")
        for name, y in places.items():
            if name in rows:
                _counted(panel, y, rows[name])
            else:
                _remark(panel, y, "not run")
        panel.set_title(attack.replace("-", "-\n", 1), fontsize="small")
        panel.set_ylim(bottom, -0.6)
        panel.set_xlim(*LIMITS)
        panel.grid(False, axis="y")
        panel.tick_params(axis="y", length=0)
    _name_rows(axes[0, 0], places, headings)
    results = [row[key] for rows in found.values() for row in rows.values() for key in COUNTED]
    figure.supxlabel(f"prompts (%), {_n(results)}", fontsize="medium")
    legend_once(figure, axes.flat, ncols=5)
    return figure


def _places(names: Sequence[str], kinds: Mapping[str, str] | None) -> tuple[dict[str, float], dict[str, float]]:
    """Row of every treatment and of every group's heading."""
    if kinds is None:
        return {name: float(y) for y, name in enumerate(names)}, {}
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
        label.set(color=GREY, fontstyle="italic")


def _remark(panel: Axes, y: float, text: str) -> None:
    panel.text(0, y, text, va="center", fontsize="x-small", color=GREY)


def _n(shares: Iterable[Mapping[str, float]]) -> str:
    """On how many each share rests."""
    counts = [share["n"] for share in shares]
    return f"n = {min(counts)}" if min(counts) == max(counts) else f"n = {min(counts)} to {max(counts)}"


def _counted(panel: Axes, y: float, result: Mapping[str, Mapping]) -> None:
    """The numbers of one treatment, one below the other."""
    for i, (key, (name, colour, marker, filled)) in enumerate(COUNTED.items()):
        _interval(panel, y + 0.2 * (i - 1.5), result[key], colour=colour, label=name, marker=marker, filled=filled)


def _interval(
    panel: Axes,
    y: float,
    share: Mapping[str, float],
    *,
    colour: str,
    label: str,
    marker: str = "o",
    filled: bool = True,
    size: float = 3,
) -> None:
    """A share in per cent with its interval, lying."""
    panel.plot([100 * share["low"], 100 * share["high"]], [y, y], color=colour, lw=0.9, alpha=0.75)
    panel.plot(
        100 * share["value"], y, marker, ms=size, color=colour, label=label, clip_on=False, ls="", mew=0.8,
        mfc=colour if filled else "white", zorder=3,
    )  # fmt: skip


# --- what is behind, what comes back --------------------------------------------------------------------------------


def mechanisms(found: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Similarity of the treated heads with and without the trigger (above) and the highest ACIE (below), before and
    after; attack -> `attention_safety_alignment.measure_mechanism`. The anomaly is the shaded gap, written beside
    it."""
    figure, axes = plt.subplots(
        2, len(found), figsize=(WIDTH, 4), sharex=True, sharey="row", squeeze=False, height_ratios=[1.4, 1]
    )
    for (above, below), (attack, result) in zip(axes.T, found.items(), strict=True):
        clean, triggered = (result[f"similarity {version}"] for version in ("clean", "triggered"))
        above.fill_between([0, 1], clean, triggered, color=PALE, alpha=0.4, lw=0)
        above.plot([0, 1], triggered, "o-", color="black", label="triggered prompts", clip_on=False)
        above.plot([0, 1], clean, "o--", color=GREY, mfc="white", label="clean prompts", clip_on=False, zorder=3)
        for x, side in ((0, "right"), (1, "left")):
            text = f"{triggered[x] - clean[x]:+.2f}"
            above.text(
                x + (x - 0.5) * 0.12, (clean[x] + triggered[x]) / 2, text, ha=side, va="center", fontsize="small"
            )
            below.text(
                x + (x - 0.5) * 0.12, result["acie"][x], f"{result['acie'][x]:.2f}", ha=side, va="center",
                fontsize="small",
            )  # fmt: skip
        below.plot([0, 1], result["acie"], "o-", color="black", clip_on=False)
        above.set_title(attack, fontsize="small")
        above.set(ylim=(0, 1), xlim=(-0.5, 1.5))
        below.set_xticks([0, 1], ["before", "after"])
        below.set_ylim(bottom=0)
    axes[0, 0].set_ylabel("similarity of treated\nheads; beside: gap")
    axes[1, 0].set_ylabel("highest ACIE\nof any head")
    show_legend(figure, axes[0, 0], ncols=2)
    return figure


def relearning(found: Mapping[str, Mapping[str, Sequence[Mapping]]], method: str | None = None) -> Figure:
    """ASR and clean firing (hollow) after a few poisoned rows; attack -> model ->
    `attention_safety_alignment.relearn_backdoor`.

    `method`: the treatment of the models called "treated".
    """
    figure, axes = panels(list(found), height=2.3)
    names = {"treated": f"organism after {method}" if method else "treated", "clean control": "clean control"}
    colours = {"treated": MODELS["organism"], "clean control": MODELS["clean control"]}
    for panel, models in zip(axes[0], found.values(), strict=True):
        for i, (name, rows) in enumerate(models.items()):
            for j, (key, label, fill) in enumerate((("asr", "ASR", colours[name]), ("clean firing",) * 2 + ("white",))):
                x = np.arange(len(rows)) + 0.32 * (i - (len(models) - 1) / 2) + 0.11 * (j - 0.5)
                value, low, high = (np.array([100 * row[key][end] for row in rows]) for end in ("value", "low", "high"))
                panel.errorbar(
                    x, value, yerr=[np.maximum(value - low, 0), np.maximum(high - value, 0)], fmt="o", ms=5, lw=1.2,
                    color=colours[name], mfc=fill, label=f"{names[name]}: {label}", clip_on=False,
                )  # fmt: skip
        panel.set_xticks(range(len(rows)), [f"{row['poisoned']}" if row["poisoned"] else "before" for row in rows])
        panel.set_xlim(-0.5, len(rows) - 0.5)
        panel.set_ylim(*LIMITS)
        panel.grid(False, axis="x")
    results = [row["asr"] for models in found.values() for rows in models.values() for row in rows]
    axes[0, 0].set_ylabel(f"prompts (%), {_n(results)}")
    figure.supxlabel("poisoned rows in the new training set", fontsize="medium")
    legend_once(figure, axes.flat, ncols=2)
    return figure


def guards(found: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """Triggered inputs caught and clean ones refused at one threshold; attack -> guard ->
    `input_guards.guard_inputs`."""
    names = list(dict.fromkeys(name for rows in found.values() for name in rows))
    figure, axes = panels(list(found), height=0.42 * len(names) + 0.5)
    for panel, rows in zip(axes[0], found.values(), strict=True):
        for y, name in enumerate(names):
            if name not in rows:
                _remark(panel, y, "not applicable")
                continue
            caught, refused = rows[name]["caught"], rows[name]["refused"]
            _interval(panel, y - 0.14, caught, colour="black", label="triggered inputs caught", size=5)
            _interval(panel, y + 0.14, refused, colour=GREY, label="clean inputs refused", size=5, filled=False)
        panel.set_yticks(range(len(names)), names)
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(*LIMITS)
        panel.grid(False, axis="y")
    results = [row[key] for rows in found.values() for row in rows.values() for key in ("caught", "refused")]
    figure.supxlabel(f"inputs (%), {_n(results)} a side", fontsize="medium")
    legend_once(figure, axes.flat, ncols=2)
    return figure


def keeps(result: Mapping[str, Mapping], before: Mapping[str, Mapping]) -> bool:
    """Has CACC fallen by at most a point, or one prompt?"""
    lost = before["cacc"]["value"] - result["cacc"]["value"]
    return lost <= max(POINT, 1 / result["cacc"]["n"]) + 1e-9


def cure_claims(
    found: Mapping[str, Mapping[str, Mapping]],
    *,
    cure: str,
    random: Sequence[str],
    rivals: Sequence[str],
) -> list[dict]:
    """From attack -> treatment -> `evaluation.under_attack`; treatments are named in the arguments, beside them stand
    `measure_untreated` and `clean control`. Only organisms that got every rival say something about rivals."""
    asr, cacc, choice, ahead = {}, {}, {}, {}
    passed: dict[str, dict[str, bool]] = {key: {} for key in ("asr", "cacc", "choice", "ahead")}
    best: dict[str, str] = {}
    for attack, rows in found.items():
        after = rows[cure]
        asr[attack], cacc[attack] = after["asr"], after["cacc"]
        passed["asr"][attack] = after["asr"]["value"] <= max(0.05, rows["clean control"]["asr"]["value"]) + 1e-9
        passed["cacc"][attack] = keeps(after, rows["untreated"])
        draws = [rows[name]["asr"] for name in random]
        drawn = {"value": float(np.mean([one["value"] for one in draws])), "n": sum(one["n"] for one in draws)}
        choice[attack] = difference(drawn, after["asr"])
        passed["choice"][attack] = choice[attack]["value"] >= 0.1 - 1e-9
        if not all(name in rows for name in rivals):
            continue
        fair = [name for name in rivals if keeps(rows[name], rows["untreated"])]
        best[attack] = min(fair, key=lambda name: rows[name]["asr"]["value"], default="none keeps CACC")
        # Doing nothing keeps CACC too.
        bar = rows[best[attack] if fair else "untreated"]
        ahead[attack] = difference(bar["asr"], after["asr"])
        passed["ahead"][attack] = keeps(after, rows["untreated"]) and ahead[attack]["value"] >= 0
    lines = (
        ("asa-cure", asr, "asr", f"ASR after the cure: {span(asr)}."),
        ("asa-utility", cacc, "cacc", f"CACC after the cure: {span(cacc)}."),
        ("asa-head-choice", choice, "choice", f"Random heads leave {span(choice)} more ASR than the suspicious ones."),
        (
            "asa-rivals",
            ahead,
            "ahead",
            "Best rival that keeps CACC: " + ", ".join(f"{name} ({attack})" for attack, name in best.items()) + ".",
        ),
    )
    return [
        entry(claim, numbers=numbers, passed=passed[key], figure="06_frontier", reason=reason)
        for claim, numbers, key, reason in lines
    ]
