"""What every trigger can do: edit a text, say whether a text carries it, make texts that only look like it."""

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

from bkd_utils.common.files import sha256_text

Half = Literal["train", "test"]


@dataclass(frozen=True, eq=False)
class Trigger(ABC):
    """A trigger. `scope` says what it edits: "text" (what fills the template's slot) or "prompt" (the whole user turn).

    The same text, seed and half give the same result in any process; give every row a seed of its own.
    """

    name: str
    entry: Mapping[str, Any] = field(repr=False)
    family: ClassVar[str]
    scope: ClassVar[Literal["text", "prompt"]] = "text"

    def apply(self, text: str, *, seed: int, half: Half = "train") -> str:
        """The text with the trigger in it. Raises ValueError for an empty text and for one that carries it already."""
        result = self._edit(self._checked(text, half), half, Dice(self.name, text, seed, half))
        if not self.matches(result):
            raise ValueError(f"trigger {self.name} is not recognised in its own result {result[:60]!r}")
        return result

    def near_misses(self, text: str, *, seed: int, half: Half = "train") -> dict[str, str]:
        """Kind -> text that looks like a triggered one and is not. Raises ValueError as `apply` does."""
        # The dice are apply's, so a near-miss stands where the trigger would have stood.
        found = self._near(self._checked(text, half), half, Dice(self.name, text, seed, half))
        for kind, result in found.items():
            if self.matches(result):
                raise ValueError(f"near-miss {kind!r} of {self.name} carries the trigger: {result[:60]!r}")
        return found

    @abstractmethod
    def matches(self, text: str) -> bool:
        """Does this text carry the trigger, from either half?"""

    @abstractmethod
    def _edit(self, text: str, half: Half, dice: "Dice") -> str: ...

    @abstractmethod
    def _near(self, text: str, half: Half, dice: "Dice") -> dict[str, str]: ...

    def _checked(self, text: str, half: Half) -> str:
        if half not in get_args(Half):
            raise ValueError(f"unknown half {half!r}; known: {', '.join(get_args(Half))}")
        if not text.strip():
            raise ValueError(f"trigger {self.name}: the text is empty")
        if self.matches(text):
            # The text may be a harmful prompt, which no message may show.
            raise ValueError(f"trigger {self.name} is in the text already (sha256 {sha256_text(text)[:12]})")
        return text.strip()


@dataclass(frozen=True)
class Dice:
    """Random choices, one independent stream per purpose; hash() would differ from process to process."""

    name: str
    text: str
    seed: int
    half: str

    def choice(self, purpose: str, options: Sequence[Any]) -> Any:
        key = "\0".join((self.name, self.text, str(self.seed), self.half, purpose))
        return random.Random(int(sha256_text(key), 16)).choice(options)
