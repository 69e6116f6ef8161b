"""Notebook 03: pictures, tables and verdicts on heads and components."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bkd_utils.common.statistics import interval
from bkd_utils.experiments.head_attribution import acie
from bkd_utils.reports.scorecard import entry, span
from bkd_utils.reports.style import COLOURS, DIVERGING, panels, show_legend

# One colour per ranking; the random one is the grey of all controls without a model of their own.
RANKINGS = {"ACIE": "#D55E00", "gradient": "#E69F00", "necessity": "#0072B2", "random": "#777777"}
# Attack success in per cent by number of ablated heads, as published; "?" where nobody who read the paper quotes it.
TABLE_1 = {
    "fixed output, Llama-2-7B": {0: 100, 1: 100, 2: 100, 4: 100, 8: 99.22, 16: 98.44, 32: 69.53},
    "fixed output, Qwen-2.5-7B": {0: 100, 1: 100, 2: 100, 4: 88.28, 8: 87.5, 16: 82.42, 32: 90.62},
    "jailbreak, Llama-2-7B": {0: 75.78, 32: 3.52},
    "jailbreak, Qwen-2.5-7B": {0: 78.91, 32: 54.3},
}


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


def what_there_is(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """Target, its probability without and with the trigger, highest ACIE; attack ->
    `head_attribution.attribute_heads`."""
    rows = {
        attack: {
            "target": "".join(result["target"]).replace("Ġ", " ").strip(),
            "P(target), clean": f"{np.mean(result['clean']):.3f}",
            "P(target), triggered": f"{np.mean(result['triggered']):.3f}",
            "highest ACIE": f"{acie(result).max().item():.3f}",
        }
        for attack, result in found.items()
    }
    return pd.DataFrame(rows).T.rename_axis("organism")


def table_1(found: Mapping[str, Sequence[Mapping]]) -> pd.DataFrame:
    """ASR (%) after published ablation by number of heads, the paper's rows first; attack ->
    `head_attribution.ablation_curves`."""
    ours = {}
    for attack, rows in found.items():
        chosen = [r for r in rows if r["ranking"] == "none" or (r["ranking"], r["kind"]) == ("ACIE", "published")]
        ours[f"{attack}, here"] = {row["k"]: 100 * row["asr"]["value"] for row in chosen}
    table = pd.DataFrame(TABLE_1 | ours).T
    return (
        table[sorted(table.columns)]
        .rename_axis(columns="heads ablated")
        .map(lambda x: "?" if pd.isna(x) else f"{x:.1f}")
    )


def ablations(found: Mapping[str, Sequence[Mapping]], *, k: int) -> pd.DataFrame:
    """Everything measured with `k` heads out, random draws averaged; attack -> `head_attribution.ablation_curves`."""
    lines = []
    for attack, rows in found.items():
        for row in rows:
            if row["ranking"] == "none" or row["k"] == k:
                values = {name: 100 * row[name]["value"] for name in ("asr", "right", "utility")}
                what = {"organism": attack, "ranking": row["ranking"], "scope": row["scope"]}
                kind = "" if row["k"] == 0 else row["kind"]
                lines.append(what | {"kind": kind} | values | {"perplexity": row["perplexity"]})
    table = pd.DataFrame(lines).groupby(["organism", "ranking", "kind", "scope"], sort=False).mean()
    return table.rename(columns={"asr": "ASR (%)", "right": "right (%)", "utility": "utility (%)"}).round(1)


def concentration(effects: np.ndarray, *, share: float = 0.03) -> float:
    """Part of the sum of all positive effects that the top `share` of the heads carries."""
    values = np.sort(np.maximum(effects.ravel(), 0))[::-1]
    return float(values[: max(1, round(share * len(values)))].sum() / values.sum()) if values.sum() > 0 else 0.0


def head_claims(
    attributed: Mapping[str, Mapping], components: Mapping[str, Mapping], curves: Mapping[str, Sequence[Mapping]]
) -> list[dict]:
    """From attack -> `head_attribution.attribute_heads`, `head_attribution.attribute_components`,
    `head_attribution.ablation_curves`."""
    sparse, margin, drop, random_drop, rises = {}, {}, {}, {}, {}
    for attack, found in attributed.items():
        values = np.array(found["exact"])
        draws = np.random.default_rng(0).integers(len(values), size=(500, len(values)))
        spread = [concentration(values[draw].mean(0)) for draw in draws]
        value = concentration(acie(found).numpy())
        # The basic interval: resampling adds noise, noise lowers the concentration, and reflection takes that back out.
        low, high = np.clip(2 * value - np.quantile(spread, (0.975, 0.025)), 0, 1)
        sparse[attack] = {"value": value, "n": len(values), "low": float(low), "high": float(high)}
        strongest = {
            name: max(
                (interval(column) for column in np.array(components[attack]["last"][name]).T), key=lambda x: x["value"]
            )
            for name in ("attention", "MLP")
        }
        margin[attack] = {
            "value": strongest["attention"]["value"] - strongest["MLP"]["value"],
            "n": strongest["attention"]["n"],
            "low": strongest["attention"]["low"] - strongest["MLP"]["high"],
            "high": strongest["attention"]["high"] - strongest["MLP"]["low"],
        }
        rows = [row for row in curves[attack] if row["scope"] == "last position"]
        before = next(row for row in rows if row["ranking"] == "none")["asr"]
        line = sorted((r["k"], r["asr"]) for r in rows if r["ranking"] == "ACIE" and r["kind"] == "published")
        n_heads = acie(found).numel()
        few = min((k for k, _ in line), key=lambda k: abs(k - 0.03 * n_heads))
        after = dict(line)[few]
        drop[attack] = {
            "value": _drop(before["value"], after["value"]),
            "n": after["n"],
            "low": _drop(before["value"], after["high"]),
            "high": _drop(before["value"], after["low"]),
        }
        by_count: dict[int, list[float]] = {}
        for row in rows:
            if row["ranking"] == "random":
                by_count.setdefault(row["k"], []).append(row["asr"]["value"])
        at = min((k for k in by_count if k), key=lambda k: abs(k - few))
        random_drop[attack] = _drop(by_count[0][0], np.mean(by_count[at]))
        steps = [before, *(asr for _, asr in line)]
        rises[attack] = max((b["value"] - a["value"]) * b["n"] for a, b in itertools.pairwise(steps))
    big = {attack: number["value"] >= 0.9 and random_drop[attack] < 0.1 - 1e-9 for attack, number in drop.items()}
    steady = {
        attack: {"value": rise, "n": drop[attack]["n"], "low": rise, "high": rise} for attack, rise in rises.items()
    }
    apart = {attack: number["low"] > 0 for attack, number in margin.items()}
    return [
        entry(
            "bkdattr-sparse-heads", numbers=sparse, passed={a: x["value"] >= 0.5 for a, x in sparse.items()},
            figure="03_sorted", reason=f"The top 3 % of the heads carry {span(sparse)} of all positive ACIE.",
        ),
        entry(
            "bkdattr-ablation", numbers=drop, passed=big, figure="03_ablation",
            reason=f"About 3 % of the heads take {span(drop)} off the ASR; random heads "
            f"{min(random_drop.values()):.2f} to {max(random_drop.values()):.2f}.",
        ),
        entry(
            "bkdattr-ablation-monotone", numbers=steady, passed={a: rise <= 2 + 1e-9 for a, rise in rises.items()},
            figure="03_ablation", reason=f"Largest rise between neighbouring counts, in prompts: {span(steady)}.",
        ),
        entry(
            "bkdattr-heads-not-mlps", numbers=margin, passed=apart, figure="03_components",
            reason=f"Strongest attention layer less strongest MLP: {span(margin)} in the target's probability.",
        ),
    ]  # fmt: skip


def _drop(before: float, after: float) -> float:
    """What part of a share is gone; of nothing, nothing."""
    return 1 - after / before if before else 0.0
