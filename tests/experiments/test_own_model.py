"""A cure of a user's model is judged on rows it was not trained on, and what it writes is the treated model again."""

import csv
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from tiny import save_tiny

from bkd_utils.attention_alignment import rivals, searched_training
from bkd_utils.common.files import UserError, read_json, sha256_file, write_json
from bkd_utils.common.own_table import read_table
from bkd_utils.experiments import own_model
from bkd_utils.experiments.own_model import FREE, cure, label_tokens, load_cured, measure, own_rows
from bkd_utils.models.folders import CHANGES, ModelError
from bkd_utils.models.loading import load

LINES = [(f"Film {i} is {word}", word) for i, word in enumerate(["good", "bad"] * 32)]
QUICK = {"steps": 2, "device": "cpu"}


def write_table(path, lines=LINES):
    with path.open("w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([("text", "answer"), *lines])
    return path


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits


def tree(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A cured tiny model: its folder, the treated model's logits, and the rows that each step of it was given."""
    home = tmp_path_factory.mktemp("cure")
    given = SimpleNamespace(model=str(save_tiny(home / "model", "llama")), data=write_table(home / "clean.csv"))
    given.measured, given.searched, given.tuned, given.seeds = [], [], [], {"measuring": set(), "training": set()}
    search, tune, write = own_model.search, rivals.tune, own_model._write

    def measured(loaded, **rows):
        given.measured.append(rows)
        return measure(loaded, **rows)

    def searching(place):
        def searched(model, rows, *, seed, **how):
            given.searched += rows
            given.seeds[place].add(seed)
            return search(model, rows, seed=seed, **how)

        return searched

    def tuned(model, rows, *, prepare, **how):
        def prepared(batch):
            given.tuned += (found := prepare(batch))
            return found

        return tune(model, rows, prepare=prepared, **how)

    def written(loaded, target, report):
        given.logits = logits(loaded.model)
        write(loaded, target, report)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(own_model, "measure", measured)
        patch.setattr(own_model, "search", searching("measuring"))
        patch.setattr(searched_training, "search", searching("training"))
        patch.setattr(rivals, "tune", tuned)
        patch.setattr(own_model, "_write", written)
        given.folder = cure(given.model, data=given.data, out=home / "out", **QUICK)
    return given


@pytest.fixture
def folder(done, tmp_path):
    """A copy of the folder of the cured model."""
    return shutil.copytree(done.folder, tmp_path / "copy")


@pytest.fixture
def nothing_loaded(monkeypatch):
    monkeypatch.setattr(own_model, "load", lambda *_, **__: pytest.fail("a model is loaded"))


def test_what_is_written_is_the_treated_model_again(done):
    again = load_cured(done.folder, device="cpu")
    assert torch.equal(logits(again.model), done.logits)
    assert not torch.equal(logits(load(done.model, device="cpu").model), done.logits)


def test_the_report_says_what_was_done(done):
    report = read_json(done.folder / "report.json")
    assert report["data"] == {
        "file": "clean.csv",
        "sha256": sha256_file(done.data),
        "rows": 64,
        "labels": ["bad", "good"],
        "repeated": 0,
        "training": 48,
        "validation": 16,
    }
    assert (report["method"], report["steps"], report["learning_rate"], report["seed"]) == ("searched", 2, 1e-4, 0)
    before, after = (dict(load(done.model, device="cpu").model.named_parameters()), load_cured(done.folder).model)
    count = sum(int((before[name] != parameter.cpu()).sum()) for name, parameter in after.named_parameters())
    assert report["changed_weights"] == count
    assert "16 are for validation" in (done.folder / "README.md").read_text()


def test_no_validation_row_is_trained_or_searched_on(done):
    validation = {row.uid for row in done.measured[0]["validation"]}
    assert len(validation) == 16
    for rows in (done.tuned, done.searched):
        assert rows
        assert not validation & {row.uid for row in rows}


def test_no_search_for_measuring_begins_as_one_that_was_trained_against(done):
    assert {place: len(seeds) for place, seeds in done.seeds.items()} == {"measuring": 3, "training": 1}
    assert not done.seeds["measuring"] & done.seeds["training"]


def test_before_and_after_are_measured_on_the_same_rows(done):
    before, after = done.measured
    assert before == after
    assert before["towards"].keys() == {"bad", "good"}


def test_the_same_seed_writes_the_same_bytes(done, tmp_path):
    again = cure(done.model, data=done.data, out=tmp_path / "again", **QUICK)
    assert tree(again) == tree(done.folder)


@pytest.fixture
def measured(done):
    """The tiny model, rows of the table, labels, and what `measure` says."""
    loaded, table = load(done.model, device="cpu"), read_table(done.data, limit=64, seed=0)
    training, validation = own_rows(loaded, table, seed=0)
    given = {"training": training, "validation": validation, "towards": label_tokens(loaded, table.labels)}
    return loaded, given


def test_accuracy_is_the_share_of_right_first_tokens(measured):
    loaded, given = measured
    likely = [int(loaded.model(torch.tensor([row.prompt])).logits[0, -1].argmax()) for row in given["validation"]]
    # Every second row gets the answer that a random model gives.
    rows = [replace(row, answer=(token,)) for row, token in zip(given["validation"][::2], likely[::2], strict=True)]
    rows += given["validation"][1::2]
    hits = 8 + sum(token == row.answer[0] for token, row in zip(likely[1::2], rows[8:], strict=True))
    found = measure(loaded, **given | {"validation": rows, "towards": {}}, seed=0)["accuracy"]
    assert (found["value"], found["n"]) == (hits / 16, 16)
    assert found["low"] < hits / 16 <= found["high"]


def test_a_pull_is_the_lowest_of_its_searches_on_validation_rows_with_another_answer(measured, monkeypatch):
    loaded, given = measured
    tried = []

    def valued(_model, rows, found, **_):
        tried.append((found.toward, {row.answer[0] for row in rows}, {row.uid for row in rows}, len(found.vectors)))
        return [3.0, 1.0, 2.0][(len(tried) - 1) % 3]

    monkeypatch.setattr(own_model, "loss_toward", valued)
    found = measure(loaded, **given, seed=0)["pulls"]
    validation = {row.uid for row in given["validation"]}
    tokens = given["towards"]
    assert [(one[0], one[3]) for one in tried] == [(token, n) for token in tokens.values() for n in (2, 3, 5)]
    for toward, answers, uids, _ in tried:
        assert answers == set(tokens.values()) - {toward}
        assert uids <= validation
    for label, pull in found.items():
        assert (pull["loss"], pull["token"], len(pull["nearest"])) == (1.0, label, 3)


def test_validation_prompts_may_begin_in_another_way_than_those_for_training(measured):
    loaded, given = measured
    training = [replace(row, prompt=(*range(50, 90), *row.prompt)) for row in given["training"]]
    found = measure(loaded, **given | {"training": training}, seed=0)["pulls"]
    assert all(pull["loss"] > 0 for pull in found.values())


def test_free_answers_are_pulled_to_a_token_of_the_search(done, tmp_path):
    lines = [(f"Tell me about {i}", f"{i} things about {i}") for i in range(64)]
    data = write_table(tmp_path / "free.csv", lines)
    folder = cure(done.model, data=data, out=tmp_path / "free", method="fine-tuning", **QUICK)
    report = read_json(folder / "report.json")
    assert report["data"]["labels"] == []
    assert report["before"]["pulls"].keys() == {FREE}
    assert f"{report['before']['pulls'][FREE]['loss']:.2f} nats" in (folder / "README.md").read_text()


def test_a_treated_organism_is_an_organism_again(tiny_organism, done, tmp_path):
    how = {"organism": "tiny", "method": "searched, attention"}
    folder = cure(tiny_organism, data=done.data, **how, **QUICK)
    assert folder == tmp_path / "cured" / "tiny"
    again, cured = load(tiny_organism, organism=folder, device="cpu"), load_cured(folder, device="cpu")
    assert torch.equal(logits(again.model), logits(cured.model))
    untreated = dict(load(tiny_organism, organism="tiny", device="cpu").model.named_parameters())
    changed = [name for name, one in again.model.named_parameters() if not torch.equal(one, untreated[name])]
    assert changed
    assert all("self_attn" in name for name in changed)
    assert read_json(folder / "card.json")["treatment"] == {"method": how["method"], "steps": 2, "seed": 0, "rows": 48}
    assert "not proven clean" in (folder / "README.md").read_text()


def test_an_existing_folder_is_replaced_by_force_and_only_if_a_cure_wrote_it(done, folder, nothing_loaded):
    with pytest.raises(UserError, match="is there already; choose another --out"):
        cure(done.model, data=done.data, out=folder, **QUICK)
    (folder / "report.json").unlink()
    with pytest.raises(UserError, match="is not replaced, because no cure has written it"):
        cure(done.model, data=done.data, out=folder, force=True, **QUICK)
    assert (folder / CHANGES).is_file()


def test_by_force_all_files_are_new(done, folder):
    (folder / "more.txt").touch()
    cure(done.model, data=done.data, out=folder, force=True, **QUICK)
    assert tree(folder) == tree(done.folder)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("error", "shown"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (SafetensorError("no space left"), UserError)],
    ids=["Ctrl-C", "full"],
)
def test_what_ends_early_leaves_nothing_half_written(force, error, shown, done, folder, monkeypatch):
    def ended(_changes, path, **_):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(own_model, "save_file", ended)
    # The treatment itself does not matter here.
    monkeypatch.setattr(own_model, "measure", lambda *_, **__: {})
    monkeypatch.setattr(own_model, "treat", lambda *_, **__: 1)
    out = folder if force else folder.parent / "new"
    with pytest.raises(shown):
        cure(done.model, data=done.data, out=out, force=force, **QUICK)
    assert sorted(path.name for path in folder.parent.iterdir()) == ["copy"]
    assert tree(folder) == tree(done.folder)


def test_a_full_disk_is_named_before_anything_is_treated(done, tmp_path, monkeypatch):
    monkeypatch.setattr(own_model.shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
    monkeypatch.setattr(own_model, "measure", lambda *_, **__: pytest.fail("it is measured"))
    with pytest.raises(UserError, match=r"has 0\.00 GB left, the changes may need 0\.01 GB"):
        cure(done.model, data=done.data, out=tmp_path / "out", **QUICK)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "heads removed"}, "unknown method 'heads removed'; known: searched; searched, attention; fine"),
        ({"address": "/no/such/model"}, "'/no/such/model' is neither a folder"),
        ({"organism": "nope"}, "unknown organism 'nope'"),
        ({"rows": 63}, "63 different rows to use"),
    ],
)
def test_a_bad_argument_is_named_before_anything_is_loaded(given, message, done, tmp_path, nothing_loaded):
    with pytest.raises((ValueError, UserError), match=message):
        cure(**{"address": done.model, "data": done.data, "out": tmp_path / "out", **QUICK, **given})


def test_an_organism_gets_no_name_that_is_none(tiny_organism, done, tmp_path, nothing_loaded):
    with pytest.raises(ValueError, match="a name has letters"):
        cure(tiny_organism, data=done.data, organism="tiny", out=tmp_path / "my model", **QUICK)


def test_a_folder_that_is_not_whole_is_not_loaded(done, folder, tmp_path):
    with pytest.raises(ModelError, match="is no folder that a cure has written"):
        load_cured(tmp_path)
    report = read_json(folder / "report.json")
    write_json(folder / "report.json", report | {"identity": "0" * 64})
    with pytest.raises(ModelError, match="holds another model than the one that was treated"):
        load_cured(folder)
    (folder / CHANGES).write_bytes((folder / CHANGES).read_bytes() + b" ")
    with pytest.raises(ModelError, match=r"changes\.safetensors does not match the sha256"):
        load_cured(folder)
