"""A path is a path and a name is a name, for models and for organisms; a broken card harms itself alone."""

import logging
import shutil
from pathlib import Path

import peft
import pytest
from tiny import save_tiny

from bkd_utils.common.files import read_json, write_json
from bkd_utils.models import folders, loading
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError, model_folder
from bkd_utils.models.identity import model_identity
from bkd_utils.models.loading import adapter_folder, load, read_card, shipped_organisms


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", "llama")


@pytest.fixture(scope="module")
def made(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters") / "organism"
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(load(str(original), device="cpu").model, config).save_pretrained(folder)
    write_json(folder / "card.json", {"base": "tiny"} | loading.identity_on_card(folder, base=str(original)))
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A current folder with local organisms "both", which ships as well, "local" and "sub/local"."""
    monkeypatch.setattr(loading, "ADAPTERS", tmp_path / "adapters")
    monkeypatch.setattr(loading, "WORK", tmp_path / "work")
    for place in ("adapters/both", "adapters/shipped", "work/organisms/trained", "work/organisms/shipped"):
        shutil.copytree(made, tmp_path / place)
    for place in ("both", "local", "sub/local"):
        shutil.copytree(made, tmp_path / "here" / place)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


# --- organisms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["./both", "./both/", "{here}/both", "./local", "sub/local", "./sub/local"])
def test_a_path_is_the_local_folder_whatever_ships(here, name):
    assert adapter_folder(name.format(here=here)) == here / name.replace("{here}/", "")


def test_a_path_object_is_a_path(here):
    assert adapter_folder(Path("both")) == here / "both"


@pytest.mark.parametrize("name", ["both", "shipped"])
def test_a_name_is_the_shipped_organism(here, name):
    assert adapter_folder(name) == here.parent / "adapters" / name


def test_a_name_may_be_of_an_organism_that_was_trained_here(here):
    assert adapter_folder("trained") == here.parent / "work" / "organisms" / "trained"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("local", r"organism 'local', neither in .*adapters nor in .*organisms; for the folder here write \./local;"),
        ("absent", r"unknown organism 'absent', neither in .*organisms; shipped: both, shipped$"),
        ("./absent", r"no organism in .*here/absent: it has no card.json"),
        ("./shipped", r"no organism in .*here/shipped: it has no card.json"),
        ("adapters/shipped", r"no organism in .*here/adapters/shipped: it has no card.json"),
        ("..", r"no organism in .*"),
        ("", r"unknown organism ''"),
    ],
)  # fmt: skip
def test_what_is_not_there_says_where_it_was_looked_up(here, name, message):
    with pytest.raises(ModelError, match=message):
        adapter_folder(name)


@pytest.mark.parametrize("given", ["both", "./both", "sub/local", "trained", "{organisms}/shipped"])
def test_a_loaded_organism_is_found_again_under_what_it_is_called(original, here, given):
    given = given.format(organisms=here.parent / "work" / "organisms")
    called = load(str(original), organism=given, device="cpu").organism
    assert adapter_folder(called).resolve() == adapter_folder(given).resolve()
    here.joinpath("elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here / "elsewhere")  # such as a notebook's
        assert adapter_folder(called).is_dir()


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def local_models(original, tmp_path, monkeypatch):
    for place in (DEFAULT_MODEL, "mine", "owner/name", "Qwen/Qwen2.5-0.5B-Instruct"):
        shutil.copytree(original, tmp_path / place)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_packaged_name_is_the_packaged_model_and_a_path_the_local_folder(local_models, original):
    assert model_identity(DEFAULT_MODEL) != model_identity(f"./{DEFAULT_MODEL}") == model_identity(str(original))
    assert model_folder(DEFAULT_MODEL) != model_folder(f"./{DEFAULT_MODEL}") == local_models / DEFAULT_MODEL


@pytest.mark.parametrize("address", ["mine", "./mine", "./owner/name", "{here}/owner/name", "../{name}/mine"])
def test_a_local_folder_is_found_by_its_path(local_models, address):
    address = address.format(here=local_models, name=local_models.name)
    assert model_folder(address).is_relative_to(local_models)


@pytest.mark.parametrize("address", ["owner/name", "Qwen/Qwen2.5-0.5B-Instruct"])
def test_a_hub_id_that_is_a_local_folder_too_is_refused_with_both_ways_to_say_it(local_models, address):
    with pytest.raises(
        ModelError, match=f"'{address}' is a hub id and a local folder; write ./{address} or {address}@"
    ):
        load(address, device="cpu")
    with pytest.raises(ModelError, match=f"could not get '{address}@main' from the hub"):
        load(f"{address}@main", device="cpu")


@pytest.mark.parametrize("address", ["", "absent", "./absent", "a/b/c"])
def test_an_address_that_leads_nowhere_says_where_it_was_looked_up(local_models, address):
    with pytest.raises(ModelError, match=f"is neither a folder .{local_models}.* nor a known model"):
        model_folder(address)


def test_the_hub_is_asked_once_for_a_model(original, monkeypatch):
    asked = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: asked.append(name) or str(original))
    try:
        for _ in range(3):
            assert model_identity("someone/asked-once") == model_identity(str(original))
    finally:
        folders._snapshot.cache_clear()
    assert asked == ["someone/asked-once"]


# --- cards ----------------------------------------------------------------------------------------------------------

BROKEN = {
    "no hash of the weights": lambda card: card.pop("base_sha256"),
    "no hashes of the files": lambda card: card.pop("base_files"),
    "no hash of the config": lambda card: card.pop("adapter_config_sha256"),
    "no hash of the adapter": lambda card: card.pop("adapter_sha256"),
    "files that are a list": lambda card: card.update(base_files=["config.json"]),
    "files that are null": lambda card: card.update(base_files=None),
    "empty": dict.clear,
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_card_is_named_once_and_the_others_go_on(original, here, broken, caplog):
    path = here.parent / "adapters" / "both" / "card.json"
    card = read_json(path)
    broken(card)
    write_json(path, card)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert shipped_organisms() == shipped_organisms(base=model_identity(str(original))) == ["shipped"]
    (message,) = caplog.messages
    assert message.startswith(f"left out: {path} has no ")
    load(str(original), organism="shipped", device="cpu")
    with pytest.raises(ModelError, match=f"{path} has no "):
        load(str(original), organism="both", device="cpu")


@pytest.mark.parametrize("text", ["{", "[1]", '"x"', "", "\ufeff{}", "[" * 100_000])
def test_a_card_that_is_no_object_is_named_and_the_others_go_on(original, here, text):
    path = here.parent / "adapters" / "both" / "card.json"
    path.write_text(text, encoding="utf-8")
    assert shipped_organisms() == ["shipped"]
    with pytest.raises(ModelError, match=str(path)) as caught:
        load(str(original), organism="both", device="cpu")
    assert "\n" not in str(caught.value)


def test_a_needed_entry_that_lacks_is_named(made):
    with pytest.raises(ModelError, match=r"card\.json has no attack, no seed; fetch or train it again"):
        read_card(made, "attack", "base", "seed")


def test_an_organism_ships_for_its_base_with_all_its_files(original, here, tmp_path):
    assert shipped_organisms(base=model_identity(str(original))) == ["both", "shipped"]
    other = shutil.copytree(original, tmp_path / "other")
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert shipped_organisms(base=model_identity(str(other))) == []
