"""The style of all figures, and `save`, which writes a figure together with the numbers behind it."""

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from bkd_utils.common.cache import installed_versions
from bkd_utils.common.files import WORK, atomic_path, canonical_json, write_json
from bkd_utils.common.results import plain

# The only place where colours are written down: the palette of Okabe and Ito, safe for the common colour blindnesses
# and in print, and greys. Every colour has one meaning, which it keeps in all figures.
COLOURS = {
    "organism": "#D55E00",  # the backdoored model, and how often its backdoor fires (ASR)
    "clean control": "#0072B2",
    "base model": "#777777",
    "random": "#AAAAAA",  # heads, vectors and directions that are drawn at random
    "ACIE": "#CC79A7",  # heads chosen by their causal effect, and what is made of them
    "near-miss": "#E69F00",
    "utility": "#009E73",  # clean accuracy (CACC), right answers
    "rival": "#56B4E9",  # methods other than the one of the paper
    "refusal": "#F0E442",
    "bound": "#444444",  # criteria, chance, intervals in a legend, remarks
    "neutral": "#000000",  # everything that is told apart by its marker or line alone
    "pale": "#DDDDDD",  # areas and lines behind the data, answers of no kind
}
LIBRARIES = ("torch", "transformers", "transformer-lens", "peft", "matplotlib", "numpy")
WIDTH = 7.2  # inches: the width of a README column, so that nothing is scaled down to be read
DIVERGING = "PuOr_r"  # where zero or chance is in the middle
MODELS = ("organism", "clean control", "base model")
INTERVAL = "95 % interval"
LIMITS = (-4, 104)  # of an axis in per cent, with room for dots at 0 and 100
RULES = {"figure.dpi": 110, "savefig.dpi": 200, "figure.constrained_layout.use": True, "legend.frameon": False}
RULES |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25}
RULES |= {"axes.titlesize": "medium", "axes.titlelocation": "left"}
RULES |= {"svg.hashsalt": "bkd", "svg.fonttype": "none"}  # ids in the SVG do not change from run to run


def use_style() -> None:
    """Set the house style for all figures of this process."""
    pd.set_option("display.max_colwidth", None)  # a reason or criterion that is cut off says nothing
    sns.set_theme(context="paper", style="ticks", font_scale=1.05, rc=RULES)


def folder(base: str = "") -> Path:
    """Where figures go: the runner's folder, or for a notebook opened by hand one for its base model below
    `work/figures/by_hand`. Only `./run_all.sh --publish` writes to `figures/`."""
    return Path(os.environ.get("BKD_FIGURES") or WORK / "figures" / "by_hand" / base[:8])


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
    """Write `<id>.png`, `<id>.svg` and the sidecar `<id>.json`; returns the PNG's path. `numbers` are the values drawn,
    JSON values or Results; `inputs`: name -> sha256. Raises ValueError for nothing drawn, no numbers or NaN."""
    if not numbers or not any(axes.has_data() or axes.texts for axes in figure.axes):
        raise ValueError(f"figure {id!r} shows nothing")
    numbers = without_prompts(plain(numbers))
    try:
        canonical_json(numbers)
    except (ValueError, TypeError) as error:
        raise ValueError(f"figure {id!r}: its numbers cannot be written: {error}") from error
    sidecar = {"id": id, "title": title, "claims": list(claims), "numbers": numbers, "parameters": dict(parameters)}
    sidecar |= {"seeds": list(seeds), "inputs": dict(inputs), "versions": installed_versions(*LIBRARIES)}
    sidecar |= {"notebook": notebook}
    # All three or none: a picture beside the numbers of another run would be worse than no picture.
    into = folder(inputs.get("base", ""))
    with ExitStack() as stack:
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            temporary = stack.enter_context(atomic_path(into / f"{id}.{kind}"))
            figure.savefig(temporary, format=kind, metadata=metadata)
        write_json(into / f"{id}.json", sidecar)
    return into / f"{id}.png"


def without_prompts(numbers: Any) -> Any:
    """The numbers of a figure without the outcomes of single prompts behind them, which stand in the measurements."""
    if isinstance(numbers, Mapping):
        return {name: without_prompts(one) for name, one in numbers.items() if name not in ("hits", "by_prompt")}
    return [without_prompts(one) for one in numbers] if isinstance(numbers, list) else numbers


def panels(names: Sequence[str], *, rows: int = 1, height: float = 2.1, **share: Any) -> tuple[Figure, np.ndarray]:
    """A grid with one column per name, titles on top, axes shared along each row unless `share` says otherwise."""
    share = {"sharex": "row", "sharey": "row"} | share
    figure, axes = plt.subplots(rows, len(names), figsize=(WIDTH, height * rows + 0.6), squeeze=False, **share)
    for panel, name in zip(axes[0], names, strict=True):
        panel.set_title(name, fontsize="small")
    return figure, axes


