"""Notebook 05: pictures and verdicts on the similarity of heads."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from sklearn.metrics import roc_auc_score

from bkd_utils.experiments.attention_similarity import VERSIONS, best_reading, gap, separates
from bkd_utils.reports.scorecard import entry, span
from bkd_utils.reports.style import MODELS, WIDTH, panels, show_legend

GREY = "#777777"
VERSION_NAMES = {"triggered": "triggered", "near-miss": "look-alike", "same length": "same length"}
# Readings beside each other, of one model: colour, line, marker of the threshold.
LOOKS = (("black", "-", "o"), (GREY, "--", "s"), ("#AAAAAA", ":", "^"))


def gaps(
    found: Mapping[str, Mapping[str, Mapping]],
    *,
    readings: Sequence[str],
    separated: Mapping[str, Mapping[str, Mapping]] | None = None,
    limits: Mapping[str, tuple[float, float]] | None = None,
) -> Figure:
    """What a trigger does to similarity, by layer, one row per reading; attack -> model ->
    `attention_similarity.similarity_by_version`.

    Mean over prompts of triggered less clean, and the range that holds the middle half of the prompts. `separated`:
    reading -> attack -> `attention_similarity.separates`, to mark its layer; `limits`: as of `gap_limits`, to draw
    several figures on one scale.
    """
    figure, axes = panels(list(found), rows=len(readings), height=1.9, sharey="row")
    limits = limits or gap_limits(found, readings=readings)
    for column, (attack, models) in enumerate(found.items()):
        for panel, name in zip(axes[:, column], readings, strict=True):
            _by_layer(panel, models, reading=name)
            panel.set_ylim(*limits[name])
            if separated:
                layer = separated[name][attack]["layer"]
                panel.axvline(layer, color="black", lw=0.9, ls=":", zorder=0, label="chosen layer")
    for panel, name in zip(axes[:, 0], readings, strict=True):
        panel.set_ylabel(name.replace(", ", ",\n"), fontsize="small")
    for panel in axes[:-1].flat:
        panel.tick_params(labelbottom=False)
    figure.supxlabel("layer", fontsize="medium")
    figure.supylabel("similarity, triggered less clean (each row its own scale)", fontsize="medium")
    _band_legend(figure, axes[0, 0])
    return figure


def _by_layer(panel: Axes, models: Mapping[str, Mapping], *, reading: str) -> None:
    for model, result in models.items():
        numbers = _gap(result, reading=reading)
        layers = range(len(numbers["mean"]))
        panel.plot(layers, numbers["mean"], color=MODELS[model], lw=1.3, label=model)
        panel.fill_between(layers, numbers["low"], numbers["high"], color=MODELS[model], alpha=0.15, lw=0)
    panel.axhline(0, color="black", lw=0.6)
    panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _band_legend(figure: Figure, panel: Axes) -> None:
    handles, labels = panel.get_legend_handles_labels()
    handles.append(Patch(facecolor=GREY, alpha=0.3))
    figure.legend(
        handles, [*labels, "middle half of the prompts"], loc="outside upper center", ncols=len(handles),
        fontsize="small", columnspacing=1.2,
    )  # fmt: skip


def _gap(result: Mapping, *, reading: str) -> dict[str, list[float]]:
    """Mean and middle half of the prompts, by layer."""
    difference = gap(result, reading=reading)
    low, high = np.quantile(difference, [0.25, 0.75], axis=0)
    return {"mean": difference.mean(0).tolist(), "low": low.tolist(), "high": high.tolist()}


def gap_numbers(found: Mapping[str, Mapping[str, Mapping]], *, readings: Sequence[str]) -> dict:
    """What `gaps` draws: attack -> reading -> model -> `mean` over prompts, `low` and `high` of the band, by layer."""
    return {
        attack: {name: {model: _gap(result, reading=name) for model, result in models.items()} for name in readings}
        for attack, models in found.items()
    }


def gap_limits(
    found: Mapping[str, Mapping[str, Mapping]], *, readings: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Reading -> a range that holds all that `gaps` would draw of it."""
    limits = {}
    for name in readings:
        drawn = [_gap(result, reading=name) for models in found.values() for result in models.values()]
        low, high = (extreme(extreme(one[key]) for one in drawn for key in one) for extreme in (min, max))
        limits[name] = (low - 0.05 * (high - low), high + 0.05 * (high - low))
    return limits


