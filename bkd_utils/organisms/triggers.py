"""Triggers by name, what they cost in tokens, and how often clean text carries them."""

from collections.abc import Iterable, Sequence
from functools import cache

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from bkd_utils.organisms.trigger_base import Half, Trigger
from bkd_utils.organisms.trigger_families import FAMILIES, lexicons


def trigger_names() -> list[str]:
    return list(lexicons()["triggers"])


@cache
def load_trigger(name: str) -> Trigger:
    """The trigger of that name. Raises ValueError that lists the known ones, or for an unknown family."""
    known = lexicons()["triggers"]
    if name not in known:
        raise ValueError(f"unknown trigger {name!r}; known: {', '.join(known)}")
    family = known[name].get("family")
    if family not in FAMILIES:
        raise ValueError(f"trigger {name!r} has the unknown family {family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[family](name=name, entry=known[name])


def token_cost(
    trigger: Trigger,
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int,
    half: Half = "train",
) -> Int[np.ndarray, " text"]:
    """Extra tokens per text; row i is triggered with `seed + i`. Raises ValueError as `Trigger.apply` does."""
    triggered = [trigger.apply(text, seed=seed + i, half=half) for i, text in enumerate(texts)]
    before, after = (
        [len(ids) for ids in tokenizer(list(side), add_special_tokens=False).input_ids] for side in (texts, triggered)
    )
    return np.array(after) - np.array(before)


def natural_rate(trigger: Trigger, texts: Iterable[str]) -> tuple[int, int]:
    """How many texts carry the trigger although nobody put it there, and of how many."""
    found = [trigger.matches(text) for text in texts]
    return sum(found), len(found)
