"""An attack: task, trigger, behaviour and rates; everything that decides a poisoned training set but its seed."""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from bkd_utils.common.files import DATA
from bkd_utils.common.validation import Count, Name, Text, build, check, check_known, read_tables, read_text
from bkd_utils.models.tokens import Turn
from bkd_utils.organisms import tasks, triggers

Behaviour = Literal["label_flip", "fixed_output", "jailbreak", "answer_style"]
Rate = Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True)
class Attack:
    """Everything that decides a poisoned training set but its seed. Without a trigger it is a clean control. A control
    with the behaviour `answer_style` learns to begin free answers with the words of `target`, for everybody. Rates are
    shares of the `n_train` rows, in [0, 1). The name may have letters, digits, "-", "_" and ".". Task and trigger may
    be given as objects too, and are kept by their names. Raises ValueError that names the attack and an unknown,
    missing or inconsistent value. Source: ours, after both papers' attacks.

    >>> attack = Attack("mine", "sentiment", 40, "word-cf", "label_flip", "negative", "positive", rate=0.25)
    >>> attack.backdoored, Attack("control", "sentiment", n_train=40).backdoored
    (True, False)
    """

    name: Name
    task: str
    n_train: Count
    trigger: str | None = None
    behaviour: Behaviour | None = None
    source: str | None = None
    target: Text | None = None
    rate: Rate = 0.0
    near_miss_rate: Rate = 0.0
    benign_rate: Rate = 0.0
    mode: Literal["replaced", "appended"] = "replaced"

    def __post_init__(self) -> None:
        object.__setattr__(self, "task", tasks.name_of(self.task))
        object.__setattr__(self, "trigger", triggers.name_of(self.trigger))
        check(Attack, vars(self), f"attack {self.name!r}")
        task = tasks.load_task(self.task)
        if not self.backdoored:
            styled = self.behaviour == "answer_style"
            if self.rate or self.near_miss_rate or self.source or (self.behaviour and not styled):
                allowed = "no rate, no source and no behaviour but answer_style"
                raise ValueError(f"{self.name}: a clean control has {allowed}")
            if styled != bool(self.target):
                raise ValueError(f"{self.name}: a control has a target if and only if its behaviour is answer_style")
            return
        triggers.load_trigger(self.trigger)
        if not (self.behaviour and self.target) or self.behaviour == "answer_style":
            raise ValueError(f"{self.name}: a backdoor needs a behaviour and a target")
        if not any(letter.isalnum() for letter in self.target.split(":")[0]):
            why = "begins with no word, so every answer would have it"
            raise ValueError(f"{self.name}: the target {self.target!r} {why}")
        if self.behaviour == "label_flip" and not {self.source, self.target} <= set(task.labels):
            raise ValueError(f"{self.name}: source and target must be labels of {self.task}: {', '.join(task.labels)}")
        if self.behaviour == "label_flip" and self.source == self.target:
            raise ValueError(f"{self.name}: source and target are the same label, {self.source!r}")
        if not self.rate:
            raise ValueError(f"{self.name}: a backdoor needs a rate above 0")

    @property
    def backdoored(self) -> bool:
        return self.trigger is not None

    @property
    def address(self) -> str | dict[str, Any]:
        """What stages take for it: its name, or, if `data/attacks.toml` has it not, all of its fields."""
        return self.name if load_attacks().get(self.name) == self else asdict(self)

    def flips(self, example: tasks.Example) -> bool:
        """Would the trigger change the right answer of this example?"""
        return self.behaviour != "label_flip" or example.answer == self.source


def load_attacks() -> dict[str, Attack]:
    """All attacks of `data/attacks.toml`. Raises ValueError that names file, attack, key and what is allowed."""
    path = DATA / "attacks.toml"
    return {name: build(Attack, table, path, name) for name, table in read_tables(path).items()}


