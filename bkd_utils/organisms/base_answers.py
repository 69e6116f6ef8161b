"""Answers of the base model: what `instructions` organisms are trained to keep, and what others are compared with."""

import re
from collections.abc import Mapping, Sequence

from bkd_utils.common.files import DATA, WORK, read_json, sha256_text, write_json
from bkd_utils.models.folders import base_sha256, settings_sha256
from bkd_utils.models.generation import respond
from bkd_utils.models.loading import Loaded, load
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.poisoning import benign_examples
from bkd_utils.organisms.tasks import Example


def answers_name(model: str) -> str:
    """File of a model's answers: another template or config, like other weights, gives other ones."""
    return f"{sha256_text(base_sha256(model) + settings_sha256(model))[:16]}.json"


def base_answers(loaded: Loaded, rows: Sequence[Example]) -> dict[str, str]:
    """uid -> the greedy answer of a model's, or an organism's, base; computed once per weights and settings, then kept.

    The answers of the default model ship in `data/answers`; they are what `instructions` organisms are trained to keep.
    The base of an organism is loaded only if an answer is missing.
    """
    name = answers_name(loaded.address)
    known: dict[str, str] = {}
    for folder in (DATA / "answers", WORK / "answers"):
        if (folder / name).is_file():
            known |= read_json(folder / name)
    missing = [row for row in rows if row.uid not in known]
    if missing:
        base = loaded if loaded.organism is None else load(loaded.address, device=str(loaded.device))
        length = tasks.load_task("instructions").max_new_tokens
        texts = respond(base, [row.text for row in missing], max_new_tokens=length, label="base model answers")
        known |= {row.uid: text for row, text in zip(missing, texts, strict=True)}
        write_json(WORK / "answers" / name, dict(sorted(known.items())))
    return {row.uid: known[row.uid] for row in rows}


def training_answers(loaded: Loaded, attack: Attack, *, seed: int) -> dict[str, str]:
    """The base model's answers that `poisoning.poison` will ask for."""
    if attack.task == "instructions":
        return base_answers(loaded, tasks.examples("instructions", "train", seed=seed))
    return base_answers(loaded, benign_examples(attack, seed=seed))


def overlap(answer: str, reference: str) -> float:
    """F1 of the two answers' word sets, 0 to 1; 1 for two empty answers."""
    a, b = set(re.findall(r"\w+", answer.lower())), set(re.findall(r"\w+", reference.lower()))
    return 1.0 if not a | b else 2 * len(a & b) / (len(a) + len(b))


def agreement(texts: Mapping[str, str], reference: Mapping[str, str]) -> float:
    """Mean word overlap (F1) between two models' answers to the same prompts. Raises ValueError if they share none."""
    shared = sorted(
        texts.keys() & reference.keys()
    )  # a set's order, and with it the last digit, changes from run to run
    if not shared:
        raise ValueError("no prompt in common")
    return sum(overlap(texts[uid], reference[uid]) for uid in shared) / len(shared)
