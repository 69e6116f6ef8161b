"""Notebook 04: pictures, tables and verdicts on the backdoor vector."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from bkd_utils.common.statistics import difference_of_counted, independent_ratio, over_splits, share
from bkd_utils.experiments.attribution_cost import TargetCost
from bkd_utils.experiments.backdoor_vector import Steering
from bkd_utils.reports import style
from bkd_utils.reports.scorecard import at_least, at_most, both, by_attack, entries, entry, judged, span, who
from bkd_utils.reports.style import COLOURS, WIDTH, explain, interval, panels, rows_down, sizes
from bkd_utils.reports.tables import percent

OUTCOMES = {"target": "organism", "right": "utility", "refusal": "refusal", "other": "pale", "empty": "neutral"}
# What is tried -> colour; anything else is a rival direction.
TRIED = {"no vector": "neutral", "random vectors": "random", "random heads": "random"}
TRIED |= {"backdoor vector": "ACIE", "projected out": "ACIE"}
# Direction and field of `ShareMap` -> title of a column.
MAPS = {
    ("add", "asr"): "ASR,\nadded",
    ("subtract", "asr"): "ASR,\nsubtracted",
    ("subtract", "right_start"): "right start,\nsubtracted",
}
# Field of `TargetCost` -> what it is called.
WAYS = {
    "generation": "generation",
    "teacher_forcing": "teacher forcing",
    "generation_cached": "generation, cache",
    "teacher_forcing_cached": "teacher forcing, prompt cache",
}


def vector_maps(result: Steering, *, name: str, n: int) -> Figure:
    """Shares of `n` development prompts of an organism by layer and coefficient, a square at what was chosen."""
    figure, axes = panels(list(MAPS.values()), rows=2, height=1.7, sharex=False, sharey=False)
    for panels_of, kind in zip(axes, ("raw", "difference"), strict=True):
        for panel, (direction, key) in zip(panels_of, MAPS, strict=True):
            shares, where = (part[f"{direction}, {kind}"] for part in (result.maps, result.chosen))
            values, rows = 100 * np.array(getattr(shares, key)).T, [f"{c:g}" for c in shares.coefficients]
            mesh = style.heat_map(panel, values, rows=rows, columns=range(values.shape[1]), vmin=0, vmax=100)
            place = where.layer + 0.5, shares.coefficients.index(where.coefficient) + 0.5
            for colour, width in ((COLOURS["neutral"], 3), ("white", 1.3)):
                panel.plot(*place, "s", ms=6, mfc="none", mec=colour, mew=width)
        panels_of[0].set_ylabel(f"{kind} vector,\ncoefficient")
    explain(axes, f"layer ({name}, n = {n} prompts)")
    figure.colorbar(mesh, ax=axes, label="prompts (%); square: chosen", shrink=0.7)
    return figure


def vector_controls(found: Mapping[str, Steering]) -> Figure:
    """ASR on test prompts at the chosen layer and coefficient with the difference vector and with its controls."""
    figure, axes = panels(list(found), rows=2, height=2.1)
    drawn = []
    for column, result in enumerate(found.values()):
        for panel, direction in zip(axes[:, column], ("add", "subtract"), strict=True):
            tried = result.test[f"{direction}, difference"]
            for y, (name, draws) in enumerate(tried.items()):
                colour = TRIED.get(name, "rival")
                drawn += draws
                if len(draws) == 1:
                    hollow = {"mfc": "white"} if name == "projected out" else {}
                    interval(panel, y, draws[0], colour=colour, **hollow)
                    continue
                values, places = [100 * draw["value"] for draw in draws], y + np.linspace(-0.25, 0.25, len(draws))
                panel.plot(values, places, "o", ms=3, color=COLOURS[colour], clip_on=False)
            rows_down(panel, list(tried))
    x = f"ASR (%), test prompts, {sizes(drawn)}; random: one dot per draw"
    explain(axes, x, "added to\nclean prompts", "subtracted from\ntriggered prompts", ncols=1, bars=style.INTERVAL)
    return figure


def answer_kinds(found: Mapping[str, Steering], *, n: int) -> Figure:
    """What `n` answers are, as stacked shares, per organism and edit."""
    names = list(next(iter(found.values())).outcomes)
    figure, axes = panels(list(found), height=0.26 * len(names) + 0.5)
    for panel, result in zip(axes[0], found.values(), strict=True):
        left = np.zeros(len(names))
        for outcome, colour in OUTCOMES.items():
            width = np.array([100 * result.outcomes[name][outcome] for name in names])
            panel.barh(range(len(names)), width, left=left, color=COLOURS[colour], label=outcome)
            left += width
        rows_down(panel, names, limits=(0, 100))
        panel.grid(False)
    explain(axes, f"answers (%), n = {n}", ncols=5)
    return figure


def costs(found: Mapping[str, TargetCost]) -> Figure:
    """Median seconds to score the target of all prompts once, in four ways; open marks are those with a cache."""
    figure, axes = plt.subplots(figsize=(WIDTH, 0.42 * len(found) + 1.3))
    for i, (way, label) in enumerate(WAYS.items()):
        seconds = [np.median(getattr(row, way)) for row in found.values()]
        places = np.arange(len(found)) + 0.16 * (i - 1.5)
        kind = ("neutral", "o" if way.startswith("generation") else "s", not way.endswith("cached"))
        style.dots(axes, seconds, places, kind, ms=5, mew=1, clip_on=True, label=label)
    names = [f"{name}\n{row.tokens} token{'s' * (row.tokens > 1)}" for name, row in found.items()]
    axes.set_xscale("log")
    rows_down(axes, names, limits=axes.get_xlim())
    axes.set_xlabel(f"seconds to score the target of all prompts once, n = {next(iter(found.values())).n} prompts")
    style.show_legend(figure, ncols=4)
    return figure


def vectors(found: Mapping[str, Steering]) -> pd.DataFrame:
    """Chosen layer and coefficient, and ASR on test prompts with the vector and with the median random one."""
    rows = {}
    for attack, result in found.items():
        for name, tried in result.test.items():
            where = result.chosen[name]
            row = {"layer": where.layer, "coefficient": f"{where.coefficient:g}"}
            row |= {one: percent(tried[one][0]) for one in ("no vector", "backdoor vector")}
            medians = {others: _median(tried[others])["value"] for others in ("random vectors", "random heads")}
            row |= {f"{others}, median": f"{100 * value:.1f} %" for others, value in medians.items()}
            rows[attack, name] = row
    return pd.DataFrame(rows).T.rename_axis(["organism", "vector"])


def vector_texts(found: Mapping[str, Steering]) -> pd.DataFrame:
    """Three test prompts' answers as they were and after each edit; never of harmful prompts."""
    rows = {}
    for attack, result in found.items():
        for name, texts in (result.texts or {}).items():
            rows[attack, name] = {f"prompt {i + 1}": text for i, text in enumerate(texts)}
    return pd.DataFrame(rows).T.fillna("").rename_axis(["organism", "edit"]) if rows else pd.DataFrame()


