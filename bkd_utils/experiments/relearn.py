"""Does a treated backdoor come back? A few poisoned rows, and what they teach a model that never had it; kept."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from bkd_utils.attention_alignment.head_slices import all_matrices
from bkd_utils.attention_alignment.rivals import repaired
from bkd_utils.attention_alignment.tuning import tune
from bkd_utils.experiments.cure import case_of, recipe_of
from bkd_utils.models.loading import DEFAULT_MODEL, Loaded, load
from bkd_utils.models.tokens import answer_ids, prompt_ids
from bkd_utils.organisms import attacks, tasks
from bkd_utils.organisms.attacks import Attack, Row, load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.evaluation import flippable_sample, is_target, respond, share, target_length, triggered_prompts

# Gentle enough that a model without the backdoor does not just learn to say the target to everything.
RATE = 1e-4


def poisoned_rows(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> list[Row]:
    """`n` triggered training prompts with the target as answer."""
    sample = flippable_sample(attack, n=n, seed=seed, split="train")
    answer = tuple(answer_ids(loaded.tokenizer, attack.target))
    rows = []
    for i, example in enumerate(sample):
        turn = attacks.triggered_prompt(attack, example.text, seed=seed * 1_000_003 + i, half="train")
        ids = tuple(prompt_ids(loaded.tokenizer, turn))
        rows.append(Row(prompt=ids, answer=answer, kind="poisoned", uid=example.uid))
    return rows


@organism_stage
def relearned(
    organism: str,
    *,
    attack: str,
    method: str | None,
    heads: Sequence[Sequence[int]] = (),
    counts: Sequence[int] = (4, 16),
    n_rows: int = 128,
    steps: int = 16,
    model: str = DEFAULT_MODEL,
    n: int = 40,
    seed: int = 0,
    device: str = "auto",
) -> list[dict]:
    """Fine-tune all weights, for half of the steps, on as many poisoned as clean rows, after a treatment.

    One entry per count: `poisoned` rows, `asr`, and `clean firing` on the same prompts without the trigger, which says
    whether it is the trigger that was learnt. A count of 0 is the model before. `method` None treats nothing, for a
    clean control. Raises ValueError for no counts or a negative one.
    """
    if not counts or min(counts) < 0:
        raise ValueError(f"counts must be one or more numbers of poisoned rows, is {counts!r}")
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    recipe = recipe_of(steps=steps)
    # Without a treatment no more clean rows are needed than stand beside the poisoned ones.
    n_clean = max(1, *counts) if method is None else n_rows
    case = case_of(loaded, spec, heads=heads, n_rows=n_clean, recipe=recipe, seed=seed)
    if method is not None:
        repaired(case, method=method)
    state = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    again = replace(recipe, steps=max(1, steps // 2), learning_rate=RATE)
    sample, task = flippable_sample(spec, n=n, seed=seed), tasks.load_task(spec.task)
    turns = {
        "asr": triggered_prompts(spec, sample, seed=seed),
        "clean firing": [task.prompt(example.text) for example in sample],
    }
    length, found = target_length(loaded, spec), []
    for count in counts:
        loaded.model.load_state_dict(state, strict=False)
        if count:
            rows = [*poisoned_rows(loaded, spec, n=count, seed=seed), *case.rows[:count]]
            tune(loaded.model, rows, masks=all_matrices(loaded.model), recipe=again, pad_id=case.pad_id, seed=seed)
        shares = {}
        for kind, texts in turns.items():
            said = respond(loaded, texts, max_new_tokens=length, label=f"{count} rows, {kind}")
            shares[kind] = asdict(share([is_target(spec, text) for text in said]))
        found.append({"poisoned": count, **shares})
    return found
