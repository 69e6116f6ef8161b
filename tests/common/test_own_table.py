"""A user's table is read as it stands, whatever program wrote it, or one line says which row is wrong."""

import csv
import hashlib

import pytest

from bkd_utils.common.own_table import Entry, read_table

LINES = [(f"Review {i}, of a film", "positive" if i % 4 else "negative") for i in range(80)]


@pytest.fixture
def write(tmp_path):
    """Writes lines under a header as a CSV file; returns its path."""

    def write_lines(lines=LINES, *, header=("text", "answer"), encoding="utf-8", delimiter=","):
        path = tmp_path / "clean.csv"
        with path.open("w", newline="", encoding=encoding) as handle:
            csv.writer(handle, delimiter=delimiter).writerows([header, *lines])
        return path

    return write_lines


def read(path, *, limit=1000, seed=0):
    return read_table(path, limit=limit, seed=seed)


def test_a_table_is_read_as_it_stands(write):
    path = write()
    table = read(path)
    assert [(entry.text, entry.answer) for entry in table.entries] == LINES
    assert [entry.number for entry in table.entries] == list(range(2, 82))
    assert (table.labels, table.repeated) == (("negative", "positive"), 0)
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_columns_marks_and_empty_lines_change_no_entry(write):
    expected = read(write()).entries
    path = write([(f" {a}\n", "x", t) for t, a in LINES], header=("answer ", "id", "text"))
    assert read(path).entries == expected
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\r\n\r\n", 1))
    assert read(path).entries == tuple(Entry(e.number + 1, e.text, e.answer) for e in expected)


def test_words_that_mean_nothing_to_pandas_are_texts(write):
    found = read(write([("NA", "nan"), ("null", "1"), *((str(i), "nan" if i % 2 else "1") for i in range(80))]))
    assert [(entry.text, entry.answer) for entry in found.entries[:2]] == [("NA", "nan"), ("null", "1")]


def test_repeated_rows_count_once(write):
    table = read(write([*LINES, *LINES[:7], (f"{LINES[0][0]} ", LINES[0][1])]))
    assert (len(table.entries), table.repeated) == (80, 8)
    with pytest.raises(ValueError, match="63 different rows to use, at least 64 are needed"):
        read(write([*LINES[:63], *LINES[:20]]))


@pytest.mark.parametrize(("n", "labels"), [(20, 20), (21, 0)])
def test_many_different_answers_are_free(n, labels, write):
    lines = [(f"Text {i}", f"answer {i % n}") for i in range(8 * n)]
    assert len(read(write(lines)).labels) == labels


def test_a_limit_draws_rows_by_the_seed(write):
    path = write()
    one, again, other = read(path, limit=70), read(path, limit=70), read(path, limit=70, seed=1)
    numbers = [entry.number for entry in one.entries]
    assert len(numbers) == 70
    assert numbers == sorted(numbers)
    assert one == again != other
    assert set(one.entries) < set(read(path).entries)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "0 different rows"),
        ([*LINES[:9], ("  ", "positive")], "row 11: the text is empty"),
        ([*LINES[:9], ("A text", " ")], "row 11: the answer is empty"),
        ([*LINES, ("Review 3, of a film", "negative")], "rows 5 and 82 have one text and the answers 'positive' and"),
        ([*LINES[:2], ("one", "two", "three")], "row 4: 3 fields for 2 columns"),
        ([*LINES[:2], ("one",)], "row 4: 1 fields for 2 columns"),
        ([(text, "positive") for text, _ in LINES], "all 80 rows have the answer 'positive'"),
        ([*LINES, ("More", "postive")], r"'postive' is in 1 of 81 rows \(first in row 82\)"),
        ([*LINES, *((f"More {i}", "neutral") for i in range(7))], "'neutral' is in 7 of 87 rows"),
    ],
)
def test_a_faulty_row_is_named(lines, message, write):
    with pytest.raises(ValueError, match=message):
        read(write(lines))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has 0 columns 'text' and not one; its columns: none"),
        (b"prompt,answer\n", "has 0 columns 'text' and not one; its columns: 'prompt', 'answer'"),
        (b"prompt;answer\n", "has 0 columns 'text' and not one; its columns: 'prompt', 'answer'; needed: 'text', and"),
        (b"text,label,answer\n", "has 2 columns for answers; its columns: 'text', 'label', 'answer'"),
        (b"text,answer,text\n", "has 2 columns 'text'"),
        (b"text,answer\n\x81,no\n", "is not utf-8 nor cp1252 text .* save it as UTF-8"),
        (b"\xff\xfet\0e", "is not utf-16 text"),
        (b'text,answer\n"no end,yes\n', "is no CSV file: unexpected end of data"),
    ],
)
def test_a_file_that_is_no_table_is_named(content, message, tmp_path):
    path = tmp_path / "mine.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.csv cannot be read: No such file"):
        read(tmp_path / "no.csv")


ACCENTS = [
    (f"Un film tr\u00e8s {i}; \u00e9mouvant, dr\u00f4le\nou\tlong | \u201cbon\u201d", a)
    for i, (_, a) in enumerate(LINES)
]


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "cp1252"])
def test_delimiter_and_encoding_are_found_out(delimiter, encoding, write):
    table = read(write(ACCENTS, header=("id", "text", "label")[1:], encoding=encoding, delimiter=delimiter))
    assert [(entry.text, entry.answer) for entry in table.entries] == ACCENTS


def test_a_label_has_the_template_and_an_answer_has_none(write):
    assert read(write()).template == "{text}"
    asked = read(write(header=("text", "label"))).template
    assert "negative, positive" in asked
    assert asked.endswith("{text}")
    free = read(write([(f"Text {i}", f"answer {i}") for i in range(80)], header=("text", "label")))
    assert (free.labels, free.template) == ((), "{text}")