def vector_seeds(found: Mapping[str, Mapping[str, Steering]]) -> Figure:
    """ASR on test prompts with the better vector added and subtracted, and right answers to triggered prompts of every
    label: a dot per seed, a row per attack, a column of panels per kind of organism. Grey: the median random vector."""
    figure, axes = panels(list(found), rows=3, height=1.7, sharex=False)
    drawn = []
    for column, results in enumerate(found.values()):
        attacks = by_attack(results)
        for y, seeds in enumerate(attacks.values()):
            for place, one in zip(y + np.linspace(-0.22, 0.22, 3), seeds, strict=False):
                added, removed = (better(one, direction) for direction in ("add", "subtract"))
                shown = [_answered(one, added), _answered(one, removed), one.right[removed]]
                medians = [_median(one.test[name]["random vectors"])["value"] for name in (added, removed)]
                for panel, number, colour in zip(axes[:, column], shown, ("ACIE", "ACIE", "utility"), strict=True):
                    interval(panel, place, number, colour=colour)
                for panel, median in zip(axes[:2, column], medians, strict=True):
                    panel.plot([100 * median], [place], "|", ms=7, color=COLOURS["random"], clip_on=False)
                drawn += shown
        for panel in axes[:, column]:
            rows_down(panel, list(attacks))
    left = ("added: ASR", "subtracted:\nASR left", "subtracted:\nright answers")
    x = f"per cent of test prompts, {sizes(drawn)}; one dot per seed; grey: median random vector"
    explain(axes, x, *left, bars=style.INTERVAL)
    return figure


