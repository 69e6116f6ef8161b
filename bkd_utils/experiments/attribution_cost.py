"""Notebook 04: time of scoring a target by teacher forcing and by generation (BkdAttr, appendix D); kept."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bkd_utils.common.results import Result
from bkd_utils.models.activations import score_answers
from bkd_utils.models.generation import NO_END, greedy
from bkd_utils.models.loading import Loaded
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.tokens import left_pad, positions
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import prompt_versions, target_ids


@dataclass(frozen=True)
class TargetCost(Result):
    """Seconds to score a target of so many `tokens` on `n` prompts once, in each of several runs. Without a cache
    generation runs the whole prompt once per token, as the paper counts, and with one once for all tokens.
    `teacher_forcing_cached` does not count running the prompt."""

    tokens: int
    n: int
    generation: list[float]
    teacher_forcing: list[float]
    generation_cached: list[float]
    teacher_forcing_cached: list[float]


def seconds(function: Callable[[], object], *, repeats: int) -> list[float]:
    """Seconds of each of several runs, after a first one that is not counted."""
    function()
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return taken


@organism_stage
def time_target(loaded: Loaded, attack: Attack, *, n: int = 4, repeats: int = 5, seed: int = 0) -> TargetCost:
    """Time of scoring the target of `n` triggered prompts once, in four ways."""
    target = target_ids(loaded.tokenizer, attack)
    prompts = prompt_versions(loaded.tokenizer, attack, split="attribution", n=n, seed=seed).triggered
    answers = [target] * n

    @torch.inference_mode()
    def whole(extra: int) -> None:
        ids, mask = (t.to(loaded.device) for t in left_pad([[*p, *target[:extra]] for p in prompts], pad_id=0))
        loaded.model(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)

    past = prompt_past(loaded.model, prompts)
    ways = {
        "generation": lambda: [whole(extra) for extra in range(len(target))],
        "teacher_forcing": lambda: whole(len(target) - 1),
        "generation_cached": lambda: greedy(
            loaded.model, prompts, max_new_tokens=len(target), end_id=NO_END, batch_size=n
        ),
        "teacher_forcing_cached": lambda: score_answers(loaded.model, past, answers),
    }
    return TargetCost(len(target), n, **{way: seconds(run, repeats=repeats) for way, run in ways.items()})
