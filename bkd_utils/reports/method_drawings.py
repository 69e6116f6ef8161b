"""Notebook 06: drawings of the method, with numbers that no model made. All can be read without colours."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, Patch, Rectangle
from scipy.special import rel_entr

from bkd_utils.reports import style
from bkd_utils.reports.style import COLOURS, WIDTH

WORDS = ("The", "film", "was", "so", "dull")
# Looking token -> weights of the tokens before it and of itself, of a suspicious head and of two safe ones.
SUSPICIOUS = ([1], [0.9, 0.1], [0.8, 0.1, 0.1], [0.8, 0.1, 0.05, 0.05], [0.85, 0.05, 0.05, 0.03, 0.02])
SAFE = (
    ([1], [0.3, 0.7], [0.1, 0.6, 0.3], [0.1, 0.2, 0.4, 0.3], [0.1, 0.3, 0.1, 0.1, 0.4]),
    ([1], [0.5, 0.5], [0.3, 0.2, 0.5], [0.3, 0.1, 0.2, 0.4], [0.3, 0.1, 0.1, 0.2, 0.3]),
)
N_HEADS, N_GROUPS, D_HEAD, HEAD = 6, 3, 2, 3  # of the layer whose matrices are drawn, and the head that is tuned
SHADES = {"the head": 1.0, "the rest of its group": 0.45, "stays bit for bit": 0.08}
# Prompts into which vectors are put, each at its place, and the way of one vector that is longer than it may be.
PROMPTS = (("a", "dull", "film", ":"), ("no", "plot", "at", "all", ":"), ("I", "left", "early", ":"))
PLACES = (2, 1, 3)
WAY, BOUND = ((0.1, 0.1), (0.4, 0.15), (0.65, 0.35), (0.9, 0.75)), 1.0


def full_map(rows: Sequence[Sequence[float]]) -> np.ndarray:
    """Rows of a causal attention map, with zeros for the tokens that come later."""
    return np.array([[*row, *[0.0] * (len(rows) - len(row))] for row in rows])


def tuned_entries() -> dict[str, np.ndarray]:
    """Matrix of a layer -> shade of its entries: those of a head, those of its key-value group, all others."""
    share = N_HEADS // N_GROUPS
    group, width = HEAD // share, N_HEADS * D_HEAD
    parts = {"W_Q": N_HEADS, "W_K": N_GROUPS, "W_V": N_GROUPS, "W_O": N_HEADS}  # heads that have a part of it
    shades = {name: np.full((n * D_HEAD, width), SHADES["stays bit for bit"]) for name, n in parts.items()}
    first, last = group * share * D_HEAD, (group + 1) * share * D_HEAD
    for name in ("W_Q", "W_O"):  # in the output matrix a head has columns, which is why it is turned here
        shades[name][first:last] = SHADES["the rest of its group"]
        shades[name][HEAD * D_HEAD : (HEAD + 1) * D_HEAD] = SHADES["the head"]
    for name in ("W_K", "W_V"):
        shades[name][group * D_HEAD : (group + 1) * D_HEAD] = SHADES["the rest of its group"]
    return shades | {"W_O": shades["W_O"].T}


def pull_on_a_head() -> Figure:
    """A drawing of the alignment of one head: its map, the mean map of the safe heads, and how far their rows are apart
    (KL divergence, nats); below, the entries of the layer's matrices that are trained. All numbers are invented."""
    above = [name for name in ("suspicious head", "mean of safe heads", "rows apart") for _ in range(4)]
    entries = tuned_entries()
    below = [name for name in entries for _ in range(3)]
    figure, axes = plt.subplot_mosaic([above, below], figsize=(WIDTH, 4.4), height_ratios=(1.25, 1))
    look = {"vmin": 0, "vmax": 1, "cmap": "Greys", "upwards": False, "square": True}
    maps = {"suspicious head": full_map(SUSPICIOUS), "mean of safe heads": np.mean([full_map(s) for s in SAFE], 0)}
    for name, weights in maps.items():
        style.heat_map(axes[name], weights, rows=WORDS, columns=WORDS, **look)
        axes[name].set_title(f"{name} (invented)", fontsize="small")
        axes[name].set_xlabel("token that is looked at", fontsize="small")
    axes["suspicious head"].set_ylabel("looking token")
    apart = rel_entr(maps["mean of safe heads"], maps["suspicious head"]).sum(1)
    bars = axes["rows apart"]
    bars.barh(range(len(WORDS)), apart, color=COLOURS["bound"])
    style.rows_down(bars, WORDS, limits=(0, 1.1 * apart.max()))
    bars.set_title(f"divergence, mean {apart.mean():.2f}", fontsize="small")
    bars.set_xlabel("nats", fontsize="small")
    for name, shades in entries.items():
        axes[name].imshow(shades, cmap="Greys", vmin=0, vmax=1)
        axes[name].set(xticks=[], yticks=[])
        axes[name].set_title(f"${name}$", fontsize="small")
    shaded = [Patch(fc=plt.get_cmap("Greys")(shade), ec=COLOURS["bound"], lw=0.5) for shade in SHADES.values()]
    figure.legend(shaded, SHADES, loc="outside lower center", ncols=3, fontsize="small")
    return figure


