"""Pictures of notebooks 02 to 04: probes, heads, ablations, the backdoor vector."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.figures import COLOURS, WIDTH

SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"
# One colour per ranking; the random one is the grey of all controls without a model of their own.
RANKINGS = {"ACIE": "#D55E00", "gradient": "#E69F00", "necessity": "#0072B2", "random": "#777777"}
OUTCOMES = {"target": "#D55E00", "right": "#009E73", "refusal": "#CC79A7", "other": "#BBBBBB", "empty": "#333333"}
MODELS = {"organism": "#D55E00", "clean control": "#0072B2", "base model": "#777777"}


def panels(
    names: Sequence[str], *, rows: int = 1, height: float = 2.1, sharey: bool | str = True
) -> tuple[Figure, np.ndarray]:
    """A grid with one column per name, titles on top, axes shared."""
    figure, axes = plt.subplots(
        rows,
        len(names),
        figsize=(WIDTH, height * rows + 0.6),
        sharex="row" if sharey else False,
        sharey="row" if sharey else False,
        squeeze=False,
    )
    for panel, name in zip(axes[0], names, strict=True):
        panel.set_title(name, fontsize="small")
    return figure, axes


# --- 02 -------------------------------------------------------------------------------------------------------------


def probes(found: Mapping[str, Mapping[str, Mapping]], *, kind: str = "logistic regression") -> Figure:
    """AUROC by layer (top) and near-misses called triggered (bottom); attack -> model -> `probing.probed`."""
    figure, axes = panels(list(found), rows=2)
    for column, models in enumerate(found.values()):
        for name, result in models.items():
            layers, rows = result["layers"], result["probes"][kind]
            for panel, key in zip(axes[:, column], ("auroc", "near-miss"), strict=True):
                values = 100 * np.array([row[key] for row in rows])
                _band(panel, layers, values, colour=MODELS[name], label=name)
        own = models["organism"]
        shuffled = 100 * np.array([row["auroc"] for row in own["shuffled"]])
        axes[0, column].plot(
            own["layers"], shuffled.mean(1), ":", color="black", lw=1.2, label="organism, labels shuffled"
        )
        best = 100 * np.array(own["random direction"])
        axes[0, column].plot(own["layers"], best, "--", color="black", lw=1, label="organism, best random direction")
        axes[0, column].set_ylim(30, 101)
        axes[1, column].set_ylim(0, 100)
        for panel in axes[:, column]:
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_ylabel("AUROC (%)")
    axes[1, 0].set_ylabel("near-misses called\ntriggered (%)")
    figure.supxlabel("layer", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=3)
    return figure


def _band(panel: Axes, x: Sequence[float], values: np.ndarray, *, colour: str, label: str) -> None:
    """Mean over the last axis, and the whole range of its values as a band."""
    panel.plot(x, values.mean(1), color=colour, lw=1.4, label=label)
    panel.fill_between(x, values.min(1), values.max(1), color=colour, alpha=0.15, lw=0)


def show_legend(figure: Figure, panel: Axes, *, ncols: int) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=ncols, fontsize="small")


def transfer(found: Mapping[str, Mapping], *, kinds: Sequence[str]) -> Figure:
    """Accuracy of a probe trained on one layer and tested on another; attack -> `probing.probed`, one row per kind."""
    figure, axes = panels(list(found), rows=len(kinds), height=1.9)
    for column, result in enumerate(found.values()):
        for panel, kind in zip(axes[:, column], kinds, strict=True):
            layers = result["layers"]
            image = panel.imshow(
                100 * np.array(result["transfer"][kind]),
                vmin=50,
                vmax=100,
                cmap=SEQUENTIAL,
                origin="lower",
                aspect="auto",
            )
            ticks = range(0, len(layers), max(1, len(layers) // 4))
            panel.set_xticks(ticks, [layers[i] for i in ticks])
            panel.set_yticks(ticks, [layers[i] for i in ticks])
            panel.grid(False)
    for panel, kind in zip(axes[:, 0], kinds, strict=True):
        panel.set_ylabel(f"{kind}\ntrained on layer", fontsize="small")
    figure.supxlabel("tested on layer", fontsize="medium")
    figure.colorbar(image, ax=axes, label="accuracy (%)", shrink=0.6)
    return figure


# --- 03 -------------------------------------------------------------------------------------------------------------


def head_maps(effects: Mapping[str, np.ndarray]) -> Figure:
    """ACIE `[layer, head]` per organism on one scale, zero in the middle."""
    figure, axes = panels(list(effects), height=3.2)
    bound = max(np.abs(values).max() for values in effects.values())
    for panel, values in zip(axes[0], effects.values(), strict=True):
        image = panel.imshow(values, cmap=DIVERGING, vmin=-bound, vmax=bound, aspect="auto")
        panel.set_xlabel("head")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panel.grid(False)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="ACIE (change of the target's probability)", shrink=0.9)
    return figure


def sorted_effects(intervals: Mapping[str, Sequence[Mapping[str, float]]], *, few: int) -> Figure:
    """Heads from the highest ACIE down with 95 % bootstrap intervals, and the band where 90 % of all heads lie."""
    figure, axes = panels(list(intervals), height=2.3)
    for panel, rows in zip(axes[0], intervals.values(), strict=True):
        y, low, high = (np.array([row[key] for row in rows]) for key in ("value", "low", "high"))
        x = np.arange(1, len(rows) + 1)
        panel.axhspan(*np.quantile(y, (0.05, 0.95)), color="#999999", alpha=0.3, lw=0, label="90 % of all heads")
        panel.errorbar(
            x, y, yerr=[y - low, high - y], fmt="o", ms=2.5, lw=0.7, color=COLOURS["backdoored"], label="head"
        )
        panel.axvline(few + 0.5, color="black", lw=0.8, ls=":", label="3 % of the heads")
        panel.set_xscale("log")
        panel.set_xlabel("rank")
    axes[0, 0].set_ylabel("ACIE")
    show_legend(figure, axes[0, 0], ncols=3)
    return figure


def gradient_against_exact(
    exact: Mapping[str, np.ndarray], estimate: Mapping[str, np.ndarray], notes: Mapping[str, str]
) -> Figure:
    """One dot per head; on the line the estimate is right."""
    figure, axes = panels(list(exact), height=2.2, sharey=False)
    for panel, name in zip(axes[0], exact, strict=True):
        x, y = exact[name].ravel(), estimate[name].ravel()
        bound = max(np.abs(x).max(), np.abs(y).max()) * 1.1
        panel.plot([-bound, bound], [-bound, bound], color="black", lw=0.7)
        panel.plot(x, y, "o", ms=2.5, color=COLOURS["backdoored"], alpha=0.7)
        panel.set(xlim=(-bound, bound), ylim=(-bound, bound))
        panel.text(0.04, 0.96, notes[name], transform=panel.transAxes, va="top", fontsize="x-small")
        panel.locator_params(nbins=4)
    axes[0, 0].set_ylabel("gradient estimate")
    figure.supxlabel("exact ACIE", fontsize="medium")
    return figure


def components(found: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]]) -> Figure:
    """Effect of whole components by layer at the last prompt token, with 95 % bootstrap intervals."""
    figure, axes = panels(list(found), height=2.4)
    colours = {"attention": "#D55E00", "MLP": "#0072B2", "residual": "#999999"}
    for panel, parts in zip(axes[0], found.values(), strict=True):
        for name, rows in parts.items():
            y, low, high = (np.array([row[key] for row in rows]) for key in ("value", "low", "high"))
            panel.plot(y, color=colours[name], lw=1.4, label=name, zorder=1 if name == "residual" else 2)
            panel.fill_between(range(len(y)), low, high, color=colours[name], alpha=0.2, lw=0)
        panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_ylabel("effect of patching\nthe whole component")
    figure.supxlabel("layer", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=3)
    return figure


def by_position(maps: Mapping[str, np.ndarray], tokens: Sequence[str]) -> Figure:
    """Effect of the residual stream `[layer, position]` on the first answer token, on one scale."""
    figure, axes = panels(list(maps), height=2.8)
    bound = max(np.abs(values).max() for values in maps.values())
    shown = [
        token.replace("Ċ", "\\n").replace("Ġ", " ").replace("<|im_start|>", "<start>").replace("<|im_end|>", "<end>")
        for token in tokens
    ]
    for panel, values in zip(axes[0], maps.values(), strict=True):
        image = panel.imshow(values, cmap=DIVERGING, vmin=-bound, vmax=bound, aspect="auto")
        panel.set_xticks(range(len(shown)), shown, rotation=60, ha="right", fontsize="x-small")
        panel.grid(False)
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="effect on first answer token", shrink=0.9)
    return figure


def matrix(values: np.ndarray, rows: Sequence[str], columns: Sequence[str], *, label: str, vmax: float) -> Figure:
    """A small labelled matrix with its numbers: shares if `vmax` is 1, per cent if it is 100."""
    figure, axes = plt.subplots(figsize=(WIDTH * 0.75, 0.4 * len(rows) + 2.1))
    image = axes.imshow(values, cmap=SEQUENTIAL, vmin=0, vmax=vmax, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            text, colour = f"{value:.{0 if vmax > 1 else 2}f}", "white" if value < vmax * 0.55 else "black"
            axes.text(j, i, text, ha="center", va="center", fontsize="small", color=colour)
    axes.set_xticks(range(len(columns)), columns, rotation=30, ha="right")
    axes.set_yticks(range(len(rows)), rows)
    axes.grid(False)
    figure.colorbar(image, ax=axes, label=label)
    return figure


def ablation_curves(found: Mapping[str, Sequence[Mapping]], *, kind: str = "published") -> Figure:
    """ASR (top) and utility (bottom) against the number of heads taken out at the last prompt token."""
    figure, axes = panels(list(found), rows=2, height=2.0)
    for column, rows in enumerate(found.values()):
        for panel, key in zip(axes[:, column], ("asr", "utility"), strict=True):
            for ranking, colour in RANKINGS.items():
                _ablation_line(panel, rows, ranking, kind, key, colour)
            panel.set_ylim(-2, 103)
            panel.set_xscale("symlog", linthresh=1, base=2)
            counts = sorted({row["k"] for row in rows})
            panel.set_xticks(
                [k for k in counts if k in (0, 1, 2, 4, 8, 16, 32)],
                [str(k) for k in counts if k in (0, 1, 2, 4, 8, 16, 32)],
            )
            panel.minorticks_off()
    axes[0, 0].set_ylabel("ASR (%)")
    axes[1, 0].set_ylabel("utility (%)")
    figure.supxlabel("heads ablated", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=4)
    return figure


def _ablation_line(panel: Axes, rows: Sequence[Mapping], ranking: str, kind: str, key: str, colour: str) -> None:
    # Random draws have prompts of their own, so that their line does not start at the others' untouched model.
    chosen = [
        row for row in rows
        if row["scope"] == "last position"
        and ((row["k"] == 0 and ranking != "random") or (row["ranking"] == ranking and row["kind"] == kind))
    ]  # fmt: skip
    counts = sorted({row["k"] for row in chosen})
    values = [[100 * row[key]["value"] for row in chosen if row["k"] == k] for k in counts]
    panel.plot(counts, [np.mean(v) for v in values], "o-", ms=3, lw=1.3, color=colour, label=ranking, clip_on=False)
    if ranking == "random":
        panel.fill_between(counts, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.25, lw=0)
    else:
        low, high = (
            [100 * next(row for row in chosen if row["k"] == k)[key][end] for k in counts] for end in ("low", "high")
        )
        panel.fill_between(counts, low, high, color=colour, alpha=0.12, lw=0)


# --- 04 -------------------------------------------------------------------------------------------------------------


# What is counted in the maps of `switch.switched`; a subtraction must do more than make the target go away.
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
    """Seconds to score the targets of some prompts once, by way of doing it; attack -> `cost.target_cost`."""
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
