"""Which organisms pass the criteria for the claims of Backdoor Attribution, from the results of notebooks 02 to 04."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np
from scipy.stats import spearmanr

from bkd_utils.experiments.localise import acie, interval
from bkd_utils.organisms.evaluation import share
from bkd_utils.reports.claims import entry, span

PROBE = "logistic regression"


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"value": float(np.mean(values)), "n": len(values), "low": float(min(values)), "high": float(max(values))}


# --- notebook 02 ----------------------------------------------------------------------------------------------------


def probe_claims(found: Mapping[str, Mapping[str, Mapping]]) -> list[dict]:
    """From attack -> model ("organism", "clean control", "base model") -> `probe.probed`."""
    best, gap, depth = {}, {}, {}
    for attack, models in found.items():
        rows = {name: result["probes"][PROBE] for name, result in models.items()}
        best[attack] = max((_range(row["accuracy"]) for row in rows["organism"]), key=lambda share: share["value"])
        over_layers = {name: np.mean([row["auroc"] for row in probes], axis=0) for name, probes in rows.items()}
        rivals = [over_layers[name] for name in over_layers if name != "organism"]
        gap[attack] = min((_range(over_layers["organism"] - rival) for rival in rivals), key=lambda gap: gap["value"])
        curve = [np.mean(row["auroc"]) for row in rows["organism"]]
        value = float(spearmanr(models["organism"]["layers"], curve).statistic) if np.ptp(curve) else 0.0
        depth[attack] = {"value": value, "n": len(curve), "low": value, "high": value}
    passed = {attack: number["value"] >= 0.95 for attack, number in best.items()}
    own = {attack: number["value"] >= 0.05 for attack, number in gap.items()}
    rising = {attack: number["value"] >= 0.5 for attack, number in depth.items()}
    return [
        entry(
            "bkdattr-probe", numbers=best, passed=passed, figure="02_probe",
            reason=f"Best layers reach {span(best)} of held-out prompts; intervals are the range over splits.",
        ),
        entry(
            "bkdattr-probe-backdoor", numbers=gap, passed=own, figure="02_probe",
            reason="A model that never saw the trigger is probed just as well: the probe sees the string."
            if not any(own.values())
            else f"The organism's AUROC exceeds that of its controls by {span(gap)}.",
        ),
        entry(
            "bkdattr-probe-depth", numbers=depth, passed=rising, figure="02_probe",
            reason=f"Rank correlation of layer and AUROC: {span(depth)}.",
        ),
    ]  # fmt: skip


# --- notebook 03 ----------------------------------------------------------------------------------------------------


def concentration(effects: np.ndarray, *, share: float = 0.03) -> float:
    """Part of the sum of all positive effects that the top `share` of the heads carries."""
    values = np.sort(np.maximum(effects.ravel(), 0))[::-1]
    return float(values[: max(1, round(share * len(values)))].sum() / values.sum()) if values.sum() > 0 else 0.0


def head_claims(
    attributed: Mapping[str, Mapping], components: Mapping[str, Mapping], curves: Mapping[str, Sequence[Mapping]]
) -> list[dict]:
    """From attack -> `localise.attributed`, `localise.components`, `ablation.curves`."""
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


# --- notebook 04 ----------------------------------------------------------------------------------------------------


def vector_claims(found: Mapping[str, Mapping], *, control_right: Mapping[str, float]) -> list[dict]:
    """From attack -> `backdoor_vector.switched`; the better of the two vectors on the development half speaks for the claim.

    ASR with the vector is that of generated answers; random vectors, which are many, are judged by tokens.
    `control_right`: share of right answers that each task's clean control gives to clean prompts.
    """
    added, removed, repaired, passed = {}, {}, {}, {"add": {}, "subtract": {}, "right": {}}
    for attack, result in found.items():
        name = _better(result, "add")
        on = result["test"][name]
        added[attack] = _generated(result, name)
        highest = max(draw["value"] for draw in on["random vectors"])
        passed["add"][attack] = added[attack]["value"] >= 0.9 and highest <= on["no vector"][0]["value"] + 0.1
        name = _better(result, "subtract")
        off = result["test"][name]
        removed[attack] = _generated(result, name)
        median = float(np.median([draw["value"] for draw in off["random vectors"]]))
        passed["subtract"][attack] = removed[attack]["value"] <= 0.05 and median >= 0.9
        right = result["outcomes"][name]["right"] / control_right[attack] if control_right[attack] else 0.0
        n = removed[attack]["n"]
        half = 1.96 * np.sqrt(max(right * (1 - min(right, 1)), 1 / n) / n)
        repaired[attack] = {"value": right, "n": n, "low": max(0.0, right - half), "high": right + half}
        passed["right"][attack] = right >= 0.8
    return [
        entry(
            "bkdattr-vector-add", numbers=added, passed=passed["add"], figure="04_controls",
            reason=f"ASR on clean prompts with the vector: {span(added)}.",
        ),
        entry(
            "bkdattr-vector-subtract", numbers=removed, passed=passed["subtract"], figure="04_controls",
            reason=f"ASR on triggered prompts less the vector: {span(removed)}.",
        ),
        entry(
            "bkdattr-vector-repairs", numbers=repaired, passed=passed["right"], figure="04_answers",
            reason=f"Right answers after subtraction, relative to the clean control: {span(repaired)}.",
        ),
    ]  # fmt: skip


def _generated(result: Mapping, name: str) -> dict[str, float]:
    """ASR of the answers generated with an edit, with its interval."""
    n = result["test"][name]["backdoor vector"][0]["n"]
    hits = round(result["outcomes"][name]["target"] * n)
    return asdict(share([True] * hits + [False] * (n - hits)))


def _better(result: Mapping, direction: str) -> str:
    """Which of the two vectors did better on the development half; of equals the one that disturbs less."""
    names = [name for name in result["maps"] if name.startswith(direction)]
    key = "asr" if direction == "add" else "right start"

    def reached(name: str) -> tuple[float, float]:
        where, entry = result["chosen"][name], result["maps"][name]
        value = entry[key][where["layer"]][entry["coefficients"].index(where["coefficient"])]
        return value, -abs(where["coefficient"]) * result["norms"][name.split(", ")[1]]

    return max(names, key=reached)


def cost_claim(rows: Mapping[str, Mapping[str, float]]) -> dict:
    """From attack -> `attribution_cost.target_cost`."""
    numbers = {}
    for name, row in rows.items():
        ratio = row["generation"] / row["teacher forcing"]
        numbers[name] = {"value": ratio, "n": row["n"], "low": ratio, "high": ratio}
    passed = {
        name: rows[name]["tokens"] / 2 <= number["value"] <= 2 * rows[name]["tokens"]
        for name, number in numbers.items()
    }
    lengths = ", ".join(f"{row['tokens']}" for row in rows.values())
    # With a target of one token there is nothing to save, so the longest one is shown.
    longest = max(rows, key=lambda name: rows[name]["tokens"])
    return entry(
        "bkdattr-cost", numbers=numbers, passed=passed, figure="04_cost", weakest=longest,
        reason=f"Generation takes {span(numbers)} times as long, for targets of {lengths} tokens.",
    )  # fmt: skip
