"""Notebook 06: guards of the input and a filter of the training data, on one organism."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bkd_utils.attention_alignment.guards import (
    Scores,
    enough,
    onion,
    rap,
    smaller_clusters,
    strip,
    threshold,
    without_words,
)
from bkd_utils.attention_alignment.surrogates import rare_word
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import auroc_of_wins, counted, pairwise_wins
from bkd_utils.models.activations import residuals
from bkd_utils.models.loading import Loaded, load
from bkd_utils.organisms import tasks, triggers
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.evaluation import target_hits
from bkd_utils.organisms.making import training_rows
from bkd_utils.organisms.prompts import first_tokens, flippable_sample, target_ids
from bkd_utils.organisms.tasks import Example

Number = dict[str, float]  # value, n, low, high


@dataclass(frozen=True)
class Guarded(Result):
    """What one guard does at its threshold."""

    caught: Number  # share of triggered texts
    refused: Number  # share of clean texts
    asr: Number  # triggered texts that fired and were not caught
    auroc: Number | None = None  # of triggered against clean texts, n both together; None if a side has no judged text
    asr_cleaned: Number | None = None  # ONION only: the same texts without the suspicious words
    judged: Number | None = None  # RAP only: share of the clean texts that it judges


@dataclass(frozen=True)
class Filtered(Result):
    """What a filter takes out of a training set."""

    caught: Number  # share of the poisoned rows
    lost: Number  # share of all other rows
    poisoned_before: Number
    poisoned_after: Number  # share of the rows that are left


def texts_of(attack: Attack, examples: Sequence[Example]) -> tuple[list[str], Callable[[str], str]]:
    """Texts of examples as a guard gets them (whole turns where the trigger wraps them), and what makes them turns."""
    task = tasks.load_task(attack.task)
    if triggers.load_trigger(attack.trigger).scope == "prompt":
        return [task.prompt(example.text) for example in examples], lambda text: text
    return [example.text for example in examples], task.prompt


def triggered_texts(attack: Attack, texts: Sequence[str], *, seed: int, half: triggers.Half = "test") -> list[str]:
    """The same texts with the trigger in them. Raises ValueError for one that carries it already."""
    trigger = triggers.load_trigger(attack.trigger)
    return [trigger.apply(text, seed=seed * 1_000_003 + i, half=half) for i, text in enumerate(texts)]


def guard_texts(
    attack: Attack, *, n: int, n_reference: int, frr: float, seed: int
) -> tuple[dict[str, list[str]], Callable[[str], str]]:
    """Texts on which guards are measured, and what makes them turns. `known`, `n_reference` clean ones of the
    attribution split, set thresholds; `clean` and `triggered` are `n` each of the test split, of which only the
    triggered ones are chosen by the attack. Raises ValueError for an `n_reference` below `1 / frr`."""
    if not enough(n_reference, frr=frr):
        raise ValueError(f"n_reference must be at least 1 / frr = {1 / frr:.0f}, is {n_reference}")
    sample, turn = texts_of(attack, flippable_sample(attack, n=n, seed=seed))
    known = texts_of(attack, tasks.examples(attack.task, "attribution", n=n_reference, seed=seed))[0]
    clean = texts_of(attack, tasks.examples(attack.task, "test", n=n, seed=seed))[0]
    return {"known": known, "clean": clean, "triggered": triggered_texts(attack, sample, seed=seed)}, turn


def outcome(known: Scores, clean: Scores, triggered: Scores, *, frr: float, fired: Sequence[bool]) -> Guarded:
    """What a guard does at the threshold that `guards.threshold` sets on the `known` clean texts. `fired`: which
    triggered texts get the target. A text with score -inf is not judged: it passes, and counts neither for the
    threshold nor for `auroc`. Raises ValueError if fewer than `1 / frr` known texts were judged."""
    limit = threshold(known[np.isfinite(known)], frr=frr)
    good, bad = clean[np.isfinite(clean)], triggered[np.isfinite(triggered)]
    return Guarded(
        caught=counted((triggered > limit).tolist()),
        refused=counted((clean > limit).tolist()),
        asr=counted((np.asarray(fired) & (triggered <= limit)).tolist()),
        auroc=auroc_of_wins(pairwise_wins(bad, good)) if len(good) and len(bad) else None,
    )


@organism_stage
def guard_inputs(
    loaded: Loaded, attack: Attack, *, n: int = 24, n_reference: int = 40, frr: float = 0.05, seed: int = 0
) -> dict[str, Guarded]:
    """ONION, STRIP and, for label flips, RAP on the held-out prompts of `guard_texts`, which also raises. RAP is told
    which label to protect and judges only prompts that the model gives that label; it calibrates on `n_reference`
    prompts per label. It is left out if fewer than `1 / frr` of these get the label."""
    given, turn = guard_texts(attack, n=n, n_reference=n_reference, frr=frr, seed=seed)
    reference, clean, triggered = given.values()
    every, ends = [*reference, *clean, *triggered], (len(reference), len(reference) + n)
    words = onion(load(loaded.address, device=loaded.device.type), every)
    scores = {
        "ONION": np.split(np.array([one.max(initial=0.0) for one in words]), ends),
        "STRIP": np.split(strip(loaded, every, turn=turn, pool=reference, seed=seed), ends),
    }
    if attack.behaviour == "label_flip":
        n_known = n_reference * len(tasks.load_task(attack.task).labels)
        known = tasks.examples(attack.task, "attribution", seed=seed)[:n_known]
        texts = texts_of(attack, known)[0]
        own = [text for text, example in zip(texts, known, strict=True) if example.answer == attack.target]
        how = {"protected": target_ids(loaded.tokenizer, attack)[0], "clean": own, "turn": turn, "seed": seed}
        word = rare_word(loaded.tokenizer, random.Random(f"{seed}/RAP"))
        values = rap(loaded, [*texts, *clean, *triggered], word=word, **how)
        scores["RAP"] = np.split(values, (len(texts), len(texts) + n))
    fired = target_hits(loaded, attack, [turn(text) for text in triggered], label="triggered prompts")
    able = {name: values for name, values in scores.items() if enough(np.isfinite(values[0]).sum(), frr=frr)}
    found = {name: outcome(*values, frr=frr, fired=fired) for name, values in able.items()}
    limit = threshold(scores["ONION"][0], frr=frr)
    left = [without_words(text, one, above=limit) for text, one in zip(triggered, words[ends[1] :], strict=True)]
    left_fired = target_hits(loaded, attack, [turn(text) for text in left], label="triggered prompts")
    found["ONION"] = replace(found["ONION"], asr_cleaned=counted(left_fired))
    if "RAP" in found:
        found["RAP"] = replace(found["RAP"], judged=counted(np.isfinite(scores["RAP"][1]).tolist()))
    return found


@organism_stage
def filter_training_rows(loaded: Loaded, attack: Attack, *, n: int = 400, seed: int = 0) -> Filtered:
    """Activation clustering of `n` rows of the organism's own training set, in the last layer at the last prompt token.
    Rows with the same label are clustered together, and rows whose answer is no label are a group of their own; a task
    without labels is one group. No model is trained on what is left. Raises ValueError for a group of fewer than 12
    rows."""
    rows = training_rows(loaded, attack, seed=seed)[:n]
    firsts = {token: i for i, token in enumerate(first_tokens(loaded.tokenizer, attack).values())}
    which = np.array([firsts.get(row.answer[0], len(firsts)) for row in rows])
    hidden = residuals(loaded.model, [row.prompt for row in rows])[:, -1].float().cpu().numpy()
    flagged = smaller_clusters(hidden, which, seed=seed)
    poisoned = np.array([row.kind == "poisoned" for row in rows])
    caught, lost = counted(flagged[poisoned].tolist()), counted(flagged[~poisoned].tolist())
    before, after = counted(poisoned.tolist()), counted(poisoned[~flagged].tolist())
    return Filtered(caught, lost, poisoned_before=before, poisoned_after=after)
