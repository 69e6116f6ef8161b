"""Treat one organism with one method and measure what is left of backdoor and model; kept."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pandas as pd
import torch

from bkd_utils.attacks import Attack, load_attack
from bkd_utils.attribution import head_effects, head_means, ranked
from bkd_utils.cards import organism_stage
from bkd_utils.interventions import Head
from bkd_utils.models import DEFAULT_MODEL, Loaded, load
from bkd_utils.organisms import under_attack
from bkd_utils.pairs import Pairs, pairs, target_ids
from bkd_utils.prompts import end_id
from bkd_utils.repairs import Case, repaired
from bkd_utils.similarity import Scores, head_similarity
from bkd_utils.suspect import clean_rows
from bkd_utils.training import Recipe

# Of head-wise tuning; whole-model tuning takes the steps and has rates of its own.
RECIPE = Recipe(name="cure", steps=16, batch_size=8, learning_rate=2e-3, rank=1, alpha=1, first_token=0.5)


def recipe_of(*, steps: int, learning_rate: float = RECIPE.learning_rate) -> Recipe:
    """The recipe of head-wise tuning with these steps."""
    return replace(RECIPE, steps=steps, learning_rate=learning_rate)


def case_of(
    loaded: Loaded, attack: Attack, *, heads: Sequence[Sequence[int]], n_rows: int, recipe: Recipe, seed: int
) -> Case:
    """The defender's view of an organism. Of the attack only the task is used."""
    rows = clean_rows(loaded, attack.task, n=n_rows, seed=seed)
    chosen = [(layer, head) for layer, head in heads]
    return Case(loaded.model, rows, recipe=recipe, pad_id=end_id(loaded.tokenizer), heads=chosen, seed=seed)


@organism_stage
def treated(
    organism: str,
    *,
    attack: str,
    method: str,
    heads: Sequence[Sequence[int]] = (),
    n_rows: int = 128,
    steps: int = RECIPE.steps,
    learning_rate: float = RECIPE.learning_rate,
    model: str = DEFAULT_MODEL,
    n: int = 60,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """One method of `repairs.REPAIRS` on `n_rows` clean rows; head-wise methods treat the given heads.

    Keys: `after`, as of `organisms.under_attack`; `parameters` that differ; `minutes` of the treatment alone. Raises as
    `repairs.repaired` does.
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    recipe = recipe_of(steps=steps, learning_rate=learning_rate)
    case = case_of(loaded, spec, heads=heads, n_rows=n_rows, recipe=recipe, seed=seed)
    started = time.monotonic()
    count = repaired(case, method=method)
    minutes = (time.monotonic() - started) / 60
    return {"after": under_attack(loaded, spec, n=n, seed=seed), "parameters": count, "minutes": round(minutes, 2)}


@organism_stage
def mechanism(
    organism: str,
    *,
    attack: str,
    method: str,
    heads: Sequence[Sequence[int]],
    n_rows: int = 128,
    steps: int = RECIPE.steps,
    model: str = DEFAULT_MODEL,
    n: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """Has the mechanism gone, or only the symptom? Before and after one method, on triggered prompts.

    Keys: `similarity` of the treated heads to their layers (last row) and `acie`, the highest of any head of the model
    on the target's first token; both [before, after].
    """
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    case = case_of(loaded, spec, heads=heads, n_rows=n_rows, recipe=recipe_of(steps=steps), seed=seed)
    found = [_mechanism(loaded, spec, case.heads, n=n, seed=seed)]
    repaired(case, method=method)
    found.append(_mechanism(loaded, spec, case.heads, n=n, seed=seed))
    return {key: [side[key] for side in found] for key in found[0]}


def _mechanism(loaded: Loaded, attack: Attack, heads: Sequence[Head], *, n: int, seed: int) -> dict[str, float]:
    shown = pairs(loaded.tokenizer, attack, split="attribution", n=n, seed=seed)
    similar = head_similarity(loaded.model, shown.triggered, readings=["last row"])["last row"].mean(0)
    layer, head = torch.tensor(heads).T
    effects = _effects(loaded, attack, shown)
    return {"similarity": similar[layer, head].mean().item(), "acie": effects.max().item()}


def _effects(loaded: Loaded, attack: Attack, shown: Pairs) -> Scores:
    """ACIE of every head. The first target token decides, and costs a tenth of a long target."""
    means = head_means(loaded.model, shown.triggered)
    target = target_ids(loaded.tokenizer, attack)[:1]
    return head_effects(loaded.model, shown.clean, target=target, means=means).mean(0)


# --- tables and bounds ----------------------------------------------------------------------------------------------


@organism_stage
def told_heads(
    organism: str,
    *,
    attack: str,
    k: int,
    model: str = DEFAULT_MODEL,
    n: int = 8,
    seed: int = 0,
    device: str = "auto",
) -> list[list[int]]:
    """The `k` heads of highest ACIE on the target's first token: where the backdoor is, as only its trigger tells."""
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    shown = pairs(loaded.tokenizer, spec, split="attribution", n=n, seed=seed)
    return [list(head) for head in ranked(_effects(loaded, spec, shown))[:k]]


def cost_table(found: Mapping[str, Mapping[str, Mapping]]) -> pd.DataFrame:
    """Treatment -> weights touched and minutes, mean over organisms, from attack -> treatment -> `treated`."""
    names = dict.fromkeys(name for rows in found.values() for name in rows)
    rows = {name: [one[name] for one in found.values() if name in one] for name in names}
    return pd.DataFrame(
        {
            name: {
                "weights touched (millions)": sum(one["parameters"] for one in some) / len(some) / 1e6,
                "minutes": sum(one["minutes"] for one in some) / len(some),
            }
            for name, some in rows.items()
        }
    ).T
