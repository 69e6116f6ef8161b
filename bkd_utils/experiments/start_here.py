"""Notebook 00: what base model and organism answer to one question in three versions, token by token; kept."""

from dataclasses import dataclass

from bkd_utils.common.results import Result
from bkd_utils.models.generation import trace
from bkd_utils.models.loading import Loaded, base_of
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import three_versions


@dataclass(frozen=True)
class Traces(Result):
    """By version: user turn, and by model one [token, probability] per step of its answer; `ends` end an answer."""

    turns: dict[str, str]
    steps: dict[str, dict[str, list[list]]]
    ends: list[str]


@organism_stage
def trace_versions(loaded: Loaded, attack: Attack, *, answer_tokens: int = 16, seed: int = 0) -> Traces:
    """Greedy answers of at most `answer_tokens` tokens to a clean, a near-miss and a triggered prompt. Raises
    ValueError for an attack on harmful prompts, which are not displayed."""
    turns = three_versions(attack, seed=seed)
    both = {"base model": base_of(loaded, device=loaded.device.type), "organism": loaded}
    steps: dict[str, dict] = {}
    for version, turn in turns.items():
        steps[version] = {who: trace(one, turn, max_new_tokens=answer_tokens) for who, one in both.items()}
    return Traces(turns=turns, steps=steps, ends=[loaded.tokenizer.decode([token]) for token in loaded.ends])
