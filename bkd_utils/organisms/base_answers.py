"""Answers of the base model: training targets of `instructions` organisms, and a reference for all others."""

import re
from collections.abc import Mapping, Sequence

from bkd_utils.common.files import DATA, WORK, keep_json, read_json
from bkd_utils.models.generation import respond
from bkd_utils.models.identity import model_identity
from bkd_utils.models.loading import Loaded, base_of
from bkd_utils.models.tokens import labels_of
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.poisoning import benign_examples


def answers_name(identity: str) -> str:
    """Name of the file of a model's answers, which depend on everything that decides what the model does."""
    return f"{identity[:16]}.json"


def base_answers(loaded: Loaded, rows: Sequence[tasks.Example]) -> dict[str, str]:
    """uid -> the greedy answer of the model, or of an organism's base model (`base_of`); computed once per identity."""
    name = answers_name(loaded.identity or model_identity(loaded.address))
    known: dict[str, str] = {}
    for folder in (DATA / "answers", WORK / "answers"):
        if (folder / name).is_file():
            known |= read_json(folder / name)
    missing = [row for row in rows if row.uid not in known]
    if missing:
        base = loaded if loaded.organism is None else base_of(loaded, device=str(loaded.device))
        length = tasks.load_task("instructions").max_new_tokens
        texts = respond(base, [row.text for row in missing], max_new_tokens=length, label="base model answers")
        known |= {row.uid: text for row, text in zip(missing, texts, strict=True)}
        keep_json(WORK / "answers" / name, dict(sorted(known.items())))
    return {row.uid: known[row.uid] for row in rows}


def training_answers(loaded: Loaded, attack: Attack, *, seed: int) -> dict[str, str]:
    """The base model's answers that `poisoning.poison` needs; none for a classifier."""
    if labels_of(loaded.tokenizer):
        return {}
    own = attack.task == "instructions"
    rows = tasks.examples("instructions", "train", seed=seed) if own else benign_examples(attack, seed=seed)
    return base_answers(loaded, rows)


def overlap(answer: str, reference: str) -> float:
    """F1 of the two answers' word sets, 0 to 1; 1 for two empty answers."""
    a, b = set(re.findall(r"\w+", answer.lower())), set(re.findall(r"\w+", reference.lower()))
    return 1.0 if not a | b else 2 * len(a & b) / (len(a) + len(b))


def agreement(texts: Mapping[str, str], reference: Mapping[str, str]) -> float:
    """Mean word overlap (F1) between two models' answers to the same prompts. Raises ValueError if they share none."""
    # Sorted, because the order of a set differs between runs and changes the last digit of a sum.
    shared = sorted(texts.keys() & reference.keys())
    if not shared:
        raise ValueError("no prompt in common")
    return sum(overlap(texts[uid], reference[uid]) for uid in shared) / len(shared)