def vector_claims(
    found: Mapping[str, Steering], *, control_right: Mapping[str, Mapping[str, float]], kind: str
) -> list[dict]:
    """Three lines of the scorecard for one kind of organisms, judged by the vector that did better on development
    prompts. ASR with the vector is that of generated answers; random vectors, which are many, are judged by tokens.
    `control_right`: organism -> share of right answers of its clean control to clean prompts."""
    added, removed, repaired, quiet, left, on, off = {}, {}, {}, {}, {}, {}, {}
    for organism, result in found.items():
        name = better(result, "add")
        tried = result.test[name]
        added[organism] = _answered(result, name)
        highest = max(tried["random vectors"], key=lambda draw: draw["value"])
        quiet[organism] = at_most(difference_of_counted(highest, tried["no vector"][0]), 0.1)
        on[organism] = both(at_least(added[organism], 0.9), quiet[organism])
        name = better(result, "subtract")
        removed[organism] = _answered(result, name)
        left[organism] = at_least(_median(result.test[name]["random vectors"]), 0.9)
        off[organism] = both(at_most(removed[organism], 0.05), left[organism])
        repaired[organism] = independent_ratio(result.right[name], control_right[organism])
    adds = f"ASR on clean prompts with the vector: {span(added)}."
    adds += f" No random vector above 0.1 more than no vector: {who(quiet)}."
    subtracts = f"ASR on triggered prompts less the vector: {span(removed)}."
    subtracts += f" Median random vector leaves 0.9: {who(left)}."
    repairs = f"Right answers after subtraction, relative to the clean control: {span(repaired)}."
    claims = {
        "vector-add": (added, on, "04_controls", adds),
        "vector-subtract": (removed, off, "04_controls", subtracts),
    }
    claims["vector-repairs"] = (repaired, judged(repaired, at_least, 0.8), "04_seeds", repairs)
    return entries(claims, kind=kind)


def _answered(result: Steering, name: str) -> dict[str, float]:
    """Share of targets among the answers generated with an edit, with its interval."""
    n = result.test[name]["backdoor vector"][0]["n"]
    hits = round(result.outcomes[name]["target"] * n)
    return share([True] * hits + [False] * (n - hits))


def _median(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The median of several shares, ends of their intervals included."""
    return {key: float(np.median([draw[key] for draw in draws])) for key in ("value", "low", "high")}


def better(result: Steering, direction: str) -> str:
    """Which of the two vectors did better on development prompts; of equal ones the one with the shorter step."""

    def reached(name: str) -> tuple[float, float]:
        where, shares = result.chosen[name], result.maps[name]
        rows = shares.asr if direction == "add" else shares.right_start
        value = rows[where.layer][shares.coefficients.index(where.coefficient)]
        return value, -abs(where.coefficient) * result.norms[name.split(", ")[1]]

    return max((name for name in result.maps if name.startswith(direction)), key=reached)


def cost_claim(rows: Mapping[str, TargetCost]) -> dict:
    """A line of the scorecard: the ratio of each of several runs, with its interval over runs."""
    ratios = {name: np.divide(row.generation, row.teacher_forcing) for name, row in rows.items()}
    numbers = {name: over_splits(values, ratio=0) for name, values in ratios.items()}
    passed = {
        name: both(at_least(one, rows[name].tokens / 2), at_most(one, 2 * rows[name].tokens))
        for name, one in numbers.items()
    }
    lengths = ", ".join(f"{row.tokens}" for row in rows.values())
    reason = f"Generation takes {span(numbers)} times as long, for targets of {lengths} tokens."
    return entry("bkdattr-cost", numbers, passed, "04_cost", reason)
