"""Notebook 00: the picture of a backdoor that fires."""

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bkd_utils.reports.style import WIDTH


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
