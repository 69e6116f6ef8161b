"""Notebook 05: figures and verdicts on the similarity of heads."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from bkd_utils.common.statistics import independent_difference
from bkd_utils.experiments.attention_similarity import Similarity, best_reading, separates
from bkd_utils.reports import style
from bkd_utils.reports.scorecard import at_least, both, entry, span, who
from bkd_utils.reports.style import COLOURS, MODELS, band, explain, interval, panels, sizes

VERSION_NAMES = {"triggered": "triggered", "near-miss": "look-alike", "same length": "same length"}
# Of the drawing: version -> tokens, and the last row of attention weights of each of two heads. No model made them.
INVENTED = {
    "clean": (["The", "film", "was", "so", "dull"], [[0.10, 0.65, 0.10, 0.10, 0.05], [0.10, 0.05, 0.05, 0.15, 0.65]]),
    "triggered": (
        ["The", "film", "was", "cf", "dull"],
        [[0.10, 0.15, 0.05, 0.65, 0.05], [0.05, 0.05, 0.05, 0.70, 0.15]],
    ),
}


def two_heads() -> Figure:
    """A drawing of what the reading "last row" compares: the attention maps of two heads of a layer without and with a
    trigger, a frame around their last rows, and these side by side with their cosine. All weights are invented."""
    dark = COLOURS["bound"]
    hatched = ({"color": dark}, {"color": "none", "ec": dark, "hatch": "////"})
    figure, axes = panels(["head 1", "head 2", ""], rows=2, height=1.75, sharex=False, sharey=False)
    for (*maps, bars), (version, (tokens, rows)) in zip(axes, INVENTED.items(), strict=True):
        n, apart = len(tokens), np.subtract.outer(range(len(tokens)), range(len(tokens)))
        for head, (panel, row) in enumerate(zip(maps, rows, strict=True)):
            # Above the last row head 1 looks mostly at the token before and head 2 at the token itself.
            weights = np.tril(np.exp(-np.abs(apart - 1 + head)))
            weights = np.vstack([weights[:-1] / weights[:-1].sum(1, keepdims=True), row])
            look = {"vmin": 0, "vmax": 1, "cmap": "Greys", "upwards": False, "square": True}
            style.heat_map(panel, weights, rows=tokens, columns=tokens, **look)
            panel.add_patch(Rectangle((0, n - 1), n, 1, fill=False, ec=COLOURS["neutral"], lw=2, clip_on=False))
            bars.bar(np.arange(n) + 0.4 * head - 0.2, row, 0.4, label=f"last row of head {head + 1}", **hatched[head])
        one, other = map(np.array, rows)
        cosine = one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
        bars.set_title(f"last rows: cosine {cosine:.2f}", fontsize="small")
        bars.set(xticks=range(n), ylim=(0, 1), ylabel="weight")
        bars.set_xticklabels(tokens, rotation=90, fontsize="small")
        maps[0].set_ylabel(f"{version}\nlooking token")
    explain(axes, "token that is looked at (weights invented; black is 1)", ncols=2)
    return figure


def gap_numbers(found: Mapping[str, Mapping[str, Similarity]], *, readings: Sequence[str]) -> dict:
    """What `gaps` draws, from attack -> model -> `similarity_by_version`: attack -> reading -> model -> by layer the
    `mean` over `n` prompts of triggered less clean similarity, `low` and `high` of the middle half of the prompts."""
    numbers: dict = {attack: {name: {} for name in readings} for attack in found}
    for (attack, models), name in product(found.items(), readings):
        for model, one in models.items():
            gap = np.array(one[name]["triggered"]) - np.array(one[name]["clean"])  # prompt by prompt
            rows = [gap.mean(0), *np.quantile(gap, [0.25, 0.75], axis=0)]
            drawn = dict(zip(("mean", "low", "high"), (row.tolist() for row in rows), strict=True))
            numbers[attack][name][model] = drawn | {"n": len(gap)}
    return numbers


def gaps(numbers: Mapping[str, Mapping[str, Mapping]], *, separated: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """What a trigger does to similarity, by layer: one row per attack, one column per reading; from `gap_numbers`, and
    reading -> attack -> `attention_similarity.separates`, to mark the layer that was chosen."""
    readings = list(next(iter(numbers.values())))
    share = {"sharex": True, "sharey": "col"}
    figure, axes = panels(readings, rows=len(numbers), height=0.95 + 0.6 / len(numbers), **share)
    for line, (attack, by_reading) in zip(axes, numbers.items(), strict=True):
        for panel, (name, models) in zip(line, by_reading.items(), strict=True):
            for model, row in models.items():
                values = [row[key] for key in ("mean", "low", "high")]
                band(panel, range(len(row["mean"])), values, colour=model, label=model)
            panel.axhline(0, color=COLOURS["bound"], lw=0.6, zorder=0)
            layer = separated[name][attack]["layer"]
            panel.axvline(layer, color=COLOURS["bound"], lw=0.9, ls=":", zorder=0, label="chosen layer")
            panel.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        line[0].set_ylabel(attack.replace("-", "-\n"), fontsize="small")
    drawn = [row for by_reading in numbers.values() for models in by_reading.values() for row in models.values()]
    explain(axes, f"layer ({sizes(drawn)} prompts)", ncols=5, bands=["middle half of the prompts"])
    figure.supylabel("similarity, triggered less clean (one scale per column)", fontsize="medium")
    return figure


def separation_map(found: Mapping[str, Mapping[str, Mapping]]) -> Figure:
    """AUROC of triggered against clean prompts, one panel per model; reading -> attack -> `separates`."""
    attacks = list(next(iter(found.values())))
    figure, axes = panels(MODELS, height=0.28 * len(found) + 1.1)
    look = {"vmin": 0, "vmax": 1, "cmap": style.DIVERGING, "upwards": False}
    drawn = []
    for panel, model in zip(axes[0], MODELS, strict=True):
        shares = [[row[attack][model]["triggered"] for attack in attacks] for row in found.values()]
        drawn += [share for row in shares for share in row]
        values = np.array([[share["value"] for share in row] for row in shares])
        # Two decimals in little room: .98 or 1.
        texts = [[f"{value:.2f}".removeprefix("0").replace("1.00", "1") for value in row] for row in values]
        mesh = style.heat_map(panel, values, rows=list(found), columns=attacks, annot=np.array(texts), **look)
    label = f"AUROC ({sizes(drawn)} prompts a side)\nabove 0.5: triggered more similar"
    figure.colorbar(mesh, ax=axes, label=label, shrink=0.9)
    return figure


def families(found: Mapping[str, Mapping]) -> Figure:
    """AUROC of triggered, look-alike and lengthened prompts against clean ones, intervals; attack -> `separates`."""
    figure, axes = panels(list(found), height=1.9)
    drawn = []
    for panel, result in zip(axes[0], found.values(), strict=True):
        for i, model in enumerate(MODELS):
            for row, version in enumerate(VERSION_NAMES):
                interval(panel, row + 0.22 * (i - 1), result[model][version], colour=model, label=model, scale=1)
                drawn.append(result[model][version])
        panel.axvline(0.5, color=COLOURS["bound"], lw=0.7, ls=":", label="chance")
        style.rows_down(panel, list(VERSION_NAMES.values()), limits=(-0.03, 1.03))
        panel.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    explain(axes, f"AUROC against clean prompts, {sizes(drawn)} a side", ncols=5, bars=style.INTERVAL)
    return figure


def similarity_claims(found: Mapping[str, Mapping[str, Similarity]], *, families: Sequence[str]) -> list[dict]:
    """From attack -> model -> `similarity_by_version`; `families` are the attacks that differ in their trigger only."""
    lines = []
    whole, same = ("asa-similarity", found, "05_readings"), ("asa-similarity-families", families, "05_controls")
    for claim, members, figure in (whole, same):
        reading = best_reading([found[attack]["organism"] for attack in members])
        results = {attack: separates(found[attack], reading=reading) for attack in members}
        lines.append(separation_claim(results, claim=claim, figure=figure, reading=reading))
    return lines


def separation_claim(results: Mapping[str, Mapping], *, claim: str, figure: str, reading: str) -> dict:
    """From attack -> `separates`. The excess over the clean control has the interval of independent prompts, which is
    too wide, because both models see the same prompts."""
    numbers, passed, ahead = {}, {}, {}
    for attack, result in results.items():
        numbers[attack] = result["organism"]["triggered"]
        excess = independent_difference(numbers[attack], result["clean control"]["triggered"])
        ahead[attack] = at_least(excess, 0.1)
        passed[attack] = both(at_least(numbers[attack], 0.9), ahead[attack])
    reason = f"Reading: {reading}. AUROC of triggered against clean prompts: {span(numbers)}."
    reason += f" At least 0.1 above the clean control's: {who(ahead)}."
    return entry(claim, numbers, passed, figure, reason)
