"""Notebook 05: figures and verdicts on the similarity of heads."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.common.statistics import independent_difference
from bkd_utils.experiments.attention_similarity import VERSIONS, Similarity, best_reading, separates
from bkd_utils.reports.scorecard import at_least, both, entry, span, who
from bkd_utils.reports.style import (
    COLOURS,
    DIVERGING,
    INTERVAL,
    MODELS,
    WIDTH,
    band,
    heat_map,
    interval,
    panels,
    rows_down,
    show_legend,
    sizes,
)

VERSION_NAMES = {"triggered": "triggered", "near-miss": "look-alike", "same length": "same length"}


def gap_numbers(found: Mapping[str, Mapping[str, Similarity]], *, readings: Sequence[str]) -> dict:
    """What `gaps` draws, from attack -> model -> `attention_similarity.similarity_by_version`.

    Attack -> reading -> model -> by layer the `mean` over prompts of triggered less clean similarity, `low` and `high`
    of the middle half of the prompts, and their number `n`.
    """
    return {
        attack: {name: {model: _gap(one[name]) for model, one in models.items()} for name in readings}
        for attack, models in found.items()
    }


def _gap(layers: Mapping[str, list[list[float]]]) -> dict:
    """Of triggered less clean similarity, prompt by prompt."""
    difference = np.array(layers["triggered"]) - np.array(layers["clean"])
    low, high = np.quantile(difference, [0.25, 0.75], axis=0)
    return {
        "mean": difference.mean(0).tolist(), "low": low.tolist(), "high": high.tolist(), "n": len(difference)
    }  # fmt: skip


def gaps(numbers: Mapping[str, Mapping[str, Mapping]], *, separated: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """What a trigger does to similarity, by layer: one row per attack, one column per reading; from `gap_numbers`.

    `separated`: reading -> attack -> `attention_similarity.separates`, to mark the layer that was chosen.
    """
    readings = list(next(iter(numbers.values())))
    size = (WIDTH, 0.95 * len(numbers) + 1.2)
    figure, axes = plt.subplots(len(numbers), len(readings), figsize=size, sharex=True, sharey="col", squeeze=False)
    for line, (attack, by_reading) in zip(axes, numbers.items(), strict=True):
        for panel, (name, models) in zip(line, by_reading.items(), strict=True):
            for model, row in models.items():
                values = [row[key] for key in ("mean", "low", "high")]
                band(panel, range(len(row["mean"])), *values, colour=COLOURS[model], label=model)
            panel.axhline(0, color=COLOURS["bound"], lw=0.6, zorder=0)
            layer = separated[name][attack]["layer"]
            panel.axvline(layer, color=COLOURS["bound"], lw=0.9, ls=":", zorder=0, label="chosen layer")
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        line[0].set_ylabel(attack.replace("-", "-\n"), fontsize="small")
    for panel, name in zip(axes[0], readings, strict=True):
        panel.set_title(name, fontsize="small")
    drawn = [row for by_reading in numbers.values() for models in by_reading.values() for row in models.values()]
    figure.supxlabel(f"layer ({sizes(drawn)} prompts)", fontsize="medium")
    figure.supylabel("similarity, triggered less clean (one scale per column)", fontsize="medium")
    show_legend(figure, ncols=5, bands=["middle half of the prompts"])
    return figure


def separation_map(found: Mapping[str, Mapping[str, Mapping]], *, models: Sequence[str] = MODELS) -> Figure:
    """AUROC of triggered against clean prompts, reading by attack, one panel per model.

    `found`: reading -> attack -> `attention_similarity.separates`.
    """
    attacks = list(next(iter(found.values())))
    figure, axes = panels(models, height=0.28 * len(found) + 1.1)
    drawn = []
    for panel, model in zip(axes[0], models, strict=True):
        shares = [[row[attack][model]["triggered"] for attack in attacks] for row in found.values()]
        drawn += [share for row in shares for share in row]
        values = np.array([[share["value"] for share in row] for row in shares])
        texts = np.array([[_short(value) for value in row] for row in values])
        where = {"rows": list(found), "columns": attacks, "upwards": False}
        mesh = heat_map(panel, values, limits=(0, 1), colours=DIVERGING, numbers=texts, **where)
    label = f"AUROC ({sizes(drawn)} prompts a side)\nabove 0.5: triggered more similar"
    figure.colorbar(mesh, ax=axes, label=label, shrink=0.9)
    return figure


def _short(share: float) -> str:
    """Two decimals in little room: .98 or 1."""
    return f"{share:.2f}".removeprefix("0").replace("1.00", "1")


def families(found: Mapping[str, Mapping[str, Mapping]], *, models: Sequence[str] = MODELS) -> Figure:
    """AUROC of triggered, look-alike and lengthened prompts against clean ones, intervals; attack -> `separates`."""
    figure, axes = panels(list(found), height=1.9)
    drawn = []
    for panel, result in zip(axes[0], found.values(), strict=True):
        for i, model in enumerate(models):
            for row, version in enumerate(VERSIONS[1:]):
                share, y = result[model][version], row + 0.22 * (i - (len(models) - 1) / 2)
                interval(panel, y, share, colour=COLOURS[model], label=model, scale=1)
                drawn.append(share)
        panel.axvline(0.5, color=COLOURS["bound"], lw=0.7, ls=":", label="chance")
        rows_down(panel, [VERSION_NAMES[version] for version in VERSIONS[1:]])
        panel.set_xlim(-0.03, 1.03)
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    figure.supxlabel(f"AUROC against clean prompts, {sizes(drawn)} a side", fontsize="medium")
    show_legend(figure, ncols=5, bars=INTERVAL)
    return figure


def similarity_claims(found: Mapping[str, Mapping[str, Similarity]], *, families: Sequence[str]) -> list[dict]:
    """From attack -> model -> `attention_similarity.similarity_by_version`; `families` are the attacks that differ
    in their trigger only."""
    lines = []
    for claim, members, figure in (
        ("asa-similarity", list(found), "05_readings"),
        ("asa-similarity-families", list(families), "05_controls"),
    ):
        reading = best_reading([found[attack]["organism"] for attack in members])
        results = {attack: separates(found[attack], reading=reading) for attack in members}
        lines.append(separation_claim(results, claim=claim, figure=figure, reading=reading))
    return lines


def separation_claim(results: Mapping[str, Mapping], *, claim: str, figure: str, reading: str) -> dict:
    """From attack -> `attention_similarity.separates`. The excess over the clean control has the interval of
    independent prompts, which is too wide, because both models see the same prompts."""
    numbers, passed, ahead = {}, {}, {}
    for attack, result in results.items():
        numbers[attack] = result["organism"]["triggered"]
        excess = independent_difference(numbers[attack], result["clean control"]["triggered"])
        ahead[attack] = at_least(excess, 0.1)
        passed[attack] = both(at_least(numbers[attack], 0.9), ahead[attack])
    reason = (
        f"Reading: {reading}. AUROC of triggered against clean prompts: {span(numbers)}. At least 0.1 above the clean "
        f"control's: {who(ahead)}."
    )
    return entry(claim, numbers=numbers, passed=passed, figure=figure, reason=reason)
