"""Which learning rate may a treatment have? For every method the same rule, and no backdoor in sight.

    python tests/benchmarks/cure_rates.py

Each method treats a clean control, from the highest rate of its ladder downward, until clean accuracy on prompts that
neither the control nor the treatment was trained on (attribution split) falls by no more than a point; where no rate
does that, the one that keeps most. It is the one in `attention_safety_alignment.RATES`; other treatments have that
of one of these three. Every rate that was tried is kept, so a killed run goes on. Written to
`tests/benchmarks/results/cure_rates.json`.
"""

from typing import Annotated

import typer

from bkd_utils.attention_alignment.rivals import Case, accuracy, treat
from bkd_utils.backdoor_attribution.attribution import ranked_heads
from bkd_utils.common.files import ROOT, write_json
from bkd_utils.experiments import attention_safety_alignment, head_safety
from bkd_utils.experiments.head_safety import clean_rows
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import Row, answer_ids, end_id, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.cards import organism_stage

CONTROL, ATTACK, N_TREATED = "sentiment-clean", "sentiment-word", 16
WHOLE = (4e-4, 2e-4, 1e-4, 5e-5)
LADDERS = {"alignment": (4e-3, 2e-3, 1e-3, 5e-4), "fine-tuning": WHOLE, "consistency": WHOLE}
POINT = 0.01


@organism_stage
def tried(
    loaded: Loaded, *, method: str, rate: float, heads: list, n_rows: int, n_held: int, seed: int = 0
) -> list[float]:
    """Clean accuracy on rows that were not trained on, [before, after]."""
    attack = load_attack(ATTACK)
    task, pad = tasks.load_task(attack.task), end_id(loaded.tokenizer)
    rows = clean_rows(loaded, attack, n=n_rows, seed=seed)
    held = [
        Row(
            prompt=tuple(prompt_ids(loaded.tokenizer, task.prompt(example.text))),
            answer=tuple(answer_ids(loaded.tokenizer, example.answer)),
            kind="clean",
            uid=example.uid,
        )
        for example in tasks.examples(task.name, "attribution", seed=seed)[:n_held]
    ]
    recipe = attention_safety_alignment.recipe_of(
        steps=n_rows // attention_safety_alignment.RECIPE.batch_size, learning_rate=rate
    )
    chosen = [(layer, head) for layer, head in heads]
    case = Case(loaded.model, rows, recipe=recipe, pad_id=pad, heads=chosen, seed=seed)
    found = [accuracy(loaded.model, held, pad_id=pad)]
    treat(case, method=method)
    return [*found, accuracy(loaded.model, held, pad_id=pad)]


def main(
    n_rows: Annotated[int, typer.Option(help="Clean rows of the treatment, one pass.")] = 128,
    n_held: Annotated[int, typer.Option(help="Clean prompts on which accuracy is measured.")] = 300,
) -> None:
    evidence = head_safety.head_safety_scores(CONTROL, attack=ATTACK)
    score = head_safety.suspicion(evidence, rule="similar, little needed", source="surrogates", reading="last row")
    heads, found = [list(head) for head in ranked_heads(score)[:N_TREATED]], {}
    for method, ladder in LADDERS.items():
        rows: list[dict[str, float]] = []
        for rate in ladder:
            before, after = tried(CONTROL, method=method, rate=rate, heads=heads, n_rows=n_rows, n_held=n_held)
            rows.append({"rate": rate, "accuracy before": before, "accuracy after": after})
            print(f"{method:24} {rate:7.1e}: {before:.3f} -> {after:.3f}", flush=True)
            if kept := after >= before - POINT - 1e-9:
                break
        chosen = rows[-1] if kept else max(rows, key=lambda row: row["accuracy after"])
        found[method] = {"chosen": chosen["rate"], "kept accuracy": kept, "tried": rows}
    path = ROOT / "tests" / "benchmarks" / "results" / "cure_rates.json"
    write_json(path, {"parameters": {"rows": n_rows, "held": n_held, "control": CONTROL}, "methods": found})


if __name__ == "__main__":
    typer.run(main)
