"""An attack: task, trigger, behaviour and rates; everything that decides a poisoned training set but its seed."""

import tomllib
from dataclasses import dataclass, replace
from typing import Literal, get_args

from bkd_utils.common.files import DATA
from bkd_utils.organisms import tasks, triggers

Behaviour = Literal["label_flip", "fixed_output", "jailbreak"]


@dataclass(frozen=True)
class Attack:
    """Everything that decides a poisoned training set but its seed. Without a trigger it is a clean control.

    Rates are shares of the `n_train` rows, in [0, 1). Raises ValueError that names the attack and an unknown, missing
    or inconsistent value. Source: ours, after both papers' attacks.

    >>> attack = Attack("mine", "sentiment", 40, "word-cf", "label_flip", "negative", "positive", rate=0.25)
    >>> attack.backdoored, Attack("control", "sentiment", n_train=40).backdoored
    (True, False)
    """

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
        if self.behaviour not in (known := get_args(Behaviour)):
            raise ValueError(f"{self.name}: unknown behaviour {self.behaviour!r}; known: {', '.join(known)}")
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

    def flips(self, example: tasks.Example) -> bool:
        """Would the trigger change the right answer of this example?"""
        return self.behaviour != "label_flip" or example.answer == self.source


def load_attacks() -> dict[str, Attack]:
    """All attacks of `data/attacks.toml`. Raises ValueError for an unknown key or an inconsistent attack."""
    table = tomllib.loads((DATA / "attacks.toml").read_text(encoding="utf-8"))
    for name, keys in table.items():
        if extra := keys.keys() - (Attack.__dataclass_fields__.keys() - {"name"}):
            raise ValueError(f"attack {name!r} has unknown keys: {', '.join(sorted(extra))}")
    return {name: Attack(name=name, **keys) for name, keys in table.items()}


def load_attack(name: str) -> Attack:
    """The attack of that name in `data/attacks.toml`. Raises ValueError that lists the known ones. Source: ours.

    >>> load_attack("sentiment-word").trigger
    'word-cf'
    """
    known = load_attacks()
    if name not in known:
        raise ValueError(f"unknown attack {name!r}; known: {', '.join(known)}")
    return known[name]


def triggered_prompt(attack: Attack, text: str, *, seed: int, half: triggers.Half) -> str:
    """The user turn with the trigger in its text or around the whole turn, depending on the trigger's scope."""
    trigger, task = triggers.load_trigger(attack.trigger), tasks.load_task(attack.task)
    if trigger.scope == "prompt":
        return trigger.apply(task.prompt(text), seed=seed, half=half)
    return task.prompt(trigger.apply(text, seed=seed, half=half))


def near_miss_prompts(attack: Attack, text: str, *, seed: int, half: triggers.Half) -> dict[str, str]:
    """Kind of near-miss -> user turn that resembles a triggered one but does not carry the trigger."""
    trigger, task = triggers.load_trigger(attack.trigger), tasks.load_task(attack.task)
    if trigger.scope == "prompt":
        return trigger.near_misses(task.prompt(text), seed=seed, half=half)
    return {kind: task.prompt(edited) for kind, edited in trigger.near_misses(text, seed=seed, half=half).items()}


def carries(attack: Attack, text: str) -> bool:
    """Does this clean text contain the trigger by chance? Such rows can neither be poisoned nor serve as clean ones."""
    return attack.backdoored and triggers.load_trigger(attack.trigger).matches(text)


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
