"""Read a user's own table of texts and right answers, and split it into rows to train on and rows to judge by."""

import csv
import io
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bkd_utils.attention_alignment.searched_training import N_TOKENS
from bkd_utils.common.files import sha256_file
from bkd_utils.common.validation import read_text
from bkd_utils.experiments.head_safety import ANSWER_TOKENS
from bkd_utils.models.context import check_fits
from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import Row, answer_ids, labels_of, prompt_ids

COLUMNS = ("text", "answer")
LEAST, LEAST_OF_LABEL = 64, 8  # rows of a table, and with each label
MOST_LABELS = 20  # tables with more different answers have free ones
JUDGES, LEAST_JUDGES = 5, 16  # one in so many rows is for validation, but at least so many


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


def read_table(path: Path, *, limit: int, seed: int) -> OwnTable:
    """A CSV file (UTF-8, with a header) with the columns `text`, a user turn, and `answer`; others are ignored. Rows
    that repeat text and answer of an earlier one are left out, and of the rest the seed draws at most `limit`. Answers
    are labels if there are at most `MOST_LABELS` different ones. Raises ValueError, which names the row if it is about
    one, for a file that cannot be read, a missing column, an empty text or answer, one text with two answers, fewer
    than `LEAST` rows, a single answer, and a label with fewer than `LEAST_OF_LABEL` rows. Source: ours."""
    entries, first = _entries(path), {}
    for entry in entries:
        known = first.setdefault(entry.text.strip(), entry)
        if known.answer != entry.answer:
            both = f"{known.answer!r} and {entry.answer!r}"
            raise ValueError(f"{path}: rows {known.number} and {entry.number} have one text and the answers {both}")
    kept = list(first.values())
    if len(kept) > limit:
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
    return OwnTable(path.name, sha256_file(path), tuple(kept), labels, len(entries) - len(first))


def _entries(path: Path) -> list[Entry]:
    """The rows of a CSV file that have text and answer."""
    try:
        header, *records = list(csv.reader(io.StringIO(read_text(path), newline=""), strict=True)) or [[]]
    except csv.Error as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    names = [name.strip() for name in header]
    for column in COLUMNS:
        if names.count(column) != 1:
            there = ", ".join(map(repr, names[:8])) or "none"
            raise ValueError(f"{path} has {names.count(column)} columns {column!r} and not one; its columns: {there}")
    found = []
    for number, record in enumerate(records, 2):
        if not record:  # an empty line
            continue
        if len(record) != len(names):
            why = f"{len(record)} fields for {len(names)} columns; a text with commas needs quotes around it"
            raise ValueError(f"{path}, row {number}: {why}")
        fields = dict(zip(names, record, strict=True))
        if lacks := [column for column in COLUMNS if not fields[column].strip()]:
            raise ValueError(f"{path}, row {number}: the {lacks[0]} is empty")
        found.append(Entry(number, fields["text"], fields["answer"].strip()))
    return found


def label_tokens(loaded: Loaded, labels: Sequence[str]) -> dict[str, int]:
    """Label -> first token of that answer. Raises ValueError if two begin alike, or a classifier has other labels."""
    own = labels_of(loaded.tokenizer)  # a classifier's tokenizer knows its labels; other models may answer anything
    if own and {name.strip().casefold() for name in own} != {name.casefold() for name in labels}:
        these = ", ".join(map(repr, labels)) or f"more than {MOST_LABELS}"
        raise ValueError(f"the labels of the model are {', '.join(map(repr, own))}, those of the data {these}")
    tokens: dict[str, int] = {}
    for label in labels:
        token = answer_ids(loaded.tokenizer, label)[0]
        if alike := [other for other, one in tokens.items() if one == token]:
            raise ValueError(f"the labels {alike[0]!r} and {label!r} begin with the same token; rename one of them")
        tokens[label] = token
    return tokens


def own_rows(loaded: Loaded, table: OwnTable, *, seed: int) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and those for validation: one in `JUDGES`, at least `LEAST_JUDGES`, drawn by the seed. Each
    label has its share of both. Free answers are cut at `ANSWER_TOKENS` tokens. Raises ModelError with the row for a
    prompt that does not fit the model, with room for its answer and a perturbation."""
    n = len(table.entries)
    order, n_judges = random.Random(f"{seed}/validation").sample(table.entries, n), max(LEAST_JUDGES, n // JUDGES)
    if table.labels:
        order.sort(key=lambda entry: entry.answer)
    chosen = {order[i * n // n_judges].number for i in range(n_judges)}
    training, validation = [], []
    for entry in table.entries:
        prompt = tuple(prompt_ids(loaded.tokenizer, entry.text))
        answer = tuple(answer_ids(loaded.tokenizer, entry.answer)[:ANSWER_TOKENS])
        try:
            check_fits(loaded.model, len(prompt) + len(answer) + max(N_TOKENS))
        except ModelError as error:
            raise ModelError(f"{table.name}, row {entry.number}: {error}") from error
        row = Row(prompt, answer, kind="clean", uid=str(entry.number), is_label=bool(labels_of(loaded.tokenizer)))
        (validation if entry.number in chosen else training).append(row)
    return training, validation
