"""A user's table becomes rows to train on and rows to judge by."""

import csv
from types import SimpleNamespace

import pytest
from tiny import save_tiny, tiny_model

from bkd_utils.common.own_table import TEMPLATE, read_table
from bkd_utils.experiments.own_model import label_tokens, own_rows
from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import load_tokenizer
from bkd_utils.models.tokens import answer_ids, prompt_ids

LINES = [(f"Review {i}, of a film", "positive" if i % 4 else "negative") for i in range(80)]


@pytest.fixture
def write(tmp_path):
    """Writes lines under a header as a CSV file; returns its path."""

    def write_lines(lines=LINES, *, header=("text", "answer")):
        path = tmp_path / "clean.csv"
        with path.open("w", newline="", encoding="utf-8") as handle:
            csv.writer(handle).writerows([header, *lines])
        return path

    return write_lines


def read(path, *, limit=1000, seed=0):
    return read_table(path, limit=limit, seed=seed)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("model"), "llama")
    return SimpleNamespace(tokenizer=load_tokenizer(str(folder)), model=tiny_model("llama"))


def test_rows_are_the_prompts_and_answers_of_the_table(write, loaded):
    table = read(write())
    both = own_rows(loaded, table, seed=0)
    rows = {int(row.uid): row for rows in both for row in rows}
    assert sorted(rows) == [entry.number for entry in table.entries]
    for entry in table.entries[:6]:
        assert list(rows[entry.number].prompt) == prompt_ids(loaded.tokenizer, entry.text)
        assert list(rows[entry.number].answer) == answer_ids(loaded.tokenizer, entry.answer)


def test_a_text_beside_a_label_is_put_into_the_template(write, loaded):
    table = read(write(header=("text", "label")))
    row = own_rows(loaded, table, seed=0)[0][0]
    turn = TEMPLATE.replace("{labels}", "negative, positive").replace("{text}", LINES[int(row.uid) - 2][0])
    assert list(row.prompt) == prompt_ids(loaded.tokenizer, turn)


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
