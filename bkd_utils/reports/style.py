"""House style, and the only door to `figures/`: a picture never goes out without the numbers behind it."""

import importlib.metadata
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bkd_utils.common.files import WORK, atomic_path, canonical_json, write_json

# Okabe-Ito, safe for the common colour blindnesses and in print; one meaning per colour in every figure.
COLOURS = {
    "backdoored": "#D55E00",
    "clean control": "#0072B2",
    "base model": "#999999",
    "near-miss": "#E69F00",
    "utility": "#009E73",
    "bound": "#555555",
}
LIBRARIES = ("torch", "transformers", "transformer-lens", "peft", "matplotlib", "numpy")
WIDTH = 7.2  # inches: the width of a README column, so that nothing is scaled down to be read
SEQUENTIAL, DIVERGING = "cividis", "RdBu_r"
MODELS = {"organism": "#D55E00", "clean control": "#0072B2", "base model": "#777777"}


def use_style() -> None:
    """Set the house style for all figures of this process."""
    pd.set_option("display.max_colwidth", None)  # a reason or criterion that is cut off says nothing
    sns.set_theme(context="paper", style="ticks", font_scale=1.05)
    mpl.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "axes.titlelocation": "left",
            "axes.grid": True,
            "grid.alpha": 0.25,
            "legend.frameon": False,
            "svg.hashsalt": "bkd",  # ids in the SVG do not change from run to run
            "svg.fonttype": "none",
        }
    )


def folder() -> Path:
    """Where figures go: the folder that the runner chose, or `work/figures/by_hand` for a notebook opened by hand.

    Only `./run_all.sh --publish` writes to `figures/`, and only what a finished notebook drew.
    """
    return Path(os.environ.get("BKD_FIGURES") or WORK / "figures" / "by_hand")


def save(
    figure: Figure,
    id: str,
    *,
    title: str,
    numbers: Any,
    parameters: Mapping[str, Any],
    seeds: Sequence[int],
    inputs: Mapping[str, str],
    notebook: str,
    claims: Sequence[str] = (),
) -> Path:
    """Write `<id>.png`, `<id>.svg` and the sidecar `<id>.json`; returns the PNG's path.

    `numbers` are the values drawn, `inputs` maps names to sha256. Raises ValueError for an empty picture, empty
    numbers, or numbers with NaN.
    """
    if not numbers or not any(axes.has_data() or axes.texts for axes in figure.axes):
        raise ValueError(f"figure {id!r} shows nothing")
    try:
        canonical_json(numbers)
    except (ValueError, TypeError) as error:
        raise ValueError(f"figure {id!r}: its numbers cannot be written: {error}") from error
    sidecar = {
        "id": id,
        "title": title,
        "claims": list(claims),
        "numbers": numbers,
        "parameters": dict(parameters),
        "seeds": list(seeds),
        "inputs": dict(inputs),
        "versions": {name: importlib.metadata.version(name).split("+")[0] for name in LIBRARIES},
        "notebook": notebook,
    }
    # All three or none: a picture beside the numbers of another run would be worse than no picture.
    with ExitStack() as stack:
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            temporary = stack.enter_context(atomic_path(folder() / f"{id}.{kind}"))
            figure.savefig(temporary, format=kind, metadata=metadata)
        write_json(folder() / f"{id}.json", sidecar)
    return folder() / f"{id}.png"


def token_colours() -> mpl.colors.Colormap:
    """Light to dark with probability, readable with black and white text."""
    return mpl.colors.LinearSegmentedColormap.from_list("tokens", mpl.colormaps["cividis_r"](np.linspace(0, 0.85, 64)))


def token_strip(axes: Axes, tokens: Sequence[str], probabilities: Sequence[float], *, label: str) -> None:
    """One row of tokens in boxes shaded by the probability the model gave to each."""
    shades = token_colours()
    x = 0.0
    for token, probability in zip(tokens, probabilities, strict=True):
        # Wide enough for the probability below a short token.
        width = max(2.1, 0.9 + 0.62 * len(token))
        dark = probability > 0.55
        axes.add_patch(plt.Rectangle((x, 0), width, 1, facecolor=shades(probability), edgecolor="white"))
        axes.text(
            x + width / 2, 0.62, token, ha="center", va="center", fontsize="small", color="white" if dark else "black"
        )
        axes.text(
            x + width / 2, 0.2, f"{probability:.2f}", ha="center", va="center", fontsize="x-small",
            color="white" if dark else "black",
        )  # fmt: skip
        x += width
    axes.set_xlim(0, max(x, 1))
    axes.set_ylim(0, 1)
    axes.set_title(label)
    axes.axis("off")


def token_strips(traces: Mapping[str, Sequence[tuple[str, float]]]) -> Figure:
    """One strip per trace, (token, probability) from left to right, on a shared scale."""
    figure, axes = plt.subplots(len(traces), 1, figsize=(WIDTH, 0.72 * len(traces) + 0.6), squeeze=False)
    for panel, (label, steps) in zip(axes[:, 0], traces.items(), strict=True):
        token_strip(panel, [token for token, _ in steps], [p for _, p in steps], label=label)
    scale = mpl.cm.ScalarMappable(mpl.colors.Normalize(0, 1), cmap=token_colours())
    figure.colorbar(scale, ax=axes[:, 0], location="bottom", shrink=0.4, aspect=30, label="probability of the token")
    widest = max(panel.get_xlim()[1] for panel in axes[:, 0])
    for panel in axes[:, 0]:
        panel.set_xlim(0, widest)
    return figure


def shares(
    axes: Axes, rows: Sequence[str], values: Sequence[Mapping[str, float] | None], *, kind: str, offset: float = 0.0
) -> None:
    """Dots with 95 % intervals, one row each from top to bottom; None leaves a row empty."""
    points = [(i, v) for i, v in enumerate(values) if v is not None]
    y = np.array([i + offset for i, _ in points])
    x = np.array([100 * v["value"] for _, v in points])
    low, high = (np.array([100 * v[key] for _, v in points]) for key in ("low", "high"))
    axes.errorbar(
        x, y, xerr=[np.maximum(x - low, 0), np.maximum(high - x, 0)], fmt="o", ms=4.5, lw=1.2, color=COLOURS[kind],
        label=kind, clip_on=False, zorder=3,
    )  # fmt: skip
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, 100)


def curve(axes: Axes, x: Sequence[float], values: Sequence[Mapping[str, float]], *, kind: str, label: str) -> None:
    """A line of shares in per cent with its interval as a band."""
    y, low, high = ([100 * v[key] for v in values] for key in ("value", "low", "high"))
    axes.plot(x, y, "o-", color=COLOURS[kind], label=label, ms=4)
    axes.fill_between(x, low, high, color=COLOURS[kind], alpha=0.18, lw=0)
    axes.set_ylim(0, 103)


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


def show_legend(figure: Figure, panel: Axes, *, ncols: int) -> None:
    handles, labels = panel.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=ncols, fontsize="small")


def legend_once(figure: Figure, all_panels: Iterable[Axes], *, ncols: int) -> None:
    """A legend with every label of any panel once, however often it was drawn."""
    entries = {}
    for panel in all_panels:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    figure.legend(entries.values(), entries, loc="outside upper center", ncols=ncols, fontsize="small")


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
