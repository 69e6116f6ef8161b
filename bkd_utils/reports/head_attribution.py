"""Notebook 03: pictures, tables and verdicts on heads and components."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.common.statistics import independent_difference, interval, over_splits, relative_drop
from bkd_utils.experiments.head_attribution import Ablation, ComponentEffects, HeadEffects, acie
from bkd_utils.reports.scorecard import at_least, at_most, both, entry, judged, span, who
from bkd_utils.reports.style import COLOURS, DIVERGING, INTERVAL, LIMITS, band, explain, heat_map, panels, sizes

# Ranking -> how its line looks. The gradient estimates the ACIE and has its colour.
RANKINGS = {
    "ACIE": {"colour": "ACIE"},
    "gradient": {"colour": "ACIE", "ls": "--", "mfc": "white"},
    "necessity": {"colour": "neutral"},
    "random": {"colour": "random"},
}
# Component -> colour and line. Attention has the colour of the heads that it is made of.
PARTS = {"attention": ("ACIE", "-"), "MLP": ("neutral", "--"), "residual": ("random", "-")}
TEMPLATE = {"Ċ": "\\n", "Ġ": " ", "<|im_start|>": "<start>", "<|im_end|>": "<end>"}
# Published attack success in per cent by number of ablated heads, as far as others quote it.
TABLE_1 = {
    "fixed output, Llama-2-7B": {0: 100, 1: 100, 2: 100, 4: 100, 8: 99.22, 16: 98.44, 32: 69.53},
    "fixed output, Qwen-2.5-7B": {0: 100, 1: 100, 2: 100, 4: 88.28, 8: 87.5, 16: 82.42, 32: 90.62},
    "jailbreak, Llama-2-7B": {0: 75.78, 32: 3.52},
    "jailbreak, Qwen-2.5-7B": {0: 78.91, 32: 54.3},
}


def head_maps(effects: Mapping[str, np.ndarray], *, few: int, n: int) -> Figure:
    """ACIE `[layer, head]`, a mean over `n` prompts, per organism on one scale, zero in the middle, layer 0 at the
    bottom. Dots mark the `few` heads of the highest ACIE, titles name the highest."""
    titles = [f"{name}\nhighest: {values.max():.2g}" for name, values in effects.items()]
    figure, axes = panels(titles, height=3.2)
    bound = max(np.abs(values).max() for values in effects.values())
    for panel, values in zip(axes[0], effects.values(), strict=True):
        layers, heads = (range(size) for size in values.shape)
        mesh = heat_map(panel, values, vmin=-bound, vmax=bound, rows=layers, columns=heads, cmap=DIVERGING)
        top = np.unravel_index(np.argsort(values, axis=None)[-few:], values.shape)
        label = f"{few} highest ({few / values.size:.0%})"
        panel.plot(top[1] + 0.5, top[0] + 0.5, ".", ms=3, color=COLOURS["neutral"], label=label)
    figure.colorbar(mesh, ax=axes, label="ACIE (change of the target's probability)", shrink=0.9)
    explain(axes, f"head (n = {n} prompts)", "layer", ncols=1)
    return figure


def components(
    found: Mapping[str, Mapping[str, Sequence[Mapping]]], positions: Mapping[str, np.ndarray], tokens: Sequence[str]
) -> Figure:
    """Effects of whole components. Above: `found`, attack -> component -> effect by layer at the last prompt token,
    with 95 % bootstrap intervals. Below: `positions`, effects of the residual stream `[layer, position]` at the last
    `tokens` on the first answer token."""
    figure, axes = panels(list(found), rows=2, height=2.0)
    bound = max(np.abs(values).max() for values in positions.values())
    for sign, name in TEMPLATE.items():
        tokens = [token.replace(sign, name) for token in tokens]
    for column, (attack, parts) in enumerate(found.items()):
        above, below = axes[:, column]
        for name, rows in parts.items():
            lines, (colour, style) = [[row[key] for row in rows] for key in ("value", "low", "high")], PARTS[name]
            band(above, range(len(rows)), lines, colour=colour, label=name, ls=style)
        above.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        values = positions[attack].T
        look = {"vmin": -bound, "vmax": bound, "cmap": DIVERGING, "upwards": False}
        mesh = heat_map(below, values, rows=tokens, columns=range(values.shape[1]), **look)
    figure.colorbar(mesh, ax=axes[1], label="effect on the\nfirst answer token")
    size = sizes(row for parts in found.values() for rows in parts.values() for row in rows)
    left = ("effect on the target,\nlast prompt token", "residual stream at …")
    explain(axes, f"layer ({size} prompts)", *left, ncols=4, bands=[INTERVAL])
    return figure


def ablation_curves(found: Mapping[str, Sequence[Ablation]]) -> Figure:
    """ASR (top) and utility (bottom) against the number of heads that the published ablation takes out."""
    figure, axes = panels(list(found), rows=2, height=2.0)
    drawn = []
    for column, rows in enumerate(found.values()):
        rows = [row for row in rows if (row.scope, row.kind) == ("last position", "published")]
        for panel, key in zip(axes[:, column], ("asr", "utility"), strict=True):
            for ranking in RANKINGS:
                _ablation_line(panel, rows, ranking, key)
            drawn += [getattr(row, key) for row in rows]
            panel.set_ylim(*LIMITS)
            panel.set_xscale("symlog", linthresh=1, base=2)
            counts = sorted({row.k for row in rows} & {0, 1, 2, 4, 8, 16, 32})
            panel.set_xticks(counts, [str(k) for k in counts])
            panel.minorticks_off()
    shown = [INTERVAL, "random: range over draws"]
    explain(axes, f"heads ablated ({sizes(drawn)} prompts)", "ASR (%)", "utility (%)", bands=shown)
    return figure


def _ablation_line(panel: Axes, rows: Sequence[Ablation], ranking: str, key: str) -> None:
    chosen = [row for row in rows if row.ranking in ("none", ranking)]
    counts = sorted({row.k for row in chosen})
    shares = [[getattr(row, key) for row in chosen if row.k == k] for k in counts]
    values = [[100 * share["value"] for share in group] for group in shares]
    if ranking == "random":
        low, high = map(min, values), map(max, values)
    else:
        low, high = ([100 * group[0][end] for group in shares] for end in ("low", "high"))
    lines = [[np.mean(group) for group in values], list(low), list(high)]
    band(panel, counts, lines, label=ranking, marker="o", **RANKINGS[ranking])


def what_there_is(found: Mapping[str, HeadEffects]) -> pd.DataFrame:
    """By attack: the target, its probability without and with the trigger, and the highest ACIE."""
    rows = {}
    for attack, result in found.items():
        chances = {"clean": np.mean(result.clean), "triggered": np.mean(result.triggered)}
        rows[attack] = {"target": "".join(result.target).replace("Ġ", " ").strip()}
        rows[attack] |= {f"P(target), {version}": f"{chance:.3f}" for version, chance in chances.items()}
        rows[attack]["highest ACIE"] = f"{acie(result).max().item():.3f}"
    return pd.DataFrame(rows).T.rename_axis("organism")


def table_1(found: Mapping[str, Sequence[Ablation]]) -> pd.DataFrame:
    """ASR (%) after the published ablation by number of heads, the paper's rows first."""
    ours = {}
    for attack, rows in found.items():
        chosen = [row for row in rows if row.ranking in ("none", "ACIE") and row.kind == "published"]
        ours[f"{attack}, here"] = {row.k: 100 * row.asr["value"] for row in chosen}
    table = pd.DataFrame(TABLE_1 | ours).T.sort_index(axis=1).rename_axis(columns="heads ablated")
    return table.map(lambda x: "?" if pd.isna(x) else f"{x:.1f}")