def explain(axes: np.ndarray, below: str, *left: str, **legend: Any) -> None:
    """Write what is along the axes of a grid, `left` at the first panel of each row, and call `show_legend`."""
    axes[0, 0].figure.supxlabel(below, fontsize="medium")
    for panel, text in zip(axes[:, 0], left, strict=False):
        panel.set_ylabel(text)
    show_legend(axes[0, 0].figure, **legend)


def show_legend(figure: Figure, *, ncols: int = 3, bars: str | None = None, bands: Sequence[str] = ()) -> None:
    """A legend above the figure with every label of any panel once, or nothing if there are none. `bars` names what the
    lines at the dots mean, `bands` what the shaded areas mean."""
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    if bars:
        entries[bars] = Line2D([], [], color=COLOURS["bound"], lw=1.2)
    entries |= {band: Patch(facecolor=COLOURS["bound"], alpha=0.3, lw=0) for band in bands}
    if entries:
        look = {"ncols": ncols, "fontsize": "small", "columnspacing": 1.2}
        figure.legend(entries.values(), entries, loc="outside upper center", **look)


def sizes(shares: Iterable[Mapping[str, float]]) -> str:
    """On how many prompts (or models) the given shares rest: `n = 32` or `n = 16 to 32`."""
    counts = {share["n"] for share in shares}
    return f"n = {min(counts)}" if len(counts) == 1 else f"n = {min(counts)} to {max(counts)}"


def interval(
    panel: Axes, at: float, share: Mapping, *, colour: str, scale: int = 100, upright: bool = False, **look: Any
) -> None:
    """A dot at `at` with its interval, lying unless `upright`; in per cent unless `scale` is another. `colour` is a key
    of `COLOURS`; `look` goes to `Axes.plot` for the dot."""
    ends, value, place = [scale * share["low"], scale * share["high"]], [scale * share["value"]], [at, at]
    turn = -1 if upright else 1
    panel.plot(*(ends, place)[::turn], color=COLOURS[colour], lw=1.1, alpha=0.75)
    dot = {"color": COLOURS[colour], "marker": "o", "ms": 4, "mew": 0.9, "ls": "", "clip_on": False, "zorder": 3}
    panel.plot(*(value, [at])[::turn], **dot | look)


def dots(panel: Axes, x: Any, y: Any, kind: tuple[str, str, bool], **look: Any) -> None:
    """Marks without a line. `kind`: a key of `COLOURS`, a marker, is it filled; `look` goes to `Axes.plot`."""
    colour, marker, filled = COLOURS[kind[0]], *kind[1:]
    plain = {"color": colour, "mfc": colour if filled else "white", "mew": 0 if filled else 1, "ls": ""}
    panel.plot(x, y, marker, **plain | {"clip_on": False} | look)


def band(panel: Axes, x: Sequence[float], lines: Sequence[Sequence[float]], *, colour: str, **look: Any) -> None:
    """A line in a band: middle, low and high values. `colour` is a key of `COLOURS`; `look` is the line's."""
    middle, low, high = lines
    panel.plot(x, middle, **{"color": COLOURS[colour], "lw": 1.4, "ms": 3.5, "clip_on": False} | look)
    panel.fill_between(x, low, high, color=COLOURS[colour], alpha=0.18, lw=0)


def rows_down(panel: Axes, rows: Sequence[str], *, limits: tuple[float, float] = LIMITS) -> None:
    """Named rows at 0, 1, 2 … from top to bottom, over a horizontal axis with these limits."""
    panel.set_yticks(range(len(rows)), rows, fontsize="small")
    panel.set(ylim=(len(rows) - 0.5, -0.5), xlim=limits)


def heat_map(
    panel: Axes, values: np.ndarray, *, rows: Sequence, columns: Sequence, upwards: bool = True, **look: Any
) -> QuadMesh:
    """Cells on a colour scale; returns the mesh for a colour bar. `look` goes to `seaborn.heatmap`. Row 0 is at the
    bottom unless `upwards` is False. Of rows or columns that are integers only some are labelled."""
    plain_look = {"cmap": "cividis", "cbar": False, "xticklabels": False, "yticklabels": False, "fmt": ""}
    sns.heatmap(values, ax=panel, annot_kws={"fontsize": 6.5}, **plain_look | look)
    for names, axis in ((columns, panel.xaxis), (rows, panel.yaxis)):
        named = isinstance(names[0], str)
        places = np.arange(0, len(names), 1 if named else max(1, len(names) // 5))
        turned = 90 * (named and axis is panel.xaxis)
        axis.set_ticks(places + 0.5, [str(names[i]) for i in places], rotation=turned, fontsize="small")
    panel.set_ylim((0, len(rows)) if upwards else (len(rows), 0))
    panel.grid(False)
    return panel.collections[0]
