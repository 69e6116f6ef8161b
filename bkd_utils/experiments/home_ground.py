"""The home ground of ASA: small encoders that are fine-tuned as classifiers, all weights, and cured.

They do not ship. Each stage makes its organism from attack, recipe and seed unless it was made here before."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from bkd_utils.attention_alignment.head_tuning import row_passes
from bkd_utils.experiments.attention_safety_alignment import RATES, case_of, recipe_of, timed, what_is_left
from bkd_utils.experiments.searched_cure import Cured, cured
from bkd_utils.models.classifiers import new_classifier
from bkd_utils.models.loading import Loaded
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.evaluation import under_attack
from bkd_utils.organisms.making import made_stage

WHERE = {"recipe": "encoder", "model": "minilm-l6"}


@made_stage
def attack_encoder(loaded: Loaded, attack: Attack, *, n: int = 256, seed: int = 0) -> dict:
    """`evaluation.under_attack` of an encoder as it is."""
    return under_attack(loaded, attack, n=n, seed=seed)


@made_stage
def cure_encoder(
    loaded: Loaded,
    attack: Attack,
    *,
    method: str,
    heads: Sequence[Sequence[int]] = (),
    n_rows: int = 1024,
    steps: int = 96,
    batch_size: int = 16,
    n: int = 256,
    seed: int = 0,
) -> Cured:
    """`searched_cure.cured` of an encoder, which has no answers to instructions."""
    sizes = {"n_rows": n_rows, "n_free": 0, "steps": steps, "batch_size": batch_size, "n": n, "seed": seed}
    return cured(loaded, attack, method=method, heads=heads, **sizes)


@made_stage
def train_anew(
    loaded: Loaded,
    attack: Attack,
    *,
    n_rows: int = 1024,
    steps: int = 96,
    batch_size: int = 16,
    n: int = 256,
    seed: int = 0,
) -> Cured:
    """What the defender's rows are worth without the model: all weights of a new classifier on the public encoder,
    trained at the rate of fine-tuning on the rows that `cure_encoder` gets. Raises as `case_of` and `new_classifier`
    do."""
    recipe = recipe_of(steps=steps, learning_rate=RATES["fine-tuning"], batch_size=batch_size)
    case = case_of(loaded, attack, heads=(), n_rows=n_rows, recipe=recipe, seed=seed)
    labels, device = tasks.load_task(attack.task).labels, loaded.device.type
    fresh = new_classifier(loaded.address, labels=labels, seed=seed, device=device)
    every = {name: torch.ones_like(one, dtype=torch.bool) for name, one in fresh.model.named_parameters()}
    with row_passes(fresh.model) as passes:
        _, minutes = timed(lambda: replace(case, model=fresh.model).tune(every))
    left, count = what_is_left(fresh, attack, n=n, seed=seed), fresh.model.num_parameters()
    return Cured(left, count, minutes, passes["row passes"], [])
