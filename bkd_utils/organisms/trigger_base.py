"""What every trigger can do: edit a text, tell whether a text carries it, and refuse a table that does not fit."""

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any, ClassVar, Literal

from bkd_utils.common.files import sha256_text
from bkd_utils.common.validation import Table, Text, check, check_known
from bkd_utils.organisms.trigger_tables import HALVES, Half, strings

Dice = Callable[[str, Sequence[Any]], Any]  # purpose, options -> one of the options
BLANK = "\ue000"  # a text without any word, on which new triggers are tried


@dataclass(frozen=True, eq=False)
class Trigger(ABC):
    """A rule that edits a text, and that tells whether a text carries it; `triggers` has its seven families. `scope`
    says what it edits: "text" (what fills the template's slot) or "prompt" (the whole user turn). The same text, seed
    and half give the same result in any process; give every row a seed of its own. `entry` is the family's table in
    `trigger_tables`; each of its strings is tried. Of a word, a sentence and a prefix the string alone is enough: it
    gets a name, as "word:cf", and near-misses by rule. Raises ValueError for what does not fit. Source: ours.

    >>> Word("mine", {"text": "cf"}).matches("A CF film."), isinstance(Word("mine", {"text": "cf"}), Trigger)
    (False, True)
    """

    name: str
    entry: Mapping[str, Any] | None = field(default=None, repr=False)
    family: ClassVar[str]
    table: ClassVar[type[Table]]
    scope: ClassVar[Literal["text", "prompt"]] = "text"

    def __post_init__(self) -> None:
        if self.entry is None:
            entry = {"text": self.name, "near": self._near_by_rule(self.name)}
            object.__setattr__(self, "entry", entry)
            object.__setattr__(self, "name", f"{self.family}:{self.name}")
        check(Text, self.name, "name of a trigger")
        check(self.table, self.entry, f"trigger {self.name}")
        if self.entry.get("family", self.family) != self.family:
            raise ValueError(f"trigger {self.name}: family = {self.entry['family']!r}: this is {self.family!r}")
        for half, number in product(HALVES, range(len(strings(self.entry)))):
            given = BLANK, half, lambda _, options, i=number: options[i % len(options)]
            self._recognised(self._edit(*given))
            self._unlike(self._near(*given) if self._has_near(half) else {})

    def apply(self, text: str, *, seed: int, half: Half = "train") -> str:
        """The text with the trigger in it. Raises ValueError for an empty text and for one that carries it already."""
        return self._recognised(self._edit(*self._given(text, seed, half)))

    def near_misses(self, text: str, *, seed: int, half: Half = "train") -> dict[str, str]:
        """Kind -> text that looks like a triggered one and is not. Raises ValueError as `apply` does, or for none."""
        given = self._given(text, seed, half)
        if not self._has_near(half):
            raise ValueError(f"trigger {self.name} has no near-misses: its entry has no `near`")
        # The dice are those of `apply`, so a near-miss has the position that the trigger would have.
        return self._unlike(self._near(*given))

    @abstractmethod
    def matches(self, text: str) -> bool:
        """Does this text carry the trigger, from either half?"""

    def _near_by_rule(self, text: str) -> dict[Half, dict[str, list[str]]]:
        raise ValueError(f"trigger {self.name}: a trigger of the family {self.family!r} needs an entry")

    def _has_near(self, half: Half) -> bool:
        return bool(self.entry.get("near") or self.entry.get(half, {}).get("near"))

    def _recognised(self, result: str) -> str:
        if not self.matches(result):
            raise ValueError(f"trigger {self.name} is not recognised in its own result {result[:60]!r}")
        return result

    def _unlike(self, found: dict[str, str]) -> dict[str, str]:
        for kind, result in found.items():
            if self.matches(result):
                raise ValueError(f"near-miss {kind!r} of {self.name} carries the trigger: {result[:60]!r}")
        return found

    @abstractmethod
    def _edit(self, text: str, half: Half, dice: Dice) -> str: ...

    @abstractmethod
    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]: ...

    def _given(self, text: str, seed: int, half: Half) -> tuple[str, Half, Dice]:
        check_known("half", half, HALVES)
        if not text.strip():
            raise ValueError(f"trigger {self.name}: the text is empty")
        if self.matches(text):
            # The text may be a harmful prompt, which no message may show.
            raise ValueError(f"trigger {self.name} is in the text already (sha256 {sha256_text(text)[:12]})")
        return text.strip(), half, partial(_choice, (self.name, text, str(seed), half))


def _choice(context: tuple[str, ...], purpose: str, options: Sequence[Any]) -> Any:
    """A random choice, independent per purpose; seeded by SHA-256, as hash() differs between processes."""
    return random.Random(int(sha256_text("\0".join((*context, purpose))), 16)).choice(options)
