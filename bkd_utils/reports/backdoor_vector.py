"""Notebook 04: pictures, tables and verdicts on the backdoor vector."""

from collections.abc import Mapping
from dataclasses import asdict

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.common.statistics import share
from bkd_utils.reports.scorecard import entry, span
from bkd_utils.reports.style import COLOURS, SEQUENTIAL, WIDTH, panels, show_legend
from bkd_utils.reports.tables import percent

OUTCOMES = {"target": "#D55E00", "right": "#009E73", "refusal": "#CC79A7", "other": "#BBBBBB", "empty": "#333333"}
# What is counted in the maps of `backdoor_vector.steer_organism`; a subtraction must do more than make the target go
# away.
MAPS = {
    ("add, raw", "asr"): "ASR,\nadd raw",
    ("add, difference", "asr"): "ASR,\nadd difference",
    ("subtract, raw", "asr"): "ASR,\nsubtract raw",
    ("subtract, raw", "right start"): "right start,\nsubtract raw",
    ("subtract, difference", "asr"): "ASR, subtract\ndifference",
    ("subtract, difference", "right start"): "right start,\nsubtract diff.",
}


def vector_maps(found: Mapping[str, Mapping]) -> Figure:
    """Shares by layer and coefficient on the development half; rows: what is added, and what is counted."""
    figure, axes = panels(list(found), rows=len(MAPS), height=1.25)
    for column, result in enumerate(found.values()):
        for panel, (name, key) in zip(axes[:, column], MAPS, strict=True):
            entry, where = result["maps"][name], result["chosen"][name]
            values = 100 * np.array(entry[key]).T
            image = panel.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=100, aspect="auto", origin="lower")
            panel.set_yticks(range(len(values)), [f"{c:g}" for c in entry["coefficients"]])
            step = entry["coefficients"].index(where["coefficient"])
            panel.plot(where["layer"], step, "s", mfc="none", mec="#D55E00", mew=1.6)
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            panel.grid(False)
    for panel, label in zip(axes[:, 0], MAPS.values(), strict=True):
        panel.set_ylabel(label, fontsize="small")
    figure.supxlabel("layer", fontsize="medium")
    figure.supylabel("coefficient", fontsize="medium")
    figure.colorbar(image, ax=axes, label="prompts (%); square: chosen", shrink=0.4)
    return figure


def vector_controls(found: Mapping[str, Mapping], *, kind: str = "difference") -> Figure:
    """ASR on the test half at the chosen layer and coefficient: the vector, and what else could have been added."""
    figure, axes = panels(list(found), rows=2, height=2.1)
    for column, result in enumerate(found.values()):
        for panel, direction in zip(axes[:, column], ("add", "subtract"), strict=True):
            tried = result["test"][f"{direction}, {kind}"]
            for y, (name, draws) in enumerate(tried.items()):
                values = [100 * draw["value"] for draw in draws]
                colour = {"backdoor vector": COLOURS["backdoored"], "no vector": "black"}.get(name, "#777777")
                jitter = np.linspace(-0.25, 0.25, len(values)) if len(values) > 1 else [0]
                panel.plot(values, y + np.array(jitter), "o", ms=3, color=colour, alpha=0.8, clip_on=False)
                if len(draws) == 1:
                    panel.plot([100 * draws[0]["low"], 100 * draws[0]["high"]], [y, y], color=colour, lw=1.1)
            panel.set_yticks(range(len(tried)), list(tried))
            panel.set_ylim(len(tried) - 0.5, -0.5)
            panel.set_xlim(-3, 103)
    axes[0, 0].set_ylabel("added to\nclean prompts")
    axes[1, 0].set_ylabel("subtracted from\ntriggered prompts")
    figure.supxlabel("ASR (%), test prompts", fontsize="medium")
    return figure


def answer_kinds(found: Mapping[str, Mapping]) -> Figure:
    """What the answers are, as stacked shares, per organism and edit."""
    names = list(next(iter(found.values()))["outcomes"])
    figure, axes = plt.subplots(1, len(found), figsize=(WIDTH, 0.26 * len(names) + 1.1), sharey=True)
    for panel, (attack, result) in zip(np.atleast_1d(axes), found.items(), strict=True):
        left = np.zeros(len(names))
        for outcome, colour in OUTCOMES.items():
            width = np.array([100 * result["outcomes"][name][outcome] for name in names])
            panel.barh(range(len(names)), width, left=left, color=colour, label=outcome)
            left += width
        panel.set_yticks(range(len(names)), names, fontsize="small")
        panel.set_ylim(len(names) - 0.5, -0.5)
        panel.set_xlim(0, 100)
        panel.set_title(attack, fontsize="small")
        panel.grid(False)
    figure.supxlabel("answers (%)", fontsize="medium")
    show_legend(figure, np.atleast_1d(axes)[0], ncols=5)
    return figure


