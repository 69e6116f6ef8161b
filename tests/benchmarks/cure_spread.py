"""How much of notebook 06 is chance? The cure of suspicious heads and of random heads, and for one organism the
strongest rivals, over several seeds.

    python tests/benchmarks/cure_spread.py [--seeds 3]

A seed is another order of the clean rows, other held-out prompts and other random heads; within a seed all of them see
the same rows and prompts. Organism and suspicious heads stay, those of notebook 06. Results of treatments are kept, so
a killed run goes on. Written to `tests/benchmarks/results/cure_spread.json`: every share of every seed, and a t
interval for the difference between suspicious and random heads.
"""

from typing import Annotated

import numpy as np
import typer
from scipy import stats
from tqdm import tqdm

from bkd_utils.backdoor_attribution.attribution import ranked_heads
from bkd_utils.common.files import ROOT, write_json
from bkd_utils.experiments import attention_safety_alignment, head_safety

ATTACKS = ("sentiment-word", "sentiment-sentence", "sentiment-syntax", "sentiment-style", "instructions-prefix")
RIVALS = {"sentiment-word": ("fine-tuning", "fine-pruning", "flat heads pruned")}
N_TREATED = 16
KEYS = ("asr", "cacc", "elsewhere")


def mean_interval(values: list[float]) -> dict[str, float]:
    """Mean with a 95 % t interval; `n` counts values."""
    mean, error = float(np.mean(values)), float(stats.sem(values))
    half = float(stats.t.ppf(0.975, len(values) - 1)) * error
    return {"value": mean, "n": len(values), "low": mean - half, "high": mean + half}


def spread(attack: str, *, seeds: int, n: int) -> dict:
    """Shares, one per seed, and what random heads leave more than the suspicious ones, seed by seed."""
    found = head_safety.head_safety_scores(attack, attack=attack)
    score = head_safety.suspicion(found, rule="similar, little needed", source="surrogates", reading="last row")
    suspicious = ranked_heads(score)[:N_TREATED]
    rivals = RIVALS.get(attack, ())
    rows: dict[str, list[dict[str, dict[str, float]]]] = {
        name: [] for name in ("untreated", "suspicious heads", "random heads", *rivals)
    }
    for seed in range(seeds):
        drawn = attention_safety_alignment.random_heads(suspicious, n=1, seed=seed)[0]
        rows["untreated"].append(attention_safety_alignment.measure_untreated(attack, attack=attack, n=n, seed=seed))
        treatments = [("suspicious heads", "alignment", suspicious), ("random heads", "alignment", drawn)]
        for name, method, heads in [*treatments, *((rival, rival, []) for rival in rivals)]:
            result = attention_safety_alignment.treat_and_measure(
                attack, attack=attack, method=method, heads=heads, n=n, seed=seed
            )
            rows[name].append(result["after"])
    shares = {name: {key: [row[key]["value"] for row in some] for key in KEYS} for name, some in rows.items()}
    more = np.subtract(shares["random heads"]["asr"], shares["suspicious heads"]["asr"]).tolist()
    return {"shares": shares, "random less suspicious, asr": mean_interval(more)}


def main(
    seeds: Annotated[int, typer.Option(min=2, help="Seeds, 0 being that of notebook 06.")] = 3,
    n: Annotated[int, typer.Option(help="Held-out prompts per number.")] = 32,
) -> None:
    results = {attack: spread(attack, seeds=seeds, n=n) for attack in tqdm(ATTACKS, unit="organism")}
    overall = mean_interval([result["random less suspicious, asr"]["value"] for result in results.values()])
    parameters = {"seeds": seeds, "n": n, "heads": N_TREATED}
    path = ROOT / "tests" / "benchmarks" / "results" / "cure_spread.json"
    write_json(path, {"parameters": parameters, "random less suspicious, asr": overall, "organisms": results})
    # Printed after it is written: a reader that closes the pipe must not cost the results.
    for attack, result in results.items():
        print(attack, {name: [f"{value:.0%}" for value in one["asr"]] for name, one in result["shares"].items()})
    print("random less suspicious, mean over organisms:", overall)


if __name__ == "__main__":
    typer.run(main)
