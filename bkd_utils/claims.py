"""Published claims, our criteria, our numbers, a verdict each. The criteria are in `data/published.toml`.

A criterion is passed or not by each organism; the verdict is `holds` if all pass, `holds in part` if some do, and
`does not hold` if none does.
"""

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from bkd_utils import figures
from bkd_utils.evaluation import share
from bkd_utils.files import DATA, UserError, read_json, write_json
from bkd_utils.localise import acie, interval
from bkd_utils.observe import best_reading, separates

KEYS = {"paper", "claim", "published", "source", "sure", "criterion"}
PROBE = "logistic regression"


def published() -> dict[str, dict[str, str]]:
    """Claim id -> paper, claim, published number, source, how sure we are, criterion. Raises UserError if one lacks."""
    found = tomllib.loads((DATA / "published.toml").read_text(encoding="utf-8"))
    for name, entry in found.items():
        if set(entry) != KEYS:
            raise UserError(f"published.toml, {name}: keys must be {', '.join(sorted(KEYS))}")
    return found


def verdict(passed: Mapping[str, bool]) -> str:
    """One word for the outcomes of all organisms. Raises ValueError for none: that is no verdict."""
    if not passed:
        raise ValueError("a verdict over no organisms")
    return "holds" if all(passed.values()) else "holds in part" if any(passed.values()) else "does not hold"


def entry(
    claim: str,
    *,
    numbers: Mapping[str, Mapping[str, float]],
    passed: Mapping[str, bool],
    reason: str,
    figure: str,
    weakest: str | None = None,
) -> dict:
    """One line of the scorecard. `numbers` and `passed` are by organism; `ours` is that of `weakest`, by default the
    first organism that fails, or else the first."""
    known = published()
    if claim not in known:
        raise ValueError(f"unknown claim {claim!r}; known: {', '.join(known)}")
    outcome = verdict(passed)
    shown = weakest or next((name for name, ok in passed.items() if not ok), next(iter(passed)))
    return {
        "id": claim,
        "paper": known[claim]["paper"],
        "claim": known[claim]["claim"],
        "published": known[claim]["published"],
        "ours": {key: numbers[shown][key] for key in ("value", "n", "low", "high")},
        "organism": shown,
        "by_organism": {name: {**number, "passed": bool(passed[name])} for name, number in numbers.items()},
        "criterion": known[claim]["criterion"],
        "verdict": outcome,
        "reason": reason,
        "figure": figure,
    }


def record(entries: Sequence[Mapping]) -> Path:
    """Write entries into the scorecard beside the figures; those of the same claims are replaced."""
    path = figures.folder() / "scorecard.json"
    kept = {row["id"]: row for row in read_json(path) if row["id"] in published()} if path.is_file() else {}
    order = list(published())
    kept |= {row["id"]: dict(row) for row in entries}
    write_json(path, sorted(kept.values(), key=lambda row: order.index(row["id"])))
    return path


def table(entries: Sequence[Mapping]) -> pd.DataFrame:
    """What a notebook shows at its end: claim, published, verdict, organisms that pass, reason."""
    rows = [
        {
            "claim": row["claim"],
            "published": row["published"],
            "verdict": row["verdict"],
            "organisms that pass": _count(row["by_organism"]),
            "because": row["reason"],
        }
        for row in entries
    ]
    return pd.DataFrame(rows).set_index("claim")


def _count(by_organism: Mapping[str, Mapping]) -> str:
    return f"{sum(one['passed'] for one in by_organism.values())} of {len(by_organism)}"


def numbers(entries: Sequence[Mapping]) -> pd.DataFrame:
    """Our number of every claim and organism with its interval."""
    rows = {
        row["id"]: {
            name: f"{one['value']:.3g} [{one['low']:.3g}, {one['high']:.3g}]" + ("" if one["passed"] else " ✗")
            for name, one in row["by_organism"].items()
        }
        for row in entries
    }
    return pd.DataFrame(rows).T.rename_axis("claim")


def _range(values: Sequence[float]) -> dict[str, float]:
    return {"value": float(np.mean(values)), "n": len(values), "low": float(min(values)), "high": float(max(values))}


# --- notebook 02 ----------------------------------------------------------------------------------------------------


