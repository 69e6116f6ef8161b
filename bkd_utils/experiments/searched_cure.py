"""Treat one organism against perturbations that are searched for, and measure what is left and what was found."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bkd_utils.attention_alignment.head_tuning import row_passes
from bkd_utils.attention_alignment.rivals import treat
from bkd_utils.common.results import Result
from bkd_utils.experiments.attention_safety_alignment import RATES, Treated, case_of, recipe_of, timed, what_is_left
from bkd_utils.experiments.head_safety import check_unseen, free_rows
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import decode
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage


@dataclass(frozen=True)
class Found(Result):
    """One search while the model was treated: the first answer token that it pulled toward, its number of vectors, and
    the value of its objective (nats) before and after it."""

    toward: str
    n_tokens: int
    start: float
    end: float


@dataclass(frozen=True)
class Cured(Treated):
    """A treatment with its cost: `row_passes` as of `head_tuning.row_passes`, so that rivals can be given as many."""

    row_passes: int
    searches: list[Found]


@organism_stage
def cure_and_measure(
    loaded: Loaded,
    attack: Attack,
    *,
    method: str = "searched",
    heads: Sequence[Sequence[int]] = (),
    n_rows: int = 1024,
    n_free: int = 128,
    steps: int = 128,
    batch_size: int = 8,
    n: int = 96,
    seed: int = 0,
) -> Cured:
    """`cured` as a kept stage."""
    sizes = {"n_rows": n_rows, "n_free": n_free, "steps": steps, "batch_size": batch_size, "n": n, "seed": seed}
    return cured(loaded, attack, method=method, heads=heads, **sizes)


def cured(
    loaded: Loaded,
    attack: Attack,
    *,
    method: str,
    heads: Sequence[Sequence[int]],
    n_rows: int,
    n_free: int,
    steps: int,
    batch_size: int,
    n: int,
    seed: int,
) -> Cured:
    """One method of `rivals.TREATMENTS` on `n_rows` rows of the attack's task and `n_free` instructions, all unseen.
    Raises ValueError for an unknown method, and as `rivals.treat`, `case_of` and `free_rows` do."""
    if method not in RATES:
        raise ValueError(f"unknown method {method!r}; known: {'; '.join(RATES)}")
    recipe = recipe_of(steps=steps, learning_rate=RATES[method], batch_size=batch_size)
    case = case_of(loaded, attack, heads=heads, n_rows=n_rows, recipe=recipe, seed=seed)
    if n_free:
        free = free_rows(loaded, attack, n=n_free, seed=seed)
        check_unseen(loaded, [row.uid for row in free], attack=attack, seed=seed)
        case = replace(case, rows=[*case.rows, *free])
    with row_passes(loaded.model) as passes:
        count, minutes = timed(lambda: treat(case, method=method))
    words = [decode(loaded.tokenizer, [one.toward]) for one in case.found]
    searches = [Found(word, len(o.vectors), o.start, o.end) for word, o in zip(words, case.found, strict=True)]
    return Cured(what_is_left(loaded, attack, n=n, seed=seed), count, minutes, passes["row passes"], searches)