def separation_map(found: Mapping[str, Mapping[str, Mapping]], *, models: Sequence[str]) -> Figure:
    """AUROC of triggered against clean prompts, reading by attack, one panel per model.

    `found`: reading -> attack -> `attention_similarity.separates`.
    """
    attacks = list(next(iter(found.values())))
    figure, axes = panels(models, height=0.28 * len(found) + 1.1)
    for panel, model in zip(axes[0], models, strict=True):
        values = np.array([[row[attack][model]["triggered"]["value"] for attack in attacks] for row in found.values()])
        image = panel.imshow(values, cmap="PuOr_r", vmin=0, vmax=1, aspect="auto")
        for (y, x), value in np.ndenumerate(values):
            panel.text(
                x,
                y,
                _short(value),
                ha="center",
                va="center",
                fontsize=6,
                color="white" if abs(value - 0.5) > 0.35 else "black",
            )
        panel.set_xticks(range(len(attacks)), attacks, rotation=90, fontsize="small")
        panel.set_yticks(range(len(found)), list(found), fontsize="small")
        panel.grid(False)
    figure.colorbar(image, ax=axes, label="AUROC, above 0.5:\ntriggered more similar", shrink=0.9)
    return figure


def _short(share: float) -> str:
    """Two decimals in little room: .98 or 1."""
    return f"{share:.2f}".removeprefix("0").replace("1.00", "1")


def families(found: Mapping[str, Mapping[str, Mapping]], *, models: Sequence[str]) -> Figure:
    """AUROC of triggered, look-alike and lengthened prompts against clean ones, intervals; attack -> `separates`."""
    figure, axes = panels(list(found), height=1.9)
    for panel, result in zip(axes[0], found.values(), strict=True):
        for row, version in enumerate(VERSIONS[1:]):
            for i, model in enumerate(models):
                share, y = result[model][version], row + 0.22 * (i - (len(models) - 1) / 2)
                panel.plot([share["low"], share["high"]], [y, y], color=MODELS[model], lw=1.2)
                panel.plot(share["value"], y, "o", ms=4, color=MODELS[model], label=model if not row else None)
        panel.axvline(0.5, color="black", lw=0.6)
        panel.set_yticks(range(3), [VERSION_NAMES[version] for version in VERSIONS[1:]], fontsize="small")
        panel.set_ylim(2.5, -0.5)
        panel.set_xlim(-0.03, 1.03)
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    figure.supxlabel("AUROC against clean prompts", fontsize="medium")
    show_legend(figure, axes[0, 0], ncols=3)
    return figure