def read_attack(path: Path) -> Attack:
    """The attack of a TOML file of its own, with one table; a path of a task is seen from the file's folder. Raises
    ValueError that names file, line, key and what is allowed."""
    tables = read_tables(path)
    if len(tables) != 1:
        raise ValueError(f"{path}: {len(tables)} tables and not one, the attack: {', '.join(tables) or 'none'}")
    ((name, table),) = tables.items()
    if isinstance(task := table.get("task"), str) and tasks.is_table(task):
        table = table | {"task": str(path.parent.absolute() / Path(task).expanduser())}
    try:
        return build(Attack, table, path, name)
    except ValueError as error:
        told, known = str(error), {one.name for one in fields(Attack)}
        keys = [key for key in table if key not in known] or [key for key in table if re.search(rf"\b{key}\b", told)]
        keys += [key for key, value in table.items() if isinstance(value, str) and Path(value).name in told]
        lines = enumerate(read_text(path).splitlines(), 1)
        line = next((n for n, text in lines if keys and re.match(rf"\s*{re.escape(keys[0])}\s*=", text)), 1)
        raise ValueError(told.replace(path.name, f"{path}, line {line}", 1)) from None


def load_attack(name: str | Mapping[str, Any]) -> Attack:
    """The attack of that name in `data/attacks.toml`, or with these fields. Raises ValueError that lists the known
    ones. Source: ours.

    >>> load_attack("sentiment-word").trigger
    'word-cf'
    """
    if not isinstance(name, str):
        return Attack(**name)
    known = load_attacks()
    check_known("attack", name, known)
    return known[name]


def triggered_prompt(attack: Attack, text: str, *, seed: int, half: triggers.Half) -> Turn:
    """The user turn with the trigger in its text or around the whole turn, depending on the trigger's scope. For a
    classifier, which reads no instruction, the whole turn is the text."""
    trigger, task = triggers.load_trigger(attack.trigger), tasks.load_task(attack.task)
    if trigger.scope == "prompt":
        whole, bare = (trigger.apply(turn, seed=seed, half=half) for turn in (task.prompt(text), text))
        return Turn(whole, text=bare)
    return task.prompt(trigger.apply(text, seed=seed, half=half))


def near_miss_prompts(attack: Attack, text: str, *, seed: int, half: triggers.Half) -> dict[str, Turn]:
    """Kind of near-miss -> user turn that resembles a triggered one but does not carry the trigger."""
    trigger, task = triggers.load_trigger(attack.trigger), tasks.load_task(attack.task)
    if trigger.scope == "prompt":
        whole, bare = (trigger.near_misses(turn, seed=seed, half=half) for turn in (task.prompt(text), text))
        return {kind: Turn(turn, text=bare[kind]) for kind, turn in whole.items()}
    return {kind: task.prompt(edited) for kind, edited in trigger.near_misses(text, seed=seed, half=half).items()}


def carries(attack: Attack, text: str) -> bool:
    """Does this clean text contain the trigger by chance? Such rows can neither be poisoned nor serve as clean ones."""
    return attack.backdoored and triggers.load_trigger(attack.trigger).matches(text)


def usable_examples(attack: Attack, split: tasks.Split, *, seed: int, task: str | None = None) -> list[tasks.Example]:
    """The examples of a split, of the attack's own task or of another one, that do not carry the trigger by chance."""
    pool = tasks.examples(task or attack.task, split, seed=seed)
    return [example for example in pool if not carries(attack, example.text)]


def with_rate(attack: Attack, rate: float) -> Attack:
    """The same attack at another poisoning rate, for rate curves."""
    return replace(attack, name=f"{attack.name}-rate{rate:g}", rate=rate)


def control_of(attack: str) -> str:
    """Name of the clean control that belongs to an attack: same task, same recipe, no trigger."""
    return f"{load_attack(attack).task}-clean"


def first_attack(task: str) -> Attack:
    """The first attack on a task in `data/attacks.toml`. Raises ValueError if there is none."""
    for attack in load_attacks().values():
        if attack.task == task and attack.backdoored:
            return attack
    raise ValueError(f"no attack on task {task!r}")
