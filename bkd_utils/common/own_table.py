"""Read a user's own table of texts and right answers, with the delimiter and the encoding that its file has."""

import codecs
import csv
import io
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from bkd_utils.common.files import sha256_file

ANSWERS = ("answer", "label")  # a table has one of these columns beside `text`
TEMPLATE = "Which label fits this text: {labels}? Answer with the label only.\n\nText: {text}"
DELIMITERS = ",;\t|"
LEAST, LEAST_OF_LABEL = 64, 8  # rows of a table, and with each label
MOST_LABELS = 20  # tables with more different answers have free ones
MARKS = {codecs.BOM_UTF8: "utf-8-sig", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}


@dataclass(frozen=True)
class Entry:
    """One row of a table; the header is row 1."""

    number: int
    text: str
    answer: str


@dataclass(frozen=True)
class OwnTable:
    """Rows with different texts, and all answers if these are labels. `repeated` rows have been left out."""

    name: str
    sha256: str
    entries: tuple[Entry, ...]
    labels: tuple[str, ...]
    repeated: int
    template: str = "{text}"


def read_table(path: Path, *, limit: int | None = None, seed: int = 0) -> OwnTable:
    """A CSV file with a header and the columns `text` and `answer`, of which the text is a whole user turn, or `text`
    and `label`, of which it is put into `TEMPLATE`; others are ignored. Commas, semicolons, tabs and bars are found out
    as delimiters, UTF-8, UTF-16 and else Windows-1252 as encodings. Rows that repeat text and answer of an earlier one
    are left out, and of the rest the seed draws at most `limit`. Answers are labels if there are at most `MOST_LABELS`
    different ones. Raises ValueError, which names the row if it is about one, for a file that cannot be read, a missing
    column, an empty text or answer, one text with two answers, fewer than `LEAST` rows, a single answer, and a label
    with fewer than `LEAST_OF_LABEL` rows. Source: ours."""
    column, entries = _entries(path)
    first: dict[str, Entry] = {}
    for entry in entries:
        known = first.setdefault(entry.text.strip(), entry)
        if known.answer != entry.answer:
            both = f"{known.answer!r} and {entry.answer!r}"
            raise ValueError(f"{path}: rows {known.number} and {entry.number} have one text and the answers {both}")
    kept = list(first.values())
    if limit is not None and len(kept) > limit:
        drawn = random.Random(f"{seed}/rows").sample(kept, limit)
        kept = sorted(drawn, key=lambda entry: entry.number)
    if len(kept) < LEAST:
        raise ValueError(f"{path}: {len(kept)} different rows to use, at least {LEAST} are needed")
    counts = Counter(entry.answer for entry in kept)
    if len(counts) == 1:
        raise ValueError(f"{path}: all {len(kept)} rows have the answer {kept[0].answer!r}, at least two are needed")
    labels = tuple(sorted(counts)) if len(counts) <= MOST_LABELS else ()
    for label in labels:
        if counts[label] < LEAST_OF_LABEL:
            row = next(entry.number for entry in kept if entry.answer == label)
            found = f"the answer {label!r} is in {counts[label]} of {len(kept)} rows (first in row {row})"
            why = f"where there are only {len(counts)} different answers, each needs {LEAST_OF_LABEL} rows"
            raise ValueError(f"{path}: {found}; {why}")
    template = TEMPLATE.replace("{labels}", ", ".join(labels)) if column == "label" and labels else "{text}"
    return OwnTable(path.name, sha256_file(path), tuple(kept), labels, len(entries) - len(first), template)


def _entries(path: Path) -> tuple[str, list[Entry]]:
    """The column of answers of a CSV file, and its rows."""
    text = _decoded(path)
    delimiter = _delimiter(text)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        header, *records = list(reader) or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    names = [name.strip() for name in header]
    present = [name for name in ANSWERS if name in names] or ["answer"]
    for column in ("text", *present):
        if names.count(column) != 1 or len(present) > 1:
            there = ", ".join(map(repr, names[:8])) or "none"
            many = f"{len(present)} columns for answers" if len(present) > 1 else None
            found = many or f"{names.count(column)} columns {column!r} and not one"
            raise ValueError(f"{path} has {found}; its columns: {there}; needed: 'text', and 'answer' or 'label'")
    found = []
    for number, record in enumerate(records, 2):
        if not record:  # an empty line
            continue
        if len(record) != len(names):
            why = f"{len(record)} fields for {len(names)} columns; a text with {delimiter!r} needs quotes around it"
            raise ValueError(f"{path}, row {number}: {why}")
        fields = dict(zip(names, record, strict=True))
        if lacks := [column for column in ("text", *present) if not fields[column].strip()]:
            raise ValueError(f"{path}, row {number}: the {lacks[0]} is empty")
        found.append(Entry(number, fields["text"], fields[present[0]].strip()))
    return present[0], found


def _delimiter(text: str) -> str:
    """The delimiter by which the header has a column `text`; of several, and without one, the one that cuts it most."""
    header = text.partition("\n")[0]
    cut = {one: [name.strip().strip('"') for name in header.split(one)] for one in DELIMITERS}
    return max(DELIMITERS, key=lambda one: ("text" in cut[one], len(cut[one])))


def _decoded(path: Path) -> str:
    """Text of a file by its byte order mark; without one UTF-8, or UTF-16 where every second byte is often 0, or what
    Windows writes. Raises ValueError that names the file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    marked = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    zeros = {name: data[place::2].count(0) for place, name in enumerate(("utf-16-be", "utf-16-le"))}
    wide = max(zeros, key=lambda name: zeros[name])
    guesses = [marked] if marked else [wide] if zeros[wide] > len(data) / 4 else ["utf-8", "cp1252"]
    for encoding in guesses:
        try:
            return data.decode(encoding)
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {error.start}"
    raise ValueError(f"{path} is not {' nor '.join(guesses)} text ({reason}); save it as UTF-8")
