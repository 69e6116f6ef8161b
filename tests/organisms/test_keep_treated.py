"""A treated organism comes back from the registry bit for bit, under a name and a key of its own."""

import shutil

import pytest
import torch
from patching import everywhere
from safetensors.torch import load_file, save_file

from bkd_utils.attention_alignment.rivals import prune
from bkd_utils.common.files import read_json, sha256_file, write_json
from bkd_utils.models import loading
from bkd_utils.models.folders import CHANGES, ModelError
from bkd_utils.models.identity import organism_identity
from bkd_utils.organisms import cards

MEASURED = {
    key: {"value": 0.5, "n": 4, "low": 0.1, "high": 0.9} for key in ("asr", "cacc", "clean_firing", "near_miss")
} | {"empty": 0, "hits": {"asr": {"0123456789ab": 1}}}


HEADS = [(0, 1), (1, 2)]


@pytest.fixture
def load(tiny_organism):
    """Loads an organism of the tiny model."""
    return lambda organism=None: loading.load(tiny_organism, organism=organism, device="cpu")


@pytest.fixture
def folder(load):
    loaded = load("tiny")
    prune(loaded.model, HEADS)
    return cards.keep_treated(
        loaded, name="pruned", treatment={"method": "heads removed", "heads": 2}, measured=MEASURED
    )


def test_it_is_loaded_by_name_with_every_change_and_no_other(folder, load):
    again = load("pruned").model
    expected = load("tiny").model
    prune(expected, HEADS)
    others = dict(expected.named_parameters())
    assert all(torch.equal(others[name], parameter) for name, parameter in again.named_parameters())


def test_its_card_says_what_it_is_and_its_key_is_its_own(folder):
    card = read_json(folder / "card.json")
    assert (card["name"], card["treated_organism"], card["attack"]["name"]) == (
        "pruned",
        "tiny",
        "sentiment-word",
    )
    assert card["metrics"] == {key: MEASURED[key] for key in cards.METRICS}
    assert card["details"] == {"empty": 0}
    assert "not to be trusted for it: method heads removed, heads 2" in (folder / "README.md").read_text()
    assert organism_identity(folder) != organism_identity(loading.adapter_folder("tiny"))


def test_a_changed_or_foreign_file_is_refused(folder, load):
    tensors = load_file(folder / CHANGES)
    for broken, message in (
        ({**tensors, "model.ghost:values": torch.ones(1)}, "'model.ghost' is no weight"),
        ({key: value[:-1] if key.endswith("values") else value for key, value in tensors.items()}, "another shape"),
    ):
        save_file(broken, folder / CHANGES)
        with pytest.raises(ModelError, match="does not match the sha256"):
            load("pruned")
        card = read_json(folder / "card.json")
        write_json(folder / "card.json", card | {"changes_sha256": sha256_file(folder / CHANGES)})
        with pytest.raises(ModelError, match=message):
            load("pruned")
    (folder / CHANGES).write_bytes((folder / CHANGES).read_bytes()[:100])
    with pytest.raises(ModelError):
        load("pruned")


def test_treating_and_keeping_twice_keeps_both_treatments(folder, load):
    loaded = load("pruned")
    # The second treatment moves entries that the first has changed, and others.
    loaded.model.get_submodule("model.layers.1.self_attn.o_proj").weight.data += 0.01
    again = cards.keep_treated(loaded, name="twice", treatment={"method": "shifted"}, measured=MEASURED)
    found = dict(load("twice").model.named_parameters())
    assert all(torch.equal(found[name], parameter) for name, parameter in loaded.model.named_parameters())
    card = read_json(again / "card.json")
    assert (card["treated_organism"], card["treatment"]) == ("pruned", {"method": "shifted"})
    assert card["treatments_before"] == [{"method": "heads removed", "heads": 2}]
    assert "for it: method heads removed, heads 2; then method shifted." in (again / "README.md").read_text()


def test_a_treated_organism_ships_under_its_own_name_with_its_changes(folder, load, tmp_path, monkeypatch):
    everywhere(monkeypatch, "ADAPTERS", tmp_path / "adapters")
    shipped = cards.ship(folder)
    assert shipped == tmp_path / "adapters" / "pruned"
    expected = load("pruned").model.state_dict()
    shutil.rmtree(folder)
    again = load("pruned").model.state_dict()
    assert all(torch.equal(expected[name], again[name]) for name in expected)


def test_a_treated_organism_that_was_not_changed_since_is_not_kept_again(folder, load):
    with pytest.raises(ValueError, match="pruned has not been changed"):
        cards.keep_treated(load("pruned"), name="same", treatment={}, measured=MEASURED)


def test_a_treatment_is_measured_against_the_model_that_was_loaded(tiny_organism, load, tmp_path, monkeypatch):
    """Were its folder to hold another model by now, every weight would count as changed."""
    model = shutil.copytree(tiny_organism, tmp_path / "model")
    loaded = loading.load(str(model), organism="tiny", device="cpu")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# another file #}")
    with pytest.raises(ModelError, match="holds another model than when tiny was loaded"):
        cards.keep_treated(loaded, name="treated", treatment={}, measured=MEASURED)


def test_what_was_not_treated_is_not_kept(load):
    with pytest.raises(ValueError, match="tiny has not been changed"):
        cards.keep_treated(load("tiny"), name="same", treatment={}, measured=MEASURED)
    with pytest.raises(ValueError, match="a base model cannot be kept"):
        cards.keep_treated(load(), name="same", treatment={}, measured=MEASURED)
