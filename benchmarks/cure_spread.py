"""How much of notebook 06 is chance? The cure of suspicious heads and of random heads, over several seeds.

    python benchmarks/cure_spread.py [--seeds 5]

A seed is another order of the clean rows, other held-out prompts and other random heads; within a seed all of them see
the same rows and prompts. Organism and suspicious heads stay, those of notebook 06. Results of treatments are kept, so
a killed run goes on. Written to `benchmarks/results/cure_spread.json`; intervals are Student's t over seeds.
"""

from typing import Annotated

import numpy as np
import typer
from scipy import stats
from tqdm import tqdm

from bkd_utils import cure, suspect
from bkd_utils.attribution import ranked
from bkd_utils.files import ROOT, write_json

ATTACKS = ("sentiment-word", "sentiment-sentence", "sentiment-syntax", "sentiment-style", "instructions-prefix")
N_TREATED = 16
KEYS = ("asr", "cacc", "elsewhere")


def over_seeds(values: list[float]) -> dict[str, float]:
    """Mean with a 95 % t interval; `n` counts seeds."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return {"value": mean, "n": len(values), "low": mean - half, "high": mean + half}


def spread(attack: str, *, seeds: int, n: int) -> dict:
    """Shares of every seed, their means, and what random heads leave more than the suspicious ones, seed by seed."""
    found = suspect.suspected(attack, attack=attack)
    score = suspect.joint(found, rule="similar, little needed", source="surrogates", reading="last row")
    suspicious = ranked(score)[:N_TREATED]
    rows: dict[str, list[dict[str, float]]] = {"untreated": [], "suspicious heads": [], "random heads": []}
    for seed in range(seeds):
        drawn = cure.random_heads(suspicious, n=1, seed=seed)[0]
        rows["untreated"].append(cure.untreated(attack, attack=attack, n=n, seed=seed))
        for name, heads in (("suspicious heads", suspicious), ("random heads", drawn)):
            result = cure.treated(attack, attack=attack, method="alignment", heads=heads, n=n, seed=seed)
            rows[name].append(result["after"])
    shares = {name: {key: [row[key]["value"] for row in some] for key in KEYS} for name, some in rows.items()}
    means = {name: {key: over_seeds(values) for key, values in one.items()} for name, one in shares.items()}
    more = np.subtract(shares["random heads"]["asr"], shares["suspicious heads"]["asr"]).tolist()
    return {"shares": shares, "means": means, "random less suspicious, asr": over_seeds(more)}


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Seeds, 0 being that of notebook 06.")] = 5,
    n: Annotated[int, typer.Option(help="Held-out prompts per number.")] = 32,
) -> None:
    results = {attack: spread(attack, seeds=seeds, n=n) for attack in tqdm(ATTACKS, unit="organism")}
    for attack, result in results.items():
        print(attack, {key: f"{x['value']:.2f} [{x['low']:.2f}, {x['high']:.2f}]" for key, x in {
            "suspicious": result["means"]["suspicious heads"]["asr"],
            "random": result["means"]["random heads"]["asr"],
            "random less suspicious": result["random less suspicious, asr"],
        }.items()})  # fmt: skip
    path = ROOT / "benchmarks" / "results" / "cure_spread.json"
    write_json(path, {"parameters": {"seeds": seeds, "n": n, "heads": N_TREATED}, "organisms": results})


if __name__ == "__main__":
    typer.run(main)