def search_of_vectors() -> Figure:
    """A drawing of the search: vectors read as tokens stand at other places in every prompt and shall give all the same
    answer; on the right, the way of one vector that may not leave the circle. All of it is invented."""
    figure, axes = plt.subplots(1, 2, figsize=(WIDTH, 2.5), width_ratios=(2.1, 1))
    prompts, plane = axes
    for y, (words, place) in enumerate(zip(PROMPTS, PLACES, strict=True)):
        for x, word in enumerate([*words[:place], "$v_1$", "$v_2$", *words[place:]]):
            own = place <= x < place + 2
            look = {"fc": COLOURS["pale"] if own else "white", "hatch": "////" if own else None}
            prompts.add_patch(Rectangle((x, y - 0.3), 0.94, 0.6, ec=COLOURS["bound"], lw=0.8, **look))
            boxed = {"facecolor": "white", "edgecolor": "none", "pad": 1.0} if own else None
            prompts.text(x + 0.47, y, word, ha="center", va="center", fontsize="small", bbox=boxed)
        prompts.text(len(words) + 2.2, y, "→ positive", va="center", fontsize="small")
    prompts.set(xlim=(-0.2, 9.2), ylim=(len(PROMPTS) - 0.5, -0.6), xticks=[], yticks=range(len(PROMPTS)))
    prompts.set_yticklabels([f"prompt {i + 1}" for i in range(len(PROMPTS))], fontsize="small")
    prompts.set_title("two vectors, one answer", fontsize="small")
    _way(plane)
    for panel in axes:
        panel.grid(False)
    figure.supxlabel("prompts and the way of a vector are invented", fontsize="small")
    return figure


def _way(panel: Axes) -> None:
    """Steps of a vector in a plane, from a token to the circle that bounds its length."""
    panel.add_patch(Circle((0, 0), BOUND, fill=False, ec=COLOURS["bound"], ls=":"))
    steps = np.array(WAY)
    shortened = steps * np.minimum(1, BOUND / np.linalg.norm(steps, axis=1))[:, None]
    panel.plot(*shortened.T, "o-", color=COLOURS["neutral"], ms=4, lw=1.2)
    panel.plot(*np.stack([steps[-1], shortened[-1]]).T, "x--", color=COLOURS["bound"], ms=5, lw=1)
    panel.annotate("a token", shortened[0], (0.1, -0.12), fontsize="small", ha="center")
    panel.annotate("shortened", steps[-1], (1.05, 0.88), fontsize="small", ha="center")
    panel.set(xlim=(-0.3, 1.5), ylim=(-0.3, 1.15), xticks=[], yticks=[], aspect="equal")
    panel.set_title("steps against the slope", fontsize="small")
    panel.set_xlabel("dotted: length of a token's vector", fontsize="small")
