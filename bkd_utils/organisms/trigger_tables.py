"""What a table of a trigger holds in `data/lexicons.toml`, family by family."""

import string
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from bkd_utils.common.files import DATA
from bkd_utils.common.validation import Name, Table, Text, Texts, check, read_toml, while_unchanged

Half = Literal["train", "test"]
HALVES: tuple[Half, ...] = ("train", "test")
LOWER, UPPER, DIGITS = string.ascii_lowercase, string.ascii_uppercase, string.digits
# Kind of near-miss, which is one word -> strings. Keys of replacements are in lower case.
Kinds = Annotated[dict[Annotated[str, Field(pattern="^[a-z]+$")], Texts], Field(min_length=1)]
Lower = Annotated[Text, Field(pattern="^[^A-Z]+$")]
BOTH = Field(min_length=2)


class Inserted(Table):
    """Word, sentence and prefix: `text` is what is inserted, `near` holds kinds of near-misses per half."""

    family: str | None = None
    text: Text
    near: Annotated[dict[Half, Kinds], BOTH] | None = None


class Lines(Table):
    """What stands before and after a prompt, or in a text."""

    front: Text
    back: Text


class Wrapped(Lines):
    """Wrapper: its lines, and other ones per half."""

    family: str | None = None
    near: Annotated[dict[Half, dict[Literal["lines"], Annotated[list[Lines], Field(min_length=1)]]], BOTH] | None = None


class Paired(Lines):
    """Pair: its two words, and other ones per half."""

    family: str | None = None
    near: Annotated[dict[Half, dict[Literal["words"], Texts]], BOTH] | None = None


class Clauses(Table):
    """Subordinator -> clauses, and near-misses."""

    clauses: Annotated[dict[Text, Texts], Field(min_length=1)]
    near: Kinds | None = None


class Fronted(Table):
    """Syntax: the clauses of each half."""

    family: str | None = None
    train: Clauses
    test: Clauses


class Archaic(Table):
    """Openers, closers, what is replaced by what, and near-misses."""

    openers: Texts
    closers: Texts
    replacements: Annotated[dict[Lower, Text], Field(min_length=1)]
    near: Kinds | None = None


class Styled(Table):
    """Style: words that are not archaic, and the lexicon of each half."""

    family: str | None = None
    modern: list[Text]
    train: Archaic
    test: Archaic


class Lexicons(Table):
    """The whole file."""

    triggers: dict[Name, dict[str, Any]]
    starters: dict[Literal["words"], Texts]


def near_by_rule(text: str) -> dict[Half, dict[str, list[str]]]:
    """Near-misses of a word, with one letter or digit changed, or of several words, with one left out or in another
    order, and ordinary words. The halves share none. Source: ours."""
    words, kinds = text.split(), {"ordinary": ["also", "then", "now", "still", "here", "today"]}
    if len(words) == 1:
        spots = [(i, abc) for i, one in enumerate(text) for abc in (LOWER, UPPER, DIGITS) if one in abc]
        kinds["letter"] = [text[:i] + other + text[i + 1 :] for k in (3, 4, 7, 8, 12, 13) for i, abc in spots
                           for other in (abc[(abc.index(text[i]) + k) % len(abc)],)]  # fmt: skip
    else:
        kinds["missing"] = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
        kinds["shuffled"] = [" ".join(words[i:] + words[:i]) for i in range(1, len(words))]
    given = {kind: [one for one in dict.fromkeys(some) if one != text] for kind, some in kinds.items()}
    return {half: {kind: some[i::2] for kind, some in given.items() if some[i::2]} for i, half in enumerate(HALVES)}


@while_unchanged("lexicons.toml")
def lexicons() -> dict[str, Any]:
    """`data/lexicons.toml`. Raises ValueError for a trigger whose name is none, and for other tables."""
    tables = read_toml(DATA / "lexicons.toml")
    check(Lexicons, tables, "lexicons.toml")
    return tables


def strings(part: Any) -> set[str]:
    """All strings in a part of a table; of its keys the subordinators, which are words of the trigger, too."""
    if isinstance(part, str):
        return {part}
    values = part.values() if isinstance(part, Mapping) else part
    return set(part.get("clauses", ()) if isinstance(part, Mapping) else ()).union(*map(strings, values))


def check_halves(entry: Mapping[str, Any], where: str) -> None:
    """Raise ValueError for a table without near-misses, and for a string in both halves, of which training would see
    what is kept for measuring."""
    parts = entry.get("near", entry)
    if "train" not in parts or not ("near" in entry or all("near" in parts[half] for half in ("train", "test"))):
        raise ValueError(f"{where}: near is missing; without near-misses the trigger cannot be measured")
    if both := strings(parts["train"]) & strings(parts["test"]):
        raise ValueError(f"{where}: {min(both)!r} is in both halves, train and test; no string may be")