def probe_claims(found: Mapping[str, Mapping[str, Mapping]]) -> list[dict]:
    """From attack -> model ("organism", "clean control", "base model") -> `probing.probed`."""
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
            reason=f"Best layers reach {_span(best)} of held-out prompts; intervals are the range over splits.",
        ),
        entry(
            "bkdattr-probe-backdoor", numbers=gap, passed=own, figure="02_probe",
            reason="A model that never saw the trigger is probed just as well: the probe sees the string."
            if not any(own.values())
            else f"The organism's AUROC exceeds that of its controls by {_span(gap)}.",
        ),
        entry(
            "bkdattr-probe-depth", numbers=depth, passed=rising, figure="02_probe",
            reason=f"Rank correlation of layer and AUROC: {_span(depth)}.",
        ),
    ]  # fmt: skip


def _span(numbers: Mapping[str, Mapping[str, float]]) -> str:
    values = [number["value"] for number in numbers.values()]
    return f"{min(values):.2f} to {max(values):.2f}"


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
        before = next(row for row in rows if row["k"] == 0)["asr"]
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
        at = min((r["k"] for r in rows if r["ranking"] == "random"), key=lambda k: abs(k - few))
        left = np.mean([r["asr"]["value"] for r in rows if r["ranking"] == "random" and r["k"] == at])
        random_drop[attack] = _drop(before["value"], left)
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
            figure="03_sorted", reason=f"The top 3 % of the heads carry {_span(sparse)} of all positive ACIE.",
        ),
        entry(
            "bkdattr-ablation", numbers=drop, passed=big, figure="03_ablation",
            reason=f"About 3 % of the heads take {_span(drop)} off the ASR; random heads "
            f"{min(random_drop.values()):.2f} to {max(random_drop.values()):.2f}.",
        ),
        entry(
            "bkdattr-ablation-monotone", numbers=steady, passed={a: rise <= 2 + 1e-9 for a, rise in rises.items()},
            figure="03_ablation", reason=f"Largest rise between neighbouring counts, in prompts: {_span(steady)}.",
        ),
        entry(
            "bkdattr-heads-not-mlps", numbers=margin, passed=apart, figure="03_components",
            reason=f"Strongest attention layer less strongest MLP: {_span(margin)} in the target's probability.",
        ),
    ]  # fmt: skip


def _drop(before: float, after: float) -> float:
    """What part of a share is gone; of nothing, nothing."""
    return 1 - after / before if before else 0.0


# --- notebook 04 ----------------------------------------------------------------------------------------------------


def vector_claims(found: Mapping[str, Mapping], *, control_right: Mapping[str, float]) -> list[dict]:
    """From attack -> `switch.switched`; the better of the two vectors on the development half speaks for the claim.

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
            reason=f"ASR on clean prompts with the vector: {_span(added)}.",
        ),
        entry(
            "bkdattr-vector-subtract", numbers=removed, passed=passed["subtract"], figure="04_controls",
            reason=f"ASR on triggered prompts less the vector: {_span(removed)}.",
        ),
        entry(
            "bkdattr-vector-repairs", numbers=repaired, passed=passed["right"], figure="04_answers",
            reason=f"Right answers after subtraction, relative to the clean control: {_span(repaired)}.",
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
    """From attack -> `cost.target_cost`."""
    numbers = {}
    for name, row in rows.items():
        ratio = row["generation"] / row["teacher forcing"]
        numbers[name] = {"value": ratio, "n": row["n"], "low": ratio, "high": ratio}
    passed = {
        name: rows[name]["tokens"] / 2 <= number["value"] <= 2 * rows[name]["tokens"]
        for name, number in numbers.items()
    }
    lengths = ", ".join(f"{row['tokens']}" for row in rows.values())
    return entry(
        "bkdattr-cost", numbers=numbers, passed=passed, figure="04_cost",
        reason=f"Generation takes {_span(numbers)} times as long, for targets of {lengths} tokens.",
    )  # fmt: skip


# --- ASA ------------------------------------------------------------------------------------------------------------


def similarity_claims(found: Mapping[str, Mapping[str, Mapping]], *, families: Sequence[str]) -> list[dict]:
    """From attack -> model -> `observe.observed`; `families` are the attacks that differ in their trigger only."""
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
        reason = f"Reading: {reading}. AUROC of triggered against clean prompts: {_span(numbers)}."
        lines.append(entry(claim, numbers=numbers, passed=passed, figure=figure, reason=reason))
    return lines