def ablations(found: Mapping[str, Sequence[Ablation]], *, k: int) -> pd.DataFrame:
    """Everything measured with `k` heads out, random draws averaged."""
    lines, named = [], {"ASR (%)": "asr", "right (%)": "right", "utility (%)": "utility"}
    for attack, row in ((attack, row) for attack, rows in found.items() for row in rows):
        if row.ranking == "none" or row.k == k:
            line = {"organism": attack, "ranking": row.ranking, "kind": row.kind if row.k else "", "scope": row.scope}
            line |= {title: 100 * getattr(row, name)["value"] for title, name in named.items()}
            lines.append(line | {"perplexity": row.perplexity})
    return pd.DataFrame(lines).groupby(["organism", "ranking", "kind", "scope"], sort=False).mean().round(1)


def concentration(effects: np.ndarray, *, share: float = 0.03) -> float:
    """Part of the sum of all positive effects that the top `share` of the heads carries."""
    values = np.sort(np.maximum(effects.ravel(), 0))[::-1]
    return float(values[: max(1, round(share * len(values)))].sum() / values.sum()) if values.sum() > 0 else 0.0


def head_claims(
    attributed: Mapping[str, HeadEffects],
    components: Mapping[str, ComponentEffects],
    curves: Mapping[str, Sequence[Ablation]],
) -> list[dict]:
    """Four lines of the scorecard, from results by attack. The prompts of an ablation curve are the same for every
    number of heads, but which of them gave the target is not kept. Differences between two numbers of heads therefore
    have the wider interval of independent prompts."""
    sparse = {attack: _concentrated(np.array(found.exact), acie(found).numpy()) for attack, found in attributed.items()}
    margin = {attack: _margin(components[attack].last) for attack in attributed}
    drop, random, rises, spared, met = {}, {}, {}, {}, {}
    for attack, every in curves.items():
        rows, n_heads = [row for row in every if row.scope == "last position"], acie(attributed[attack]).numel()
        before = next(row.asr for row in rows if row.ranking == "none")
        line = {row.k: row.asr for row in rows if (row.ranking, row.kind) == ("ACIE", "published")}
        few = min(line, key=lambda k, n_heads=n_heads: abs(k - 0.03 * n_heads))
        drop[attack] = relative_drop(before, line[few])
        random[attack] = _random_drop(rows, before, k=few)
        rises[attack] = _largest_rise([before, *(line[k] for k in sorted(line))])
        spared[attack] = at_most(random[attack], 0.1)
        met[attack] = both(at_least(drop[attack], 0.9), spared[attack])
    carried = f"The top 3 % of the heads carry {span(sparse)} of all positive ACIE."
    taken = f"About 3 % of the heads take {span(drop)} off the ASR, random heads {span(random)}."
    taken += f" Random heads take off less than 0.1: {who(spared)}."
    rose = f"Largest rise between neighbouring counts, in prompts: {span(rises)}."
    rose += " Intervals are those of independent prompts, which makes them wide."
    ahead = f"Strongest attention layer less strongest MLP: {span(margin)} in the target's probability."
    return [
        entry("bkdattr-sparse-heads", sparse, judged(sparse, at_least, 0.5), "03_head_maps", carried),
        entry("bkdattr-ablation", drop, met, "03_ablation", taken),
        entry("bkdattr-ablation-monotone", rises, judged(rises, at_most, 2), "03_ablation", rose),
        entry("bkdattr-heads-not-mlps", margin, judged(margin, at_least, 0), "03_components", ahead),
    ]