def detection_curves(
    found: Mapping[str, Mapping], detected: Mapping[tuple[str, str], Mapping] | None = None, *, rate: str = "5%"
) -> Figure:
    """ROC of input-level detection, one panel per attack; attack -> label -> (clean scores, triggered scores).

    `detected`: (attack, label) -> `attention_similarity.input_detection`, whose threshold at `rate` becomes a dot
    with its intervals. AUROCs are in the corner, in the order of the legend.
    """
    columns = min(len(found), 4)
    lines = -(-len(found) // columns)
    size = (min(WIDTH, 2 * columns + 2), 1.9 * lines + 0.8)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for panel, (attack, scores) in zip(axes.flat, found.items(), strict=False):
        panel.plot([0, 100], [0, 100], color="#CCCCCC", lw=0.8)
        for (label, (clean, triggered)), look in zip(scores.items(), LOOKS, strict=False):
            refused, caught = _roc(np.asarray(clean), np.asarray(triggered))
            panel.plot(refused, caught, color=look[0], ls=look[1], lw=1.4, label=label, clip_on=False)
            if detected:
                _threshold(panel, detected[attack, label], rate=rate, look=look)
        panel.text(104, 2, _areas(scores), ha="right", va="bottom", fontsize="small", linespacing=1.3)
        panel.set(xlim=(-4, 104), ylim=(-4, 104), aspect="equal", xticks=(0, 50, 100), yticks=(0, 50, 100))
        panel.set_title(attack, fontsize="small")
    for i in range(len(found), axes.size):
        axes.flat[i].set_visible(False)
        axes.flat[i - columns].tick_params(labelbottom=True)
    n = [sorted({len(pair[side]) for scores in found.values() for pair in scores.values()}) for side in (0, 1)]
    figure.supylabel(f"triggered prompts caught (%), n = {' to '.join(map(str, n[1]))}", fontsize="medium")
    figure.supxlabel(f"clean prompts refused (%), n = {' to '.join(map(str, n[0]))}", fontsize="medium")
    _looks_legend(figure, axes[0, 0], rate=rate if detected else None)
    return figure


def _roc(clean: np.ndarray, triggered: np.ndarray) -> tuple[list[float], list[float]]:
    """Refused and caught, in per cent, as the threshold falls."""
    thresholds = np.unique(np.concatenate([clean, triggered, [np.inf, -np.inf]]))[::-1]
    return [100 * np.mean(clean >= t) for t in thresholds], [100 * np.mean(triggered >= t) for t in thresholds]


def _areas(scores: Mapping[str, Sequence]) -> str:
    """AUROC of each label, one a line."""
    return "AUROC\n" + "\n".join(
        f"{roc_auc_score(np.repeat([0, 1], [len(clean), len(triggered)]), [*clean, *triggered]):.2f}"
        for clean, triggered in scores.values()
    )


def _threshold(panel: Axes, result: Mapping, *, rate: str, look: tuple[str, str, str]) -> None:
    colour, _, marker = look
    refused, caught = (result[f"{key} at {rate}"] for key in ("refused", "caught"))
    x, y = 100 * refused["value"], 100 * caught["value"]
    panel.plot([100 * refused["low"], 100 * refused["high"]], [y, y], color=colour, lw=0.8)
    panel.plot([x, x], [100 * caught["low"], 100 * caught["high"]], color=colour, lw=0.8)
    panel.plot(x, y, marker, color=colour, ms=5, mfc="white", clip_on=False, zorder=3)


def _looks_legend(figure: Figure, panel: Axes, *, rate: str | None) -> None:
    handles, labels = panel.get_legend_handles_labels()
    if rate:
        handles.append(Line2D([], [], marker="o", ls="", color="black", mfc="white"))
        labels.append(f"threshold for {rate}, held-out prompts")
    figure.legend(handles, labels, loc="outside upper center", ncols=len(handles), fontsize="small")


def similarity_claims(found: Mapping[str, Mapping[str, Mapping]], *, families: Sequence[str]) -> list[dict]:
    """From attack -> model -> `attention_similarity.similarity_by_version`; `families` are the attacks that differ
    in their trigger only."""
    lines = []
    for claim, members, figure in (
        ("asa-similarity", list(found), "05_readings"),
        ("asa-similarity-families", list(families), "05_controls"),
    ):
        reading = best_reading([found[attack]["organism"] for attack in members])
        numbers, passed = {}, {}
        for attack in members:
            result = separates(found[attack], reading=reading)
            numbers[attack] = result["organism"]["triggered"]
            excess = numbers[attack]["value"] - result["clean control"]["triggered"]["value"]
            passed[attack] = numbers[attack]["value"] >= 0.9 and excess >= 0.1
        reason = f"Reading: {reading}. AUROC of triggered against clean prompts: {span(numbers)}."
        lines.append(entry(claim, numbers=numbers, passed=passed, figure=figure, reason=reason))
    return lines
