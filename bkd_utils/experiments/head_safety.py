"""Head safety evaluation of one organism: what clean data, without the trigger, tell a defender about every head."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedTokenizerBase

from bkd_utils.attention_alignment.similarity import READINGS, Scores, head_scores, head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES, reaction, searched, surrogate
from bkd_utils.attention_alignment.suspicion import RULES, attention_variance, gate_importance, leave_one_out
from bkd_utils.common.results import Result
from bkd_utils.models.generation import respond
from bkd_utils.models.loading import Loaded, read_card
from bkd_utils.models.tokens import Row, answer_ids, end_id, labels_of, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.poisoning import training_uids
from bkd_utils.organisms.prompts import prompt_versions
from bkd_utils.organisms.tasks import Example

ANSWER_TOKENS = 24  # the loss is that of so many first tokens of an answer
OPENING = 8  # leave-one-out uses so many first tokens, because it runs every free answer by itself
N_SEARCHED = 6  # a soft prompt is searched on so many prompts, and then tried on all of them

HeadValues = list[list[float]]  # [layer][head]


@dataclass(frozen=True)
class HeadSafety(Result):
    """Scores of all heads of one organism."""

    importance: dict[str, HeadValues]  # kind of importance -> scores
    level: dict[str, HeadValues]  # reading -> similarity on clean prompts
    reaction: dict[str, dict[str, HeadValues]]  # family of surrogates -> reading -> change of similarity under them
    soft_prompt: dict[str, HeadValues]  # reading -> change under vectors that were searched for on clean prompts
    real_trigger: dict[str, HeadValues]  # reading -> change under the real trigger, which no defender has


def seen_uids(loaded: Loaded, attack: Attack | None, *, seed: int) -> frozenset[str]:
    """The uid of every example that a defender must not have: the training examples of the loaded organism, by its
    card, and those of an organism of `attack`, if given, with the same seed (`seed` for a base model, which has no
    card), so that a clean control is kept apart from the organism that it is compared with."""
    card = None if loaded.organism is None else read_card(loaded.organism, "attack", "seed")
    uids = frozenset() if attack is None else training_uids(attack, seed=card["seed"] if card else seed)
    return uids | training_uids(Attack(**card["attack"]), seed=card["seed"]) if card else uids


def unseen_examples(loaded: Loaded, attack: Attack | None, *, task: str, n: int, seed: int) -> list[Example]:
    """The first `n` training examples, in an order of `seed`, that are not `seen_uids`; ValueError for too few."""
    seen, pool = seen_uids(loaded, attack, seed=seed), tasks.examples(task, "train", seed=seed)
    unseen = [example for example in pool if example.uid not in seen]
    if len(unseen) < n:
        who = f"{loaded.organism or 'a base model'}, {attack.name if attack else 'its own attack'}"
        found = f"{len(unseen)} of {len(pool)} rows that no organism was trained on ({who})"
        raise ValueError(f"{task}/train has {found}, {n} were asked for")
    return unseen[:n]


def check_unseen(loaded: Loaded, uids: Iterable[str], *, attack: Attack | None, seed: int) -> None:
    """Raises ValueError if the organism was trained on any of these examples; see `seen_uids`."""
    uids = list(uids)
    shared = sorted(set(uids) & seen_uids(loaded, attack, seed=seed))
    if shared:
        what = f"{len(shared)} of the defender's {len(uids)} examples are training examples of the organism"
        raise ValueError(f"{loaded.organism or 'a base model'}: {what}, the first is {shared[0][:12]}")


@organism_stage
def collect_own_answers(loaded: Loaded, *, task: str, uids: Sequence[str]) -> dict[str, str]:
    """uid -> what the model itself says to these examples of the training split. Raises KeyError for an unknown uid."""
    spec = tasks.load_task(task)
    known = {example.uid: example for example in tasks.examples(task, "train")}
    turns = [spec.prompt(known[uid].text) for uid in uids]
    said = respond(loaded, turns, max_new_tokens=ANSWER_TOKENS, label="the model's own answers")
    return dict(zip(uids, said, strict=True))


def clean_rows(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> list[Row]:
    """The defender's data: `n` `unseen_examples` of the attack's task with gold answers, or else the untreated model's
    own. The choice looks at no trigger, so a row may carry it by nature. Raises ValueError for too few rows."""
    return _rows_of(loaded, unseen_examples(loaded, attack, task=attack.task, n=n, seed=seed), task=attack.task)


def free_rows(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> list[Row]:
    """`n` benign instructions that the organism was not trained on, with the untreated model's own answers, to keep
    what it says elsewhere. Raises ValueError for too few, and for a classifier, which knows no other task."""
    if labels_of(loaded.tokenizer):
        raise ValueError(f"{loaded.organism} is a classifier and has no answers to instructions")
    return _rows_of(loaded, unseen_examples(loaded, attack, task="instructions", n=n, seed=seed), task="instructions")


def _rows_of(loaded: Loaded, chosen: Sequence[Example], *, task: str) -> list[Row]:
    """Rows with the gold answers of examples, or else with the model's own."""
    spec, texts = tasks.load_task(task), {}
    open_ended = [example.uid for example in chosen if not example.answer]
    if open_ended:
        which = {"model": loaded.address, "device": loaded.device.type}
        texts = collect_own_answers(loaded.organism, task=task, uids=open_ended, **which)
    rows, what = [], {"kind": "clean", "is_label": bool(labels_of(loaded.tokenizer))}
    for example in chosen:
        answer = example.answer or texts[example.uid]
        ids = answer_ids(loaded.tokenizer, answer, ended=bool(example.answer) or not answer)[:ANSWER_TOKENS]
        prompt = prompt_ids(loaded.tokenizer, spec.prompt(example.text))
        rows.append(Row(tuple(prompt), tuple(ids), uid=example.uid, **what))
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
    loaded: Loaded,
    attack: Attack,
    *,
    readings: Sequence[str] = ("last row", "head outputs"),
    n: int = 12,
    rounds: int = 2,
    seed: int = 0,
) -> HeadSafety:
    """Scores of all heads; `attack` says which task's clean data the defender has, none of it seen by the organism:
    `n` prompts for similarity, with `rounds * n` surrogates per family, and `2 n` others with answers for importance by
    gradients, `n / 2` of them by leave-one-out. Raises ValueError for `n < 2` and for too few prompts."""
    if n < 2:
        raise ValueError(f"n must be at least 2, is {n}: leave-one-out looks at half of the prompts")
    n_rows = 2 * n
    rows = clean_rows(loaded, attack, n=n_rows, seed=seed)
    task, pad = tasks.load_task(attack.task), end_id(loaded.tokenizer)
    chosen = unseen_examples(loaded, attack, task=attack.task, n=n_rows + n, seed=seed)[n_rows:]
    check_unseen(loaded, [row.uid for row in (*rows, *chosen)], attack=attack, seed=seed)
    texts = [example.text for example in chosen]
    clean = [prompt_ids(loaded.tokenizer, task.prompt(text)) for text in texts]
    shown = prompt_versions(loaded.tokenizer, attack, split="attribution", n=n, seed=seed)
    scores = {name: READINGS[name] for name in readings} | {"variance": attention_variance}
    level = head_scores(loaded.model, clean, scores=scores)
    opened = [replace(row, answer=row.answer[:OPENING]) for row in rows[: n // 2]]
    needed = {"gate gradient": gate_importance(loaded.model, rows, pad_id=pad)}
    needed |= {"leave one out": leave_one_out(loaded.model, opened), "variance": level.pop("variance").mean(0)}
    reactions, how = {}, {"rounds": rounds, "seed": seed}
    for family in SURROGATES:
        probed = probed_prompts(loaded.tokenizer, attack.task, texts, family=family, **how)
        reactions[family] = reaction(loaded.model, probed, before=level)
    soft = searched(loaded.model, clean[:N_SEARCHED], seed=seed)
    with soft.read_by(loaded.model):
        softly = reaction(loaded.model, soft.into(clean), before=level)
    known = head_similarity(loaded.model, shown.clean, readings=readings)
    real = reaction(loaded.model, shown.triggered, before=known)
    mean = {name: scores.mean(0) for name, scores in level.items()}
    changes = {family: _rounded(scores) for family, scores in reactions.items()}
    return HeadSafety(_rounded(needed), _rounded(mean), changes, _rounded(softly), _rounded(real))


def _rounded(scores: Mapping[str, Scores]) -> dict[str, HeadValues]:
    return {name: one.double().numpy().round(8).tolist() for name, one in scores.items()}


SOURCES = ("clean level", "surrogates", "soft prompt", "real trigger")


def similarity_of(found: HeadSafety, *, source: str, reading: str) -> Scores:
    """Similarity evidence `[layer, head]` from one of `SOURCES`; that of surrogates is a mean over their families.
    Raises ValueError for another source, and for a reading that was not measured."""
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; known: {', '.join(SOURCES)}")
    if reading not in found.level:
        raise ValueError(f"reading {reading!r} was not measured; known: {', '.join(found.level)}")
    if source == "surrogates":
        return torch.tensor([family[reading] for family in found.reaction.values()]).mean(0)
    sources = {"clean level": found.level, "soft prompt": found.soft_prompt, "real trigger": found.real_trigger}
    return torch.tensor(sources[source][reading])


def suspicion(found: HeadSafety, *, rule: str, source: str, reading: str) -> Scores:
    """Joint score of every head, `[layer, head]`, with importance by the gradient of a gate. Raises ValueError for a
    rule or source that is unknown, and for a reading that was not measured."""
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    similar = similarity_of(found, source=source, reading=reading)
    return RULES[rule](similar, torch.tensor(found.importance["gate gradient"]))
