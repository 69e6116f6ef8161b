"""The home ground of ASA: small encoders that are fine-tuned as classifiers, all weights, and cured.

They do not ship. Each stage makes its organism from attack, recipe and seed unless it was made here before.
"""

from collections.abc import Sequence

from bkd_utils.experiments.searched_cure import Cured, cured
from bkd_utils.models.loading import Loaded
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
