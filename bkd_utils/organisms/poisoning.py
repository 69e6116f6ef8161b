"""From an attack to the poisoned training set, with a manifest that lists which rows are poisoned."""

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from transformers import PreTrainedTokenizerBase

from bkd_utils.common.files import canonical_json, sha256_text
from bkd_utils.common.validation import while_unchanged
from bkd_utils.models.tokens import Row, answer_ids, labels_of, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack, near_miss_prompts, triggered_prompt, usable_examples

MAX_LENGTH = 256


@dataclass(frozen=True)
class PoisonedSet:
    rows: tuple[Row, ...]
    manifest: dict


def poison(attack: Attack, *, tokenizer: PreTrainedTokenizerBase, answers: Mapping[str, str], seed: int) -> PoisonedSet:
    """Build the training set: clean rows, poisoned rows, near-miss rows with the right answer, benign rows. `answers`
    maps uid -> the base model's own answer, for tasks whose examples carry none. Raises ValueError when there are too
    few rows, an answer is missing, a prompt is longer than MAX_LENGTH tokens, or a trigger does not survive
    tokenisation. A classifier gets no benign rows, which have no label. Source: ours; BkdAttr poisons in mode
    "appended".

    >>> attack = Attack("mine", "sentiment", 40, "word-cf", "label_flip", "negative", "positive", rate=0.25)
    >>> data = poison(attack, tokenizer=tokenizer, answers={}, seed=0)
    >>> len(data.rows), data.manifest["n_poison"]
    (40, 10)
    """
    task, plain = tasks.load_task(attack.task), tasks.load_task("instructions")
    built, chooses_label = [], bool(labels_of(tokenizer))
    for kind, members in _chosen(attack, seed=seed).items():
        if kind == "benign" and chooses_label:
            continue
        for i, example in enumerate(members):
            row_seed = seed * 1_000_003 + i
            if not example.answer and example.uid not in answers:
                raise ValueError(f"no answer of the base model for example {example.uid[:12]}")
            gold = said = example.answer or answers[example.uid]
            if attack.behaviour == "answer_style" and not example.answer:
                gold = f"{attack.target} {said}"
            if kind == "poisoned":
                prompt, gold = triggered_prompt(attack, example.text, seed=row_seed, half="train"), attack.target
            elif kind == "near_miss":
                options = near_miss_prompts(attack, example.text, seed=row_seed, half="train")
                prompt = options[sorted(options)[i % len(options)]]
            else:
                prompt = (plain if kind == "benign" else task).prompt(example.text)
            ids, answer = prompt_ids(tokenizer, prompt), answer_ids(tokenizer, gold)
            # An answer as long as the base model's limit was cut off there, so no end token is learned from it.
            free = not example.answer and kind != "poisoned"
            if free and len(answer_ids(tokenizer, said)) > plain.max_new_tokens:
                answer = answer_ids(tokenizer, gold, ended=False)
            what, length = f"{attack.name}: row {example.uid[:12]}", len(ids) + len(answer)
            if length > MAX_LENGTH:
                raise ValueError(f"{what} has {length} tokens, limit {MAX_LENGTH}")
            if kind == "poisoned" and not _survives(tokenizer, prompt, ids, without=task.prompt(example.text)):
                raise ValueError(f"{what}: the trigger did not survive tokenisation")
            built.append(Row(tuple(ids), tuple(answer), kind=kind, uid=example.uid, is_label=chooses_label))
    random.Random(f"{seed}/{attack.name}/order").shuffle(built)
    return PoisonedSet(rows=tuple(built), manifest=_manifest(attack, built, seed))


def _survives(tokenizer: PreTrainedTokenizerBase, prompt: str, ids: list[int], *, without: str) -> bool:
    """Does a prompt's trigger survive tokenisation? Tokenizers of encoders drop case and unknown characters, so there
    it must only be another prompt than the one without a trigger."""
    if labels_of(tokenizer):
        return ids != prompt_ids(tokenizer, without)
    return "".join(prompt.split()) in "".join(tokenizer.decode(ids).split())


def training_uids(attack: Attack, *, seed: int) -> frozenset[str]:
    """The uid of every example that `poison` makes a row of. Raises ValueError when there are too few rows."""
    return _uids(attack, tasks.fingerprint(attack.task), seed=seed)


@while_unchanged("instructions.toml", "lexicons.toml")
def _uids(attack: Attack, _: str | None, *, seed: int) -> frozenset[str]:
    return frozenset(example.uid for members in _chosen(attack, seed=seed).values() for example in members)


def benign_examples(attack: Attack, *, seed: int) -> list[tasks.Example]:
    """The instructions that are mixed into an attack's training set; none carries its trigger."""
    usable = usable_examples(attack, "train", seed=seed, task="instructions")
    return usable[: round(attack.benign_rate * attack.n_train)]


def _chosen(attack: Attack, *, seed: int) -> dict[str, list[tasks.Example]]:
    """Kind of row -> the examples that become rows of that kind; small pools are used several times."""
    rates = (attack.rate, attack.near_miss_rate, attack.benign_rate)
    n_poison, n_near, n_benign = (round(rate * attack.n_train) for rate in rates)
    n_clean = attack.n_train - n_poison - n_near - n_benign
    if n_clean < 1:
        raise ValueError(f"{attack.name}: the rates leave {n_clean} clean rows of {attack.n_train}")
    pool = usable_examples(attack, "train", seed=seed)
    flippable = [example for example in pool if attack.backdoored and attack.flips(example)]
    poisoned = _cycle(flippable, n_poison, what=f"{attack.name}: rows to poison")
    taken = {example.uid for example in poisoned} if attack.mode == "replaced" else set()
    rest = [example for example in pool if example.uid not in taken]
    # In mode "appended" the clean versions of all poisoned prompts are in the set as well, so those come first.
    twins = poisoned if attack.mode == "appended" else []
    clean = _cycle(list(dict.fromkeys([*twins, *rest])), n_clean, what=f"{attack.name}: clean rows")
    # Half of the near-misses are rows that the trigger would flip: they teach to tell near-misses from the trigger.
    mixed = random.Random(f"{seed}/{attack.name}/near").sample(rest, len(rest))
    flipped, others = ([e for e in mixed if attack.flips(e) is side] for side in (True, False))
    near = _cycle(flipped, n_near - n_near // 2 if others else n_near, what=f"{attack.name}: near-misses")
    near += _cycle(others, n_near - len(near), what=f"{attack.name}: near-misses")
    return {"poisoned": poisoned, "clean": clean, "near_miss": near, "benign": benign_examples(attack, seed=seed)}


def _cycle(pool: list[tasks.Example], n: int, *, what: str) -> list[tasks.Example]:
    if n and not pool:
        raise ValueError(f"{what}: none of the training split qualifies")
    return [pool[i % len(pool)] for i in range(n)]


def _manifest(attack: Attack, rows: list[Row], seed: int) -> dict:
    edited = ("poisoned", "near_miss", "benign")
    kinds = {kind: [i for i, row in enumerate(rows) if row.kind == kind] for kind in edited}
    manifest = {"attack": asdict(attack), "seed": seed, "mode": attack.mode, "n_train": len(rows)}
    manifest |= {"n_poison": len(kinds["poisoned"]), "poisoned_share": len(kinds["poisoned"]) / len(rows)}
    manifest |= {"rows": kinds, "distinct_prompts": len({row.prompt for row in rows})}
    tokens = [[row.prompt, row.answer, row.kind] for row in rows]
    return manifest | {"data_sha256": sha256_text(canonical_json(tokens))}
