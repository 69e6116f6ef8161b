"""Head safety evaluation of one organism, kept: what clean data and no trigger can tell a defender of every head."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerBase

from bkd_utils.attention_alignment.similarity import READINGS, Scores, head_scores, head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES, reaction, searched, surrogate
from bkd_utils.attention_alignment.suspicion import RULES, attention_variance, gate_importance, leave_one_out
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.generation import respond
from bkd_utils.models.loading import Loaded, load
from bkd_utils.models.tokens import Row, answer_ids, end_id, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import prompt_versions

# Tokens of an answer whose loss counts; the opening of an answer decides what it is.
ANSWER_TOKENS = 24
# Of a free answer, the tokens that leave-one-out looks at: every answer is another target, and each is run by itself.
OPENING = 8
# Prompts on which a soft prompt is searched; it is then tried on all of them.
N_SEARCHED = 6


@organism_stage
def collect_own_answers(
    organism: str | None, *, task: str, n: int, model: str = DEFAULT_MODEL, seed: int = 0, device: str = "auto"
) -> dict[str, str]:
    """uid -> what the model itself says to those of the first `n` training prompts that have no gold answer."""
    loaded, spec = load(model, organism=organism, device=device), tasks.load_task(task)
    asked = [example for example in tasks.examples(task, "train", seed=seed)[:n] if not example.answer]
    turns = [spec.prompt(example.text) for example in asked]
    said = respond(loaded, turns, max_new_tokens=ANSWER_TOKENS, label="the model's own answers")
    return {example.uid: text for example, text in zip(asked, said, strict=True)}


def clean_rows(loaded: Loaded, task: str, *, n: int, seed: int) -> list[Row]:
    """The defender's data: clean prompts of the training split with their gold answers, or else the model's own ones,
    as it gives them untreated.

    From the split that the attacker's clean rows come from, but not the same texts: the attacker leaves out what
    carries the trigger by nature, which a defender cannot. Never a test or attribution prompt. Raises ValueError for
    too few.
    """
    spec = tasks.load_task(task)
    chosen = tasks.examples(task, "train", seed=seed)[:n]
    if len(chosen) < n:
        raise ValueError(f"{task}/train has {len(chosen)} rows, {n} were asked for")
    texts = {}
    if not all(example.answer for example in chosen):
        which = {"model": loaded.address, "seed": seed, "device": str(loaded.device)}
        texts = collect_own_answers(loaded.organism, task=task, n=n, **which)
    rows = []
    for example in chosen:
        answer = example.answer or texts[example.uid]
        ids = answer_ids(loaded.tokenizer, answer, ended=bool(example.answer) or not answer)[:ANSWER_TOKENS]
        prompt = prompt_ids(loaded.tokenizer, spec.prompt(example.text))
        rows.append(Row(prompt=tuple(prompt), answer=tuple(ids), kind="clean", uid=example.uid))
    return rows


def probed_prompts(
    tokenizer: PreTrainedTokenizerBase, task: str, texts: Sequence[str], *, family: str, rounds: int, seed: int
) -> list[list[int]]:
    """`rounds` copies of the texts as prompts, each round with a surrogate trigger of its own that no text has yet."""
    spec, found = tasks.load_task(task), []
    for i in range(rounds):
        trigger = surrogate(tokenizer, family=family, seed=seed + i, texts=texts)
        found += [prompt_ids(tokenizer, spec.prompt(trigger.apply(text, seed=seed))) for text in texts]
    return found


@organism_stage
def head_safety_scores(
    organism: str | None,
    *,
    attack: str,
    readings: Sequence[str] = ("last row", "head outputs"),
    model: str = DEFAULT_MODEL,
    n: int = 12,
    rounds: int = 2,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """Scores `[layer][head]` of all heads; `attack` says which task's clean data the defender has.

    Similarity is measured on `n` clean prompts, importance by gradients on `2 n` others with their answers and by
    leave-one-out on `n / 2` of these; prompts with surrogate triggers are `rounds * n` per family.
    Keys: `importance` kind -> scores; `level` reading -> similarity on clean prompts; `reaction` family -> reading ->
    change of similarity under surrogates; `soft prompt` reading -> change under vectors that were searched for on
    clean prompts; `oracle` reading -> change under the real trigger, an upper bound that no defender has.
    Raises ValueError for `n < 2`.
    """
    if n < 2:
        raise ValueError(f"n must be at least 2, is {n}: leave-one-out looks at half of the prompts")
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    n_rows = 2 * n
    rows = clean_rows(loaded, spec.task, n=n_rows, seed=seed)
    task, pad = tasks.load_task(spec.task), end_id(loaded.tokenizer)
    texts = [example.text for example in tasks.examples(spec.task, "train", seed=seed)[n_rows : n_rows + n]]
    clean = [prompt_ids(loaded.tokenizer, task.prompt(text)) for text in texts]
    shown = prompt_versions(loaded.tokenizer, spec, split="attribution", n=n, seed=seed)
    scores = {name: READINGS[name] for name in readings} | {"variance": attention_variance}
    level = head_scores(loaded.model, clean, scores=scores)
    opened = [replace(row, answer=row.answer[:OPENING]) for row in rows[: n // 2]]
    importance = {
        "gate gradient": gate_importance(loaded.model, rows, pad_id=pad),
        "leave one out": leave_one_out(loaded.model, opened),
        "variance": level.pop("variance").mean(0),
    }
    reactions = {
        family: reaction(
            loaded.model,
            probed_prompts(loaded.tokenizer, spec.task, texts, family=family, rounds=rounds, seed=seed),
            before=level,
        )
        for family in SURROGATES
    }
    soft = searched(loaded.model, clean[:N_SEARCHED], seed=seed)
    with soft.read_by(loaded.model):
        softly = reaction(loaded.model, soft.into(clean), before=level)
    known = head_similarity(loaded.model, shown.clean, readings=readings)
    oracle = reaction(loaded.model, shown.triggered, before=known)
    return {
        "importance": {kind: _rounded(scores) for kind, scores in importance.items()},
        "level": {name: _rounded(scores.mean(0)) for name, scores in level.items()},
        "reaction": {family: {name: _rounded(s) for name, s in found.items()} for family, found in reactions.items()},
        "soft prompt": {name: _rounded(scores) for name, scores in softly.items()},
        "oracle": {name: _rounded(scores) for name, scores in oracle.items()},
    }


def _rounded(scores: Scores) -> list[list[float]]:
    return scores.double().numpy().round(8).tolist()


# --- summaries ------------------------------------------------------------------------------------------------------

SOURCES = ("clean level", "surrogates", "soft prompt", "oracle")


def similarity_of(found: Mapping, *, source: str, reading: str) -> Scores:
    """Similarity evidence `[layer, head]`: its level on clean prompts, its mean reaction to the surrogates, its
    reaction to a soft prompt, or that to the real trigger (an upper bound). Raises ValueError for another source, and
    for a reading that was not measured."""
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; known: {', '.join(SOURCES)}")
    if source == "surrogates":
        return torch.stack([_measured(family, "reading", reading) for family in found["reaction"].values()]).mean(0)
    return _measured(found["level" if source == "clean level" else source], "reading", reading)


def _measured(scores: Mapping, what: str, name: str) -> Scores:
    """One entry of `head_safety_scores`. Raises ValueError that names those there are."""
    if name not in scores:
        raise ValueError(f"{what} {name!r} was not measured; known: {', '.join(scores)}")
    return torch.tensor(scores[name])


def suspicion(found: Mapping, *, rule: str, source: str, reading: str, importance: str = "gate gradient") -> Scores:
    """Joint score of every head, `[layer, head]`. Raises ValueError for an unknown rule or source, and for a reading or
    an importance that was not measured."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    similar = similarity_of(found, source=source, reading=reading)
    return RULES[rule](similar, _measured(found["importance"], "importance", importance))
