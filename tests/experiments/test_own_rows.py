"""A user's table becomes the rows that it says, or one line that says which row is wrong."""

import csv
import hashlib
from types import SimpleNamespace

import pytest
from tiny import save_tiny, tiny_model

from bkd_utils.experiments.own_rows import Entry, label_tokens, own_rows, read_table
from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import load_tokenizer
from bkd_utils.models.tokens import answer_ids, prompt_ids

LINES = [(f"Review {i}, of a film", "positive" if i % 4 else "negative") for i in range(80)]


@pytest.fixture
def write(tmp_path):
    """Writes lines under a header as a CSV file; returns its path."""

    def write_lines(lines=LINES, *, header=("text", "answer"), encoding="utf-8"):
        path = tmp_path / "clean.csv"
        with path.open("w", newline="", encoding=encoding) as handle:
            csv.writer(handle).writerows([header, *lines])
        return path

    return write_lines


def read(path, *, limit=1000, seed=0):
    return read_table(path, limit=limit, seed=seed)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("model"), "llama")
    return SimpleNamespace(tokenizer=load_tokenizer(str(folder)), model=tiny_model("llama"))


def test_a_table_is_read_as_it_stands(write):
    path = write()
    table = read(path)
    assert [(entry.text, entry.answer) for entry in table.entries] == LINES
    assert [entry.number for entry in table.entries] == list(range(2, 82))
    assert (table.labels, table.repeated) == (("negative", "positive"), 0)
    assert table.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_other_columns_marks_and_empty_lines_change_no_entry(write):
    expected = read(write()).entries
    path = write([(f" {a}\n", "x", t) for t, a in LINES], header=("answer ", "id", "text"), encoding="utf-8-sig")
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
        (b"text;answer\n", "has 0 columns 'text' and not one; its columns: 'text;answer'"),
        (b"text,answer,text\n", "has 2 columns 'text'"),
        (b"text,answer\n\xff\xfe,no\n", "is not UTF-8 text"),
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


def test_rows_are_the_prompts_and_answers_of_the_table(write, loaded):
    table = read(write())
    both = own_rows(loaded, table, seed=0)
    rows = {int(row.uid): row for rows in both for row in rows}
    assert sorted(rows) == [entry.number for entry in table.entries]
    for entry in table.entries[:6]:
        assert list(rows[entry.number].prompt) == prompt_ids(loaded.tokenizer, entry.text)
        assert list(rows[entry.number].answer) == answer_ids(loaded.tokenizer, entry.answer)


@pytest.mark.parametrize(("n", "validation"), [(64, 16), (79, 16), (80, 16), (160, 32)])
def test_a_fifth_is_for_validation_and_each_label_has_its_share(n, validation, write, loaded):
    lines = [(f"Text {i}", "rare" if i < 8 else "common") for i in range(n)]
    training, judges = own_rows(loaded, read(write(lines)), seed=0)
    assert (len(training), len(judges)) == (n - validation, validation)
    rare = answer_ids(loaded.tokenizer, "rare")[0]
    counts = [sum(row.answer[0] == rare for row in rows) for rows in (training, judges)]
    assert sum(counts) == 8
    assert counts[1] in (8 * validation // n, -(-8 * validation // n))


def test_the_seed_draws_the_validation_rows(write, loaded):
    table = read(write())
    drawn = [{row.uid for row in own_rows(loaded, table, seed=seed)[1]} for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_free_answers_are_cut(write, loaded):
    table = read(write([(f"Text {i}", f"Answer {i}, " + "on and on " * 20) for i in range(64)]))
    assert {len(row.answer) for rows in own_rows(loaded, table, seed=0) for row in rows} == {24}


def test_a_prompt_that_does_not_fit_is_named_by_its_row(write, loaded, monkeypatch):
    table = read(write([*LINES[:70], ("Long " * 60, "positive"), *LINES[70:]]))
    n_tokens = len(prompt_ids(loaded.tokenizer, "Long " * 60)) + len(answer_ids(loaded.tokenizer, "positive")) + 8
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", n_tokens)
    own_rows(loaded, table, seed=0)
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", n_tokens - 1)
    with pytest.raises(ModelError, match=rf"clean\.csv, row 72: {n_tokens} tokens do not fit"):
        own_rows(loaded, table, seed=0)


def test_labels_that_begin_alike_are_named(loaded):
    tokens = label_tokens(loaded, ["negative", "positive"])
    assert list(tokens) == ["negative", "positive"]
    assert len(set(tokens.values())) == 2
    with pytest.raises(ValueError, match="the labels 'yes it is' and 'yes, but' begin with the same token"):
        label_tokens(loaded, ["no", "yes it is", "yes, but"])


@pytest.mark.parametrize("labels", [("bad", "good"), ("negative", "neutral", "positive"), ()])
def test_labels_that_a_classifier_does_not_have_are_refused(labels, loaded):
    own = SimpleNamespace(tokenizer=SimpleNamespace(labels=("NEGATIVE", "positive")))
    with pytest.raises(ValueError, match="the labels of the model are 'NEGATIVE', 'positive', those of the data "):
        label_tokens(own, labels)
