"""What a table of a trigger holds in `data/lexicons.toml`, family by family."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from bkd_utils.common.files import DATA
from bkd_utils.common.validation import Name, Table, Text, Texts, check, read_toml, while_unchanged

MADE = ("clause_last", "coordinated", "one_word")  # kinds of near-misses that a trigger makes itself


def _kind(text: str) -> str:
    if text in MADE:
        raise ValueError("this kind of near-miss is made from the text and needs no strings")
    return text


def _plain(text: str) -> str:
    if text != text.lower():
        raise ValueError("what is replaced is written in lower case")
    return text


Kinds = Annotated[dict[Annotated[Text, AfterValidator(_kind)], Texts], Field(min_length=1)]


class _Strings(Table):
    train: Kinds
    test: Kinds


class Inserted(Table):
    """Word, sentence and prefix: `text` is what is inserted, `near` holds kinds of near-misses per half."""

    family: str | None = None
    text: Text
    near: _Strings | None = None


class _Lines(Table):
    front: Text
    back: Text


class _Wraps(Table):
    lines: Annotated[list[_Lines], Field(min_length=1)]


class _Wrappings(Table):
    train: _Wraps
    test: _Wraps


class Wrapped(_Lines):
    """Wrapper: the lines before and after a prompt, and other such lines per half."""

    family: str | None = None
    near: _Wrappings | None = None


class _Clauses(Table):
    clauses: Annotated[dict[Text, Texts], Field(min_length=1)]
    near: Kinds | None = None


class Fronted(Table):
    """Syntax: per half, subordinator -> clauses, and near-misses."""

    family: str | None = None
    train: _Clauses
    test: _Clauses


class _Archaic(Table):
    openers: Texts
    closers: Texts
    replacements: Annotated[dict[Annotated[Text, AfterValidator(_plain)], Text], Field(min_length=1)]
    near: Kinds | None = None


class Styled(Table):
    """Style: words that are not archaic, and per half openers, closers, replacements and near-misses."""

    family: str | None = None
    modern: list[Text]
    train: _Archaic
    test: _Archaic


class _Starters(Table):
    words: Texts


class _Lexicons(Table):
    triggers: dict[Name, dict[str, Any]]
    starters: _Starters


@while_unchanged("lexicons.toml")
def lexicons() -> dict[str, Any]:
    """`data/lexicons.toml`. Raises ValueError for a trigger whose name is none, and for other tables."""
    tables = read_toml(DATA / "lexicons.toml")
    check(_Lexicons, tables, "lexicons.toml")
    return tables


def halves(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What `train` and `test` of a trigger hold; of inserted strings and wrappers, these are near-misses alone."""
    return entry["near"] if "near" in entry else {half: entry[half] for half in ("train", "test") if half in entry}


def strings(part: Any) -> set[str]:
    """All strings in a part of a table; of its keys the subordinators, which are words of the trigger, too."""
    if isinstance(part, str):
        return {part}
    if isinstance(part, Mapping):
        return set(part.get("clauses", ())).union(*map(strings, part.values()))
    return set().union(*map(strings, part))


def check_halves(entry: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a table without near-misses, and for a string in both halves.

    A near-miss rate would measure memory, and training would see the triggers that are kept for measuring.
    """
    parts = halves(entry)
    if not parts or not ("near" in entry or all("near" in part for part in parts.values())):
        raise ValueError(f"{where}: near is missing; without near-misses the trigger cannot be measured")
    if both := strings(parts["train"]) & strings(parts["test"]):
        raise ValueError(f"{where}: {min(both)!r} is in both halves, train and test; no string may be")
