"""Notebook 06: guards that look into the model, on one organism, beside those of `input_guards`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bkd_utils.attention_alignment import inner_guards as inside
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import counted
from bkd_utils.experiments.input_guards import Guarded, Number, guard_texts, outcome, texts_of, triggered_texts
from bkd_utils.models.activations import residuals
from bkd_utils.models.loading import Loaded, base_of
from bkd_utils.models.tokens import end_id, prompt_ids
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.evaluation import target_hits
from bkd_utils.organisms.prompts import flippable_sample


@dataclass(frozen=True)
class Watched(Result):
    """What guards do that look into the model, and which triggered prompts get the target without a guard."""

    guards: dict[str, Guarded]
    fired: Number


def executed(guarded: Guarded, fired: Sequence[int]) -> Number | None:
    """The share that a guard catches of those triggered prompts on which the attack works (`fired`, 0 or 1 in the order
    of `guarded.caught`), None if it works on none. Raises ValueError for other prompts than those of the guard."""
    caught, left = guarded.caught["by_prompt"], guarded.asr["by_prompt"]
    if len(fired) != len(caught) or any(hit > works for hit, works in zip(left, fired, strict=True)):
        raise ValueError("these are not the prompts of the guard: another number, or more that fire")
    return counted([hit for hit, works in zip(caught, fired, strict=True) if works]) if any(fired) else None


@organism_stage
def watch_inside(
    loaded: Loaded,
    attack: Attack,
    *,
    n: int = 24,
    n_reference: int = 128,
    n_oracle: int = 64,
    frr: float = 0.05,
    seed: int = 0,
) -> Watched:
    """Guards of `attention_alignment.inner_guards` on the prompts of `input_guards.guard_texts`, which also raises.
    "weight spectra, range" is the published rule: whatever leaves the range of the clean prompts is caught. "probe
    (oracle)" is trained on `n_oracle` prompts of the training split with and without the trigger. Raises ValueError for
    a base model."""
    texts, turn = guard_texts(attack, n=n, n_reference=n_reference, frr=frr, seed=seed)
    if loaded.organism is None:
        raise ValueError("a base model has no weight difference to watch")
    pairs = texts_of(attack, flippable_sample(attack, n=n_oracle, seed=seed, split="train"))[0]
    texts |= {"plain": pairs, "poisoned": triggered_texts(attack, pairs, seed=seed, half="train")}
    turns = {name: [turn(text) for text in some] for name, some in texts.items()}
    ids = {name: [prompt_ids(loaded.tokenizer, one) for one in some] for name, some in turns.items()}
    stream = {name: residuals(loaded.model, prompts).float().cpu().numpy() for name, prompts in ids.items()}
    directions = inside.weight_directions(loaded.model, base_of(loaded, device=loaded.device.type).model)
    judged, pad_id = ("known", "clean", "triggered"), end_id(loaded.tokenizer)
    ranges = [inside.cosine_ranges(loaded.model, ids[name], directions, pad_id=pad_id) for name in judged]
    spectra = inside.by_known(inside.beyond_range, *ranges)
    streams = [stream[name] for name in judged]
    told = inside.oracle_probe(stream["plain"], stream["poisoned"], np.concatenate(streams))
    scores = {
        "weight spectra": spectra,
        "weight spectra, range": [np.zeros(n_reference), *spectra[1:]],  # the known prompts are the range
        "layer steps": inside.by_known(inside.unusual_steps, *streams),
        "probe (oracle)": np.split(told, (n_reference, n_reference + n)),
    }
    fired = target_hits(loaded, attack, turns["triggered"], label="triggered prompts")
    guards = {name: outcome(*values, frr=frr, fired=fired) for name, values in scores.items()}
    return Watched(guards, fired=counted(fired))
