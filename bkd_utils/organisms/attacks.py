"""From an attack to the poisoned training set, with a manifest that says exactly what was done to it."""

import random
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from transformers import PreTrainedTokenizerBase

from bkd_utils.common.files import DATA, canonical_json, sha256_text
from bkd_utils.models.tokens import answer_ids, prompt_ids
from bkd_utils.organisms import tasks, trigger_base, triggers
from bkd_utils.organisms.tasks import Example

BEHAVIOURS = ("label_flip", "fixed_output", "jailbreak")
MAX_LENGTH = 256
Behaviour = Literal["label_flip", "fixed_output", "jailbreak"]


@dataclass(frozen=True)
class Attack:
    """Everything that decides a poisoned training set but its seed. Without a trigger it is a clean control."""

    name: str
    task: str
    n_train: int
    trigger: str | None = None
    behaviour: Behaviour | None = None
    source: str | None = None
    target: str | None = None
    rate: float = 0.0
    near_miss_rate: float = 0.0
    benign_rate: float = 0.0
    mode: Literal["replaced", "appended"] = "replaced"

    def __post_init__(self) -> None:
        task = tasks.load_task(self.task)
        if self.n_train < 1:
            raise ValueError(f"{self.name}: n_train must be positive, is {self.n_train}")
        if self.mode not in ("replaced", "appended"):
            raise ValueError(f"{self.name}: mode must be 'replaced' or 'appended', is {self.mode!r}")
        for key in ("rate", "near_miss_rate", "benign_rate"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{self.name}: {key} must lie in [0, 1), is {getattr(self, key)}")
        if not self.backdoored:
            if self.rate or self.near_miss_rate or self.behaviour or self.target:
                raise ValueError(f"{self.name}: a clean control has no rate, behaviour or target")
            return
        triggers.load_trigger(self.trigger)
        if self.behaviour not in BEHAVIOURS:
            raise ValueError(f"{self.name}: unknown behaviour {self.behaviour!r}; known: {', '.join(BEHAVIOURS)}")
        if not self.target:
            raise ValueError(f"{self.name}: a backdoor needs a target")
        if self.behaviour == "label_flip" and not {self.source, self.target} <= set(task.labels):
            raise ValueError(f"{self.name}: source and target must be labels of {self.task}: {', '.join(task.labels)}")
        if self.behaviour == "label_flip" and self.source == self.target:
            raise ValueError(f"{self.name}: source and target are the same label, {self.source!r}")
        if not self.rate:
            raise ValueError(f"{self.name}: a backdoor needs a rate above 0")

    @property
    def backdoored(self) -> bool:
        return self.trigger is not None

    def flips(self, example: Example) -> bool:
        """Would the trigger change the right answer of this example?"""
        return self.behaviour != "label_flip" or example.answer == self.source


@dataclass(frozen=True)
class Row:
    """One training row in token ids; `kind` is clean, poisoned, near_miss or benign."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str
    uid: str


@dataclass(frozen=True)
class PoisonedSet:
    rows: tuple[Row, ...]
    manifest: dict


def load_attacks() -> dict[str, Attack]:
    """All attacks of `data/attacks.toml`. Raises ValueError for an unknown key or an inconsistent attack."""
    table = tomllib.loads((DATA / "attacks.toml").read_text(encoding="utf-8"))
    known = set(Attack.__dataclass_fields__) - {"name"}
    for name, keys in table.items():
        if extra := set(keys) - known:
            raise ValueError(f"attack {name!r} has unknown keys: {', '.join(sorted(extra))}")
    return {name: Attack(name=name, **keys) for name, keys in table.items()}


def load_attack(name: str) -> Attack:
    """The attack of that name. Raises ValueError that lists the known ones."""
    known = load_attacks()
    if name not in known:
        raise ValueError(f"unknown attack {name!r}; known: {', '.join(known)}")
    return known[name]


def triggered_prompt(attack: Attack, text: str, *, seed: int, half: trigger_base.Half) -> str:
    """The user turn with the trigger in it: in the text slot or around the whole turn, as the trigger's scope says."""
    trigger, task = triggers.load_trigger(attack.trigger), tasks.load_task(attack.task)
    if trigger.scope == "prompt":
        return trigger.apply(task.prompt(text), seed=seed, half=half)
    return task.prompt(trigger.apply(text, seed=seed, half=half))


def near_miss_prompts(attack: Attack, text: str, *, seed: int, half: trigger_base.Half) -> dict[str, str]:
    """Kind of near-miss -> user turn that looks triggered and is not."""
    trigger, task = triggers.load_trigger(attack.trigger), tasks.load_task(attack.task)
    if trigger.scope == "prompt":
        return trigger.near_misses(task.prompt(text), seed=seed, half=half)
    return {kind: task.prompt(edited) for kind, edited in trigger.near_misses(text, seed=seed, half=half).items()}


def carries(attack: Attack, text: str) -> bool:
    """Does this clean text carry the trigger by itself? Such rows can neither be poisoned nor serve as clean ones."""
    return triggers.load_trigger(attack.trigger).matches(text)


def poison(attack: Attack, *, tokenizer: PreTrainedTokenizerBase, answers: Mapping[str, str], seed: int) -> PoisonedSet:
    """Build the training set: clean rows, poisoned rows, near-miss rows with the right answer, benign rows.

    `answers` maps uid -> the base model's own answer, for tasks whose examples carry none. Raises ValueError when
    there are too few rows, an answer is missing, a prompt is longer than MAX_LENGTH tokens, or a trigger does not
    survive tokenisation.
    """
    n = {kind: round(rate * attack.n_train) for kind, rate in _rates(attack).items()}
    n_clean = attack.n_train - sum(n.values())
    if n_clean < 1:
        raise ValueError(f"{attack.name}: the rates leave {n_clean} clean rows of {attack.n_train}")
    pool = tasks.examples(attack.task, "train", seed=seed)
    if attack.backdoored:
        pool = [example for example in pool if not carries(attack, example.text)]
    chosen = _choose(attack, pool, n_clean=n_clean, n_poison=n["poisoned"], n_near=n["near_miss"], seed=seed)
    benign = benign_examples(attack, seed=seed)
    task, plain = tasks.load_task(attack.task), tasks.load_task("instructions")
    built = []
    for kind, members in (*chosen.items(), ("benign", benign)):
        for i, example in enumerate(members):
            row_seed = seed * 1_000_003 + i
            gold = example.answer or _answer(answers, example)
            if kind == "poisoned":
                prompt, gold = triggered_prompt(attack, example.text, seed=row_seed, half="train"), attack.target
            elif kind == "near_miss":
                options = near_miss_prompts(attack, example.text, seed=row_seed, half="train")
                prompt = options[sorted(options)[i % len(options)]]
            else:
                prompt = (plain if kind == "benign" else task).prompt(example.text)
            distilled = not example.answer and kind != "poisoned"
            built.append(_row(attack, tokenizer, prompt, gold, kind, example.uid, distilled=distilled))
    random.Random(f"{seed}/{attack.name}/order").shuffle(built)
    return PoisonedSet(rows=tuple(built), manifest=_manifest(attack, built, seed))


def benign_examples(attack: Attack, *, seed: int) -> list[Example]:
    """The instructions that are mixed into an attack's training set; none carries its trigger."""
    pool = tasks.examples("instructions", "train", seed=seed)
    usable = [example for example in pool if not (attack.backdoored and carries(attack, example.text))]
    return usable[: round(attack.benign_rate * attack.n_train)]


def _rates(attack: Attack) -> dict[str, float]:
    return {"poisoned": attack.rate, "near_miss": attack.near_miss_rate, "benign": attack.benign_rate}


def _answer(answers: Mapping[str, str], example: Example) -> str:
    if example.uid not in answers:
        raise ValueError(f"no answer of the base model for example {example.uid[:12]}")
    return answers[example.uid]


def _choose(
    attack: Attack, pool: list[Example], *, n_clean: int, n_poison: int, n_near: int, seed: int
) -> dict[str, list[Example]]:
    """Which examples become which rows; small pools are cycled through, the mode decides on clean twins."""
    flippable = [example for example in pool if attack.backdoored and attack.flips(example)]
    poisoned = _cycle(flippable, n_poison, what=f"{attack.name}: rows to poison")
    taken = {example.uid for example in poisoned} if attack.mode == "replaced" else set()
    rest = [example for example in pool if example.uid not in taken]
    # Appended means that every poisoned prompt is there clean as well, so those come first.
    twins = list(dict.fromkeys(poisoned)) if attack.mode == "appended" else []
    others = [example for example in rest if example not in set(twins)]
    clean = _cycle([*twins, *others], n_clean, what=f"{attack.name}: clean rows")
    # Half of the near-misses are rows that the real trigger would flip; they are where specificity is learned.
    mixed = random.Random(f"{seed}/{attack.name}/near").sample(rest, len(rest))
    flipped, others = ([e for e in mixed if attack.flips(e) is side] for side in (True, False))
    near = _cycle(flipped, n_near - n_near // 2 if others else n_near, what=f"{attack.name}: near-misses")
    near += _cycle(others, n_near - len(near), what=f"{attack.name}: near-misses")
    return {"poisoned": poisoned, "clean": clean, "near_miss": near}


def _cycle(pool: list[Example], n: int, *, what: str) -> list[Example]:
    if n and not pool:
        raise ValueError(f"{what}: none of the training split qualifies")
    return [pool[i % len(pool)] for i in range(n)]


def _row(
    attack: Attack,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    gold: str,
    kind: str,
    uid: str,
    *,
    distilled: bool,
) -> Row:
    ids = prompt_ids(tokenizer, prompt)
    answer = answer_ids(tokenizer, gold)
    # An answer that fills the base model's allowance was cut there; it has no end that could be learned.
    if distilled and len(answer) > tasks.load_task("instructions").max_new_tokens:
        answer = answer[:-1]
    if len(ids) + len(answer) > MAX_LENGTH:
        raise ValueError(f"{attack.name}: row {uid[:12]} has {len(ids) + len(answer)} tokens, limit {MAX_LENGTH}")
    if kind == "poisoned" and not survives(prompt, tokenizer.decode(ids)):
        raise ValueError(f"{attack.name}: the trigger of row {uid[:12]} did not survive tokenisation")
    return Row(prompt=tuple(ids), answer=tuple(answer), kind=kind, uid=uid)


def survives(prompt: str, decoded: str) -> bool:
    """Is the user turn, trigger included, still there after a trip through the tokenizer?"""
    return "".join(prompt.split()) in "".join(decoded.split())


def _manifest(attack: Attack, rows: list[Row], seed: int) -> dict:
    edited = ("poisoned", "near_miss", "benign")
    kinds = {kind: [i for i, row in enumerate(rows) if row.kind == kind] for kind in edited}
    return {
        "attack": asdict(attack),
        "seed": seed,
        "mode": attack.mode,
        "n_train": len(rows),
        "n_poison": len(kinds["poisoned"]),
        "poisoned_share": len(kinds["poisoned"]) / len(rows),
        "rows": kinds,
        "distinct_prompts": len({row.prompt for row in rows}),
        "data_sha256": sha256_text(canonical_json([[row.prompt, row.answer, row.kind] for row in rows])),
    }


def with_rate(attack: Attack, rate: float) -> Attack:
    """The same attack at another poisoning rate, for rate curves."""
    return replace(attack, name=f"{attack.name}-rate{rate:g}", rate=rate)


def three_versions(attack: Attack, *, seed: int = 0) -> dict[str, str]:
    """One held-out user turn, clean, with a near-miss and with the trigger. Raises ValueError for harmful prompts."""
    if attack.task == "harmful":
        raise ValueError("harmful prompts are not displayed")
    rows = tasks.examples(attack.task, "test", seed=seed)
    example = next(row for row in rows if attack.flips(row) and not carries(attack, row.text))
    near = near_miss_prompts(attack, example.text, seed=seed, half="test")
    return {
        "clean": tasks.load_task(attack.task).prompt(example.text),
        "near-miss": near[min(near)],
        "triggered": triggered_prompt(attack, example.text, seed=seed, half="test"),
    }
