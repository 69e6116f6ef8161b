"""Tables of notebooks 02 to 04."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from bkd_utils.experiments.localise import acie
from bkd_utils.reports.tables import percent

PROBE = "logistic regression"
# Attack success in per cent by number of ablated heads, as published; "?" where nobody who read the paper quotes it.
TABLE_1 = {
    "fixed output, Llama-2-7B": {0: 100, 1: 100, 2: 100, 4: 100, 8: 99.22, 16: 98.44, 32: 69.53},
    "fixed output, Qwen-2.5-7B": {0: 100, 1: 100, 2: 100, 4: 88.28, 8: 87.5, 16: 82.42, 32: 90.62},
    "jailbreak, Llama-2-7B": {0: 75.78, 32: 3.52},
    "jailbreak, Qwen-2.5-7B": {0: 78.91, 32: 54.3},
}


def probe_means(found: Mapping[str, Mapping[str, Mapping]]) -> pd.DataFrame:
    """Means over layers and splits, attack x measure by model; attack -> model -> `probe.probed`."""
    rows = {}
    for attack, models in found.items():
        for key in ("auroc", "near-miss", "other trigger"):
            rows[attack, key] = {
                name: float(np.mean([layer[key] for layer in result["probes"][PROBE]]))
                for name, result in models.items()
            }
    return pd.DataFrame(rows).T.rename_axis(["organism", "measure"])


def best_layers(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """Accuracy of every kind of probe at its best layer, and of one behind the norm; attack -> `probe.probed`."""
    rows = {}
    for attack, result in found.items():
        kinds = result["probes"] | {f"{next(iter(result['probes']))}, post-norm": result["post-norm"]}
        rows[attack] = {kind: max(np.mean(layer["accuracy"]) for layer in layers) for kind, layers in kinds.items()}
    return pd.DataFrame(rows).T.rename_axis("organism")


def what_there_is(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """Target, its probability without and with the trigger, highest ACIE; attack -> `localise.attributed`."""
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
    """ASR (%) after published ablation by number of heads, the paper's rows first; attack -> `ablation.curves`."""
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
    """Everything measured with `k` heads out, random draws averaged; attack -> `ablation.curves`."""
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


def vectors(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """Chosen layer and coefficient, ASR on test prompts and the median random vector's; attack -> `backdoor_vector.switched`."""
    rows = {}
    for attack, result in found.items():
        for name, tried in result["test"].items():
            rows[attack, name] = {
                "layer": result["chosen"][name]["layer"],
                "coefficient": f"{result['chosen'][name]['coefficient']:g}",
                "no vector": percent(tried["no vector"][0]),
                "backdoor vector": percent(tried["backdoor vector"][0]),
            }
            for others in ("random vectors", "random heads"):
                median = np.median([draw["value"] for draw in tried[others]])
                rows[attack, name][f"{others}, median"] = f"{100 * median:.1f} %"
    return pd.DataFrame(rows).T.rename_axis(["organism", "vector"])


def vector_texts(found: Mapping[str, Mapping]) -> pd.DataFrame:
    """Three test prompts' answers as they were and after each edit; never of harmful prompts."""
    rows = {}
    for attack, result in found.items():
        for name, texts in result.get("texts", {}).items():
            rows[attack, name] = {f"prompt {i + 1}": text for i, text in enumerate(texts)}
    return pd.DataFrame(rows).T.fillna("").rename_axis(["organism", "edit"]) if rows else pd.DataFrame()
