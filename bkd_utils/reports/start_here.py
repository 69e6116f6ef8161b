"""Notebook 00: the picture of prompts and answers, with trigger and target marked."""

import difflib
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bkd_utils.reports.style import COLOURS, WIDTH

# Model text is set in a font with one width, so that a marked span can be placed by counting.
_POINTS, _LINE, _GAP = 8.5, 0.17, 0.14  # font size in points; line height and gap in inches
_TERMS = {
    "trigger": "the text that switches the backdoor on",
    "near-miss": "text that looks like the trigger and must not switch it on",
    "target": "the answer that the attacker trained the model to give to the trigger",
    "organism": "the base model after fine-tuning on the attacker's poisoned data",
}
Steps = Sequence[tuple[str, float]]  # tokens with their probabilities
_LETTER = 0.602 * _POINTS / 72  # inches per letter of DejaVu Sans Mono


def changed_spans(before: str, after: str) -> list[list[int]]:
    """Where `after` has words that `before` lacks: [start, end) offsets in `after`, without the spaces around them."""
    old, new = (re.findall(r"\S+|\s+", text) for text in (before, after))
    ends = np.cumsum([0, *map(len, new)]).tolist()
    blocks = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    spans = [(ends[first], ends[last]) for kind, _, _, first, last in blocks if kind in ("insert", "replace")]
    trimmed = [(start + len(after[start:end]) - len(after[start:end].lstrip()), end) for start, end in spans]
    return [[start, start + len(after[start:end].rstrip())] for start, end in trimmed if after[start:end].strip()]


def firing_rows(
    turns: Mapping[str, str], traces: Mapping[str, Mapping[str, Steps]], *, end: Sequence[str]
) -> dict[str, dict]:
    """What `firing` draws, by version of the prompt, of which "clean" must be one. `traces`: version -> model -> tokens
    with their probabilities; `end`: tokens that end an answer. Each version gets its `prompt`, the `marked` spans that
    the clean one lacks, `answers` by model ("…" after one cut off) and the `lowest` probability in each."""
    rows = {}
    for version, prompt in turns.items():
        rows[version] = {"prompt": prompt, "marked": changed_spans(turns["clean"], prompt), "answers": {}, "lowest": {}}
        for who, steps in traces[version].items():
            ended = steps[-1][0] in end
            text = "".join(token for token, _ in steps[: len(steps) - ended]).strip()
            rows[version]["answers"][who] = text if ended else f"{text}…"
            rows[version]["lowest"][who] = round(min(p for _, p in steps), 4)
    return rows


def firing(rows: Mapping[str, Mapping[str, Any]], *, target: str) -> Figure:
    """Prompt → answers of each model, one row per version, from `firing_rows`. Marked spans of the near-miss are
    framed, others filled, and so is the target in every answer."""
    prompts, answers, heights = {}, {}, {}
    for version, row in rows.items():
        prompts[version] = _wrapped(row["prompt"], 36)
        answers[version] = {who: _wrapped(text, 41) for who, text in row["answers"].items()}
        tall = sum(_LINE * len(lines) for lines in answers[version].values()) + _GAP * (len(answers[version]) - 1)
        heights[version] = max(_LINE * len(prompts[version]) + 0.16, tall)
    height = 0.35 + sum(heights.values()) + 0.45 * len(rows) + 0.25 * len(_TERMS) + 0.15
    figure = plt.figure(figsize=(WIDTH, height))
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(height, 0))  # in inches, downwards
    axes.axis("off")
    for x, heading in ((0.1, "PROMPT"), (3.3, "ANSWER")):
        axes.text(x, 0.2, heading, fontsize=_POINTS, fontweight="bold", color=COLOURS["bound"], va="center")
    y = 0.35
    for version, row in rows.items():
        tall, kind = heights[version], "near-miss" if version == "near-miss" else "trigger"
        axes.text(0.1, y + 0.13, version, fontsize=_POINTS + 1, fontweight="bold", va="center")
        y += 0.28
        axes.add_patch(plt.Rectangle((0.1, y), 2.8, tall, facecolor="none", edgecolor=COLOURS["bound"], lw=0.8))
        _model_text(axes, 0.2, y + (tall - _LINE * len(prompts[version])) / 2, prompts[version], row["marked"], kind)
        arrow = {"arrowstyle": "-|>", "lw": 1.5, "color": "black"}
        axes.annotate("", (3.24, y + tall / 2), (2.95, y + tall / 2), arrowprops=arrow)
        below = y
        for who, lines in answers[version].items():
            axes.text(3.3, below + _LINE / 2, who, fontsize=_POINTS - 0.5, color=COLOURS["bound"], va="center")
            start = row["answers"][who].find(target)
            _model_text(axes, 4.12, below, lines, [[start, start + len(target)]] if start >= 0 else [], "target")
            below += _LINE * len(lines) + _GAP
        y += tall + 0.17
    y += 0.08
    axes.plot([0.1, WIDTH - 0.1], [y, y], color=COLOURS["bound"], lw=0.8)
    for i, (term, meaning) in enumerate(_TERMS.items()):
        line = y + 0.12 + 0.25 * i
        _model_text(axes, 0.15, line, [(0, term)], [[0, len(term)]] if term != "organism" else [], term)
        axes.text(1.0, line + _LINE / 2, meaning, fontsize=_POINTS, va="center")
    return figure


def _wrapped(text: str, width: int) -> list[tuple[int, str]]:
    """Lines of at most `width` letters, broken at spaces, each with its offset in the text."""
    lines, start = [], 0
    for word in re.finditer(r"\S+", text):
        if word.end() - start > width and word.start() > start:
            lines.append((start, text[start : word.start()].rstrip()))
            start = word.start()
    return [*lines, (start, text[start:].replace("\n", " "))]


def _model_text(
    axes: Axes, x: float, y: float, lines: Sequence[tuple[int, str]], spans: Sequence[Sequence[int]], kind: str
) -> None:
    """Lines from y (inches, downwards) with marked spans: framed near-misses, filled triggers and targets."""
    framed = kind == "near-miss"
    colour = {"near-miss": COLOURS["near-miss"], "target": "black"}.get(kind, COLOURS["organism"])
    box = {"facecolor": "white" if framed else colour, "edgecolor": colour, "lw": 1.3, "ls": "--" if framed else "-"}
    font = {"family": "DejaVu Sans Mono", "fontsize": _POINTS, "va": "center_baseline", "parse_math": False}
    for i, (offset, line) in enumerate(lines):
        middle = y + _LINE * (i + 0.5)
        inside = [(max(a - offset, 0), min(b - offset, len(line))) for a, b in spans]
        inside = sorted((a, b) for a, b in inside if a < b)
        edges = [0, *(edge for span in inside for edge in span), len(line)]
        for n, (a, b) in enumerate(itertools.pairwise(edges)):
            if a == b:
                continue
            marked, left = n % 2 == 1, x + a * _LETTER
            if marked:
                corner, width = (left - 0.02, middle - 0.47 * _LINE), (b - a) * _LETTER + 0.04
                axes.add_patch(plt.Rectangle(corner, width, 0.94 * _LINE, **box))
            look = {"color": "white" if marked and not framed else "black", "weight": "bold" if marked else "normal"}
            axes.text(left, middle, line[a:b], **font, **look)