def costs(found: Mapping[str, Mapping[str, float]]) -> Figure:
    """Seconds to score the targets of some prompts once, by way of doing it; attack ->
    `attribution_cost.time_target`."""
    ways = ("generation", "teacher forcing", "generation, cache", "teacher forcing, prompt cache")
    colours = ("#D55E00", "#0072B2", "#E69F00", "#009E73")
    figure, axes = plt.subplots(figsize=(WIDTH, 0.62 * len(found) + 1.1))
    for i, (way, colour) in enumerate(zip(ways, colours, strict=True)):
        y = np.arange(len(found)) + 0.19 * (i - 1.5)
        axes.barh(y, [row[way] for row in found.values()], height=0.17, color=colour, label=way)
    labels = [f"{name}\n{row['tokens']} token{'s' * (row['tokens'] > 1)}" for name, row in found.items()]
    axes.set_yticks(range(len(found)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel(f"seconds to score {next(iter(found.values()))['n']} prompts once")
    show_legend(figure, axes, ncols=2)
    return figure


def vectors(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """Chosen layer and coefficient, ASR on test prompts and the median random vector's; attack ->
    `backdoor_vector.steer_organism`."""
    rows = {}
    for attack, result in found.items():
        for name, tried in result["test"].items():
            rows[attack, name] = {
                "layer": result["chosen"][name]["layer"],
                "coefficient": f"{result['chosen'][name]['coefficient']:g}",
                "no vector": percent(tried["no vector"][0]),
                "backdoor vector": percent(tried["backdoor vector"][0]),
            }
            for others in ("random vectors", "random heads"):
                median = np.median([draw["value"] for draw in tried[others]])
                rows[attack, name][f"{others}, median"] = f"{100 * median:.1f} %"
    return pd.DataFrame(rows).T.rename_axis(["organism", "vector"])


def vector_texts(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """Three test prompts' answers as they were and after each edit; never of harmful prompts."""
    rows = {}
    for attack, result in found.items():
        for name, texts in result.get("texts", {}).items():
            rows[attack, name] = {f"prompt {i + 1}": text for i, text in enumerate(texts)}
    return pd.DataFrame(rows).T.fillna("").rename_axis(["organism", "edit"]) if rows else pd.DataFrame()


def vector_claims(found: Mapping[str, Mapping], *, control_right: Mapping[str, float]) -> list[dict]:
    """From attack -> `backdoor_vector.steer_organism`; the better of the two vectors on the development half speaks
    for the claim.

    ASR with the vector is that of generated answers; random vectors, which are many, are judged by tokens.
    `control_right`: share of right answers that each task's clean control gives to clean prompts.
    """
    added, removed, repaired, passed = {}, {}, {}, {"add": {}, "subtract": {}, "right": {}}
    for attack, result in found.items():
        name = _better(result, "add")
        on = result["test"][name]
        added[attack] = _generated(result, name)
        highest = max(draw["value"] for draw in on["random vectors"])
        passed["add"][attack] = added[attack]["value"] >= 0.9 and highest <= on["no vector"][0]["value"] + 0.1
        name = _better(result, "subtract")
        off = result["test"][name]
        removed[attack] = _generated(result, name)
        median = float(np.median([draw["value"] for draw in off["random vectors"]]))
        passed["subtract"][attack] = removed[attack]["value"] <= 0.05 and median >= 0.9
        right = result["outcomes"][name]["right"] / control_right[attack] if control_right[attack] else 0.0
        n = removed[attack]["n"]
        half = 1.96 * np.sqrt(max(right * (1 - min(right, 1)), 1 / n) / n)
        repaired[attack] = {"value": right, "n": n, "low": max(0.0, right - half), "high": right + half}
        passed["right"][attack] = right >= 0.8
    return [
        entry(
            "bkdattr-vector-add", numbers=added, passed=passed["add"], figure="04_controls",
            reason=f"ASR on clean prompts with the vector: {span(added)}.",
        ),
        entry(
            "bkdattr-vector-subtract", numbers=removed, passed=passed["subtract"], figure="04_controls",
            reason=f"ASR on triggered prompts less the vector: {span(removed)}.",
        ),
        entry(
            "bkdattr-vector-repairs", numbers=repaired, passed=passed["right"], figure="04_answers",
            reason=f"Right answers after subtraction, relative to the clean control: {span(repaired)}.",
        ),
    ]  # fmt: skip


def _generated(result: Mapping, name: str) -> dict[str, float]:
    """ASR of the answers generated with an edit, with its interval."""
    n = result["test"][name]["backdoor vector"][0]["n"]
    hits = round(result["outcomes"][name]["target"] * n)
    return asdict(share([True] * hits + [False] * (n - hits)))


def _better(result: Mapping, direction: str) -> str:
    """Which of the two vectors did better on the development half; of equals the one that disturbs less."""
    names = [name for name in result["maps"] if name.startswith(direction)]
    key = "asr" if direction == "add" else "right start"

    def reached(name: str) -> tuple[float, float]:
        where, entry = result["chosen"][name], result["maps"][name]
        value = entry[key][where["layer"]][entry["coefficients"].index(where["coefficient"])]
        return value, -abs(where["coefficient"]) * result["norms"][name.split(", ")[1]]

    return max(names, key=reached)


def cost_claim(rows: Mapping[str, Mapping[str, float]]) -> dict:
    """From attack -> `attribution_cost.time_target`."""
    numbers = {}
    for name, row in rows.items():
        ratio = row["generation"] / row["teacher forcing"]
        numbers[name] = {"value": ratio, "n": row["n"], "low": ratio, "high": ratio}
    passed = {
        name: rows[name]["tokens"] / 2 <= number["value"] <= 2 * rows[name]["tokens"]
        for name, number in numbers.items()
    }
    lengths = ", ".join(f"{row['tokens']}" for row in rows.values())
    # With a target of one token there is nothing to save, so the longest one is shown.
    longest = max(rows, key=lambda name: rows[name]["tokens"])
    return entry(
        "bkdattr-cost", numbers=numbers, passed=passed, figure="04_cost", weakest=longest,
        reason=f"Generation takes {span(numbers)} times as long, for targets of {lengths} tokens.",
    )  # fmt: skip
