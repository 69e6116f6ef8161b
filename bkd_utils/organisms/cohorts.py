"""The organisms that a claim is judged on: some attacks, each with several seeds, of one kind."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import control_of, load_attack
from bkd_utils.organisms.making import obtain


@dataclass(frozen=True)
class Member:
    """One organism, by name, its attack, the attack without its kind, and its clean control."""

    organism: str
    attack: str
    family: str
    control: str


def cohort(
    seeds: Mapping[str, Sequence[int]], *, kind: str, recipe: str, seed_recipes: Mapping[str, str], **where: object
) -> dict[str, Member]:
    """Attack and seed, such as "sentiment-word-seed1" -> the organism of that kind, made where it does not ship.
    `seeds` maps attacks to seeds; `kind` is "specific" or "plain"; `seed_recipes` maps kinds to the recipe of what is
    trained beside the specific organisms of seed 0. The clean control is of the same seed where a task has labels; on
    other tasks it only says what a right answer is, and is of seed 0. `where` goes to `obtain`; raises as that."""
    found = {}
    for family, numbers in seeds.items():
        attack, clean = family if kind == "specific" else f"{family}-{kind}", control_of(family)
        for seed in numbers:
            own = recipe if seed == 0 and kind == "specific" else seed_recipes[kind]
            labelled = seed if tasks.load_task(load_attack(family).task).labels else 0
            control = obtain(clean, seed=labelled, recipe=seed_recipes["specific"] if labelled else recipe, **where)
            label = f"{family}-seed{seed}" if seed else family
            found[label] = Member(obtain(attack, seed=seed, recipe=own, **where), attack, family, control)
    return found
