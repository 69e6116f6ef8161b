"""Pictures of notebook 03: effects of heads and of larger components, and what is left without them."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.reports.figures import COLOURS
from bkd_utils.reports.panels import DIVERGING, panels, show_legend

# One colour per ranking; the random one is the grey of all controls without a model of their own.
RANKINGS = {"ACIE": "#D55E00", "gradient": "#E69F00", "necessity": "#0072B2", "random": "#777777"}


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
    rows = [row for row in rows if row["scope"] == "last position"]
    chosen = [row for row in rows if (row["ranking"], row["kind"]) == (ranking, kind)]
    if all(row["k"] for row in chosen):
        chosen += [row for row in rows if row["ranking"] == "none"]
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