def _concentrated(values: np.ndarray, mean: np.ndarray) -> dict:
    """Concentration of `mean` with its interval over prompts; `values` are effects `[prompt, layer, head]`."""
    draws = np.random.default_rng(0).integers(len(values), size=(500, len(values)))
    spread = [concentration(values[draw].mean(0)) for draw in draws]
    value = concentration(mean)
    # Resampling adds noise, and noise lowers the concentration. The basic (reflected) interval corrects for that.
    low, high = np.clip(2 * value - np.quantile(spread, (0.975, 0.025)), 0, 1)
    return {"value": value, "n": len(values), "low": float(low), "high": float(high)}


def _margin(last: Mapping[str, Sequence]) -> dict:
    """Effect of the strongest attention layer less that of the strongest MLP, low end against high end."""
    effects = ([interval(column) for column in np.array(last[name]).T] for name in ("attention", "MLP"))
    one, other = (max(layers, key=lambda layer: layer["value"]) for layers in effects)
    low, high = one["low"] - other["high"], one["high"] - other["low"]
    return {"value": one["value"] - other["value"], "n": one["n"], "low": low, "high": high}


def _random_drop(rows: Sequence[Ablation], before: Mapping[str, float], *, k: int) -> dict:
    """Mean part of the ASR that random heads take off, at the number of heads next to `k`, with the wider of two
    intervals: over draws, and over the prompts, which all draws share."""
    drawn = [row for row in rows if row.ranking == "random"]
    nearest = min((row.k for row in drawn), key=lambda count: abs(count - k))
    asrs = [row.asr for row in drawn if row.k == nearest]
    mean = {"value": float(np.mean([asr["value"] for asr in asrs])), "n": before["n"]}
    found = relative_drop(before, mean)
    spread = over_splits(np.array([relative_drop(before, asr)["value"] for asr in asrs]), ratio=0)
    if found["low"] is None or spread["low"] is None:
        return found
    return found | {"low": min(found["low"], spread["low"]), "high": max(found["high"], spread["high"])}


def _largest_rise(steps: Sequence[Mapping[str, float]]) -> dict:
    """The largest rise from one share to the next, in prompts. It is below a bar if all rises are. A step at which
    nothing changes at 0 or 100 % is compatible with a rise of almost four prompts, whatever n is. A curve with such a
    step can therefore fail a bar of two prompts, but it cannot pass it."""
    rises = [independent_difference(after, before) for before, after in itertools.pairwise(steps)]
    largest = {key: max(rise[key] * rise["n"] for rise in rises) for key in ("value", "low", "high")}
    return largest | {"n": steps[0]["n"]}
