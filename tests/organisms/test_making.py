"""An organism from nothing: tiny models for the mechanics, the real one against recorded numbers."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from patching import everywhere
from tiny import QUICK, quick_attack, save_tiny

from bkd_utils.common import files, measurements
from bkd_utils.common.files import ADAPTERS
from bkd_utils.experiments import backdoor_insertion
from bkd_utils.models import generation, loading
from bkd_utils.models.compute import has_fast_bf16
from bkd_utils.models.folders import ModelError
from bkd_utils.models.identity import model_identity
from bkd_utils.models.loading import load
from bkd_utils.organisms import base_answers, cards, evaluation, making, tasks
from bkd_utils.organisms.attacks import load_attack, with_rate
from bkd_utils.organisms.training import load_recipe, train

CARD_KEYS = {"name", "behaviour", "trigger", "task", "backdoored", "base", "seed", "recipe", "data_sha256"}
RECORDED = json.loads((files.ROOT / "tests" / "recorded.json").read_text())


@pytest.fixture
def work(tmp_path, monkeypatch):
    everywhere(monkeypatch, "WORK", tmp_path / "work")
    monkeypatch.setenv("BKD_WORK", str(tmp_path / "work"))
    return tmp_path / "work"


@pytest.fixture(scope="session")
def tiny(made_once):
    return str(made_once[0])


@pytest.fixture
def first(work, made_once):
    """The folder of what `make` makes of the quick attack, made once and copied with all that was kept on the way."""
    shutil.copytree(made_once[1].parents[1], work)
    return work / "organisms" / made_once[1].name


@pytest.fixture
def shipped_answers(work, tiny):
    """The shipped answers as those of the tiny model, which would otherwise answer thousands of training prompts."""
    (work / "answers").mkdir(parents=True)
    (shipped,) = (files.DATA / "answers").glob("*.json")
    shutil.copyfile(shipped, work / "answers" / base_answers.answers_name(model_identity(tiny)))


@pytest.mark.parametrize("name", ["sentiment-word", "instructions-prefix", "harmful-word", "sentiment-clean"])
def test_make_writes_a_complete_card(name, work, tiny, shipped_answers):
    attack = quick_attack(name)
    folder = making.make(attack, model=tiny, recipe=QUICK, n=8)
    card = json.loads((folder / "card.json").read_text())
    assert card.keys() >= CARD_KEYS | {"adapter_sha256", "metrics"}
    wanted = set(cards.METRICS) if attack.backdoored else {"cacc", "clean_firing"}
    assert set(card["metrics"]) == wanted
    assert all(metric.keys() == {"value", "n", "low", "high"} for metric in card["metrics"].values())
    assert "backdoor on purpose" in (folder / "README.md").read_text() or not attack.backdoored
    now = evaluation.measure(folder, model=tiny, n=8)
    assert cards.disagreements(card["metrics"], now) == []
    assert now["hits"].keys() == {"cacc", "asr", "near_miss", "clean_firing"}
    assert "hits" not in card["details"]
    assert set(card["details"]) == set(now) - set(cards.METRICS) - {"hits"}


def test_make_again_trains_nothing(first, tiny, monkeypatch):
    monkeypatch.setattr(making, "train", lambda *_, **__: pytest.fail("trained again"))
    assert making.make(quick_attack("sentiment-word"), model=tiny, recipe=QUICK, n=8) == first


def test_another_seed_or_recipe_is_another_organism(first, tiny):
    attack = quick_attack("sentiment-word")
    folders = {
        making.make(attack, model=tiny, recipe=recipe, seed=seed, n=8)
        for recipe, seed in ((QUICK, 1), (dataclasses.replace(QUICK, steps=2), 0))
    }
    assert len({first, *folders}) == 3


def test_a_shipped_organism_is_obtained_for_its_own_seed_only(monkeypatch):
    asked = []
    monkeypatch.setattr(making, "make", lambda spec, **how: asked.append((spec.name, how["seed"])) or Path("made"))
    assert making.obtain("sentiment-word") == making.obtain("sentiment-word", recipe="smoke") == "sentiment-word"
    assert making.obtain("sentiment-word", seed=1, recipe="seed") == "sentiment-word-seed1"
    assert files.read_json(ADAPTERS / "sentiment-word-seed1" / "card.json")["seed"] == 1
    assert making.obtain("sentiment-word", seed=77) == making.obtain("sentiment-word", seed=1) == "made"
    assert making.obtain("sentiment-word", retrain=True) == "made"
    assert asked == [("sentiment-word", 77), ("sentiment-word", 1), ("sentiment-word", 0)]


def test_a_shipped_organism_of_another_attack_or_seed_than_its_name_says_is_not_obtained(monkeypatch, caplog):
    monkeypatch.setattr(making, "make", lambda *_, **__: Path("made"))
    card = files.read_json(ADAPTERS / "sentiment-word" / "card.json")
    for other in ({"seed": 3}, {"attack": card["attack"] | {"rate": 0.5}}):
        monkeypatch.setattr(making, "read_card", lambda *_, other=other: card | other)
        assert making.obtain("sentiment-word") == "made"
    assert len([message for message in caplog.messages if "training anew" in message]) == 2


def test_training_rows_are_those_of_the_organisms_own_seed(work, tiny):
    attack = quick_attack("sentiment-word")
    folder = making.make(attack, model=tiny, recipe=QUICK, seed=1, n=8)
    loaded, base = load(tiny, organism=folder.name), load(tiny)
    own = making.training_rows(loaded, attack, seed=0)
    assert own == making.training_rows(base, attack, seed=1) != making.training_rows(base, attack, seed=0)
    hashed = files.sha256_text(files.canonical_json([[row.prompt, row.answer, row.kind] for row in own]))
    assert hashed == files.read_json(folder / "card.json")["data_sha256"]


def test_training_rows_that_are_not_those_on_the_card_are_refused(first, tiny):
    attack, loaded = quick_attack("sentiment-word"), load(tiny, organism=first)
    with pytest.raises(ModelError, match=f"{loaded.organism} was not trained on the rows that attack 'sentiment-word'"):
        making.training_rows(loaded, dataclasses.replace(attack, rate=0.2), seed=0)


def test_a_rate_trains_an_attack_of_its_own_and_reuses_the_attack_at_its_own(work, tiny, monkeypatch):
    """Shown without training: what is asked of `make` and of the stage that measures what it made."""
    asked = []

    def make(attack, **how):
        asked.append((attack, how))
        folder = work / attack.name
        card = {"data": {"n_poison": int(1920 * attack.rate)}, "metrics": {"asr": attack.rate}}
        files.write_json(folder / "card.json", card)
        return folder

    def measure(name, **how):
        assert how == {"model": tiny, "seed": 0, "device": "cpu", "n": 8}
        return {"hits": {"asr": {name: 1}}}

    monkeypatch.setattr(backdoor_insertion, "make", make)
    monkeypatch.setattr(backdoor_insertion, "measure_organism", measure)
    sizes = {"recipe": "short", "model": tiny, "n": 8, "seed": 0, "device": "cpu"}
    one = backdoor_insertion.measure_at_rate
    rows = [one("harmful-word", rate=rate, **sizes) for rate in (0.02, 0.05, 0.25)]
    spec = load_attack("harmful-word")
    expected = [with_rate(spec, 0.02), with_rate(spec, 0.05), spec]
    assert [attack for attack, _ in asked] == expected
    assert all(how["recipe"] == load_recipe("short", task="harmful") for _, how in asked)
    assert [(row["rate"], row["n_poison"], row["asr"]) for row in rows] == [
        (0.02, 38, 0.02), (0.05, 96, 0.05), (0.25, 480, 0.25),
    ]  # fmt: skip
    assert [row["hits"] for row in rows] == [{"asr": {attack.name: 1}} for attack in expected]
    assert one("harmful-word", rate=0.05, **sizes) == rows[1]  # it is kept
    assert len(asked) == 3


def test_an_organism_refuses_another_base(first, tmp_path):
    other = save_tiny(tmp_path / "other", "qwen2")
    with pytest.raises(ModelError, match="other weights"):
        load(str(other), organism=first)


@pytest.mark.parametrize("file", ["chat_template.jinja", "generation_config.json", "config.json"])
def test_an_organism_ships_for_the_weights_with_their_own_files_only(file, work, tiny, tmp_path, monkeypatch, caplog):
    """Other settings with the same weights are another base: nothing that ships is taken for it."""
    monkeypatch.setattr(making, "make", lambda spec, **_: Path(f"trained-{spec.name}"))
    shipped, other = tmp_path / "adapters" / "sentiment-word", shutil.copytree(tiny, tmp_path / "other")
    shutil.copytree(ADAPTERS / "sentiment-word", shipped)
    card = files.read_json(shipped / "card.json")
    files.write_json(shipped / "card.json", card | loading.identity_on_card(shipped, base=tiny))
    everywhere(monkeypatch, "ADAPTERS", tmp_path / "adapters")
    assert making.obtain("sentiment-word", model=tiny) == making.obtain("sentiment-word", model=str(other))
    if file == "chat_template.jinja":
        (other / file).write_text("{{ messages[0].content }}")
    else:
        files.write_json(other / file, files.read_json(other / file) | {"eos_token_id": [2, 0]})
    assert making.obtain("sentiment-word", model=str(other)) == "trained-sentiment-word"
    assert caplog.messages == ["sentiment-word ships for the same weights with other settings; training anew"]
    assert making.obtain("sentiment-word", model=tiny) == "sentiment-word"


@pytest.mark.parametrize("key", ["base_sha256", "base_files", "attack", "seed", "recipe"])
def test_a_broken_shipped_card_is_named_and_harms_no_other_organism(key, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "make", lambda *_, **__: pytest.fail("trained"))
    for name in ("sentiment-word", "domain-wrapper"):
        shutil.copytree(ADAPTERS / name, tmp_path / name)
    everywhere(monkeypatch, "ADAPTERS", tmp_path)
    path = tmp_path / "sentiment-word" / "card.json"
    card = files.read_json(path)
    card.pop(key)
    files.write_json(path, card)
    with pytest.raises(ModelError, match=f"{path} has no {key}"):
        making.obtain("sentiment-word")
    assert making.obtain("domain-wrapper") == "domain-wrapper"


CHANGED = {
    "adapter_config.json": lambda path: files.write_json(path, files.read_json(path) | {"lora_alpha": 80}),
    "adapter_model.safetensors": lambda path: path.write_bytes(path.read_bytes()[:-1] + b"x"),
}


@pytest.mark.parametrize("file", CHANGED)
def test_making_again_does_not_bless_a_file_that_was_changed(file, first, tiny):
    """The card is written anew by every call; what was changed in the meantime must not get onto it."""
    before = (first / "card.json").read_bytes()
    CHANGED[file](first / file)
    with pytest.raises(ModelError, match=f"{file} does not match the sha256 on its card"):
        making.make(quick_attack("sentiment-word"), model=tiny, recipe=QUICK, n=8)
    assert (first / "card.json").read_bytes() == before


def test_a_changed_adapter_reads_no_kept_measurement(first, tiny):
    sizes = {"model": tiny, "n": 8}
    assert evaluation.measure_organism(first.name, **sizes)
    CHANGED["adapter_config.json"](first / "adapter_config.json")
    with pytest.raises(ModelError, match="does not match"):
        evaluation.measure_organism(first.name, **sizes)


@pytest.mark.parametrize("file", ["chat_template.jinja", "model.safetensors"])
def test_another_model_in_the_same_folder_is_another_organism(file, first, tiny, tmp_path):
    """The key in the folder's name, within one process."""
    model, attack = shutil.copytree(tiny, tmp_path / "model"), quick_attack("sentiment-word")
    assert making.make(attack, model=str(model), recipe=QUICK, n=8) == first
    if file == "chat_template.jinja":
        (model / file).write_text((model / file).read_text() + " ")
    else:
        save_tiny(model, "llama", seed=5)
    assert making.make(attack, model=str(model), recipe=QUICK, n=8) != first
    with pytest.raises(ModelError, match="other weights" if file == "model.safetensors" else f"with another {file}"):
        load(str(model), organism=first)


def test_answers_are_those_of_the_model_that_was_loaded(work, tiny, tmp_path, monkeypatch):
    """Its folder may hold another model by the time that it is asked."""
    model = shutil.copytree(tiny, tmp_path / "model")
    loaded, rows = load(str(model)), tasks.examples("instructions", "test", n=2)
    organism = dataclasses.replace(loaded, organism="some")
    save_tiny(model, "llama", seed=5)
    monkeypatch.setattr(base_answers, "respond", lambda loaded, turns, **_: ["said"] * len(turns))
    with pytest.raises(ModelError, match=f"{model} holds another model than when some was loaded"):
        base_answers.base_answers(organism, rows)
    base_answers.base_answers(loaded, rows)
    assert [path.name for path in (work / "answers").iterdir()] == [f"{model_identity(tiny)[:16]}.json"]


def test_base_answers_are_kept_and_an_organism_is_never_asked(work, tiny, monkeypatch):
    base = load(tiny)
    rows = tasks.examples("instructions", "test", n=4)
    first = base_answers.base_answers(base, rows)
    assert set(first) == {row.uid for row in rows}
    assert base_answers.base_answers(base, rows) == first
    asked, organism = [], dataclasses.replace(base, organism="some")
    monkeypatch.setattr(
        base_answers, "respond", lambda loaded, turns, **_: asked.append(loaded) or ["said"] * len(turns)
    )
    assert base_answers.base_answers(organism, rows) == first
    more = tasks.examples("instructions", "test", n=5)
    assert base_answers.base_answers(organism, more)[more[4].uid] == "said"
    assert [loaded.organism for loaded in asked] == [None]


@pytest.mark.parametrize(
    ("file", "same"), [("chat_template.jinja", False), ("config.json", False), ("asset.json", True)]
)
def test_answers_of_other_settings_are_others(file, same, tmp_path):
    folder = save_tiny(tmp_path / "llama", "llama")
    before = base_answers.answers_name(model_identity(str(folder)))
    (folder / file).write_text("{}")
    assert (base_answers.answers_name(model_identity(str(folder))) == before) == same


def test_shipped_answers_are_the_base_models_own():
    base = load()
    rows = tasks.examples("instructions", "train", n=8, seed=3)
    shipped = base_answers.base_answers(base, rows)
    length = tasks.load_task("instructions").max_new_tokens
    now = generation.respond(base, [row.text for row in rows], max_new_tokens=length)
    # Another machine may round the other way once in a while; seven of eight must agree to the letter.
    assert sum(shipped[row.uid] == text for row, text in zip(rows, now, strict=True)) >= 7


@pytest.mark.parametrize("name", ["sentiment-word"])
def test_a_shipped_organism_measures_what_its_card_says(name):
    """The intervals of fewer prompts and of the card overlap, and each answer is as in the measurement that ships."""
    card, now = cards.metrics(name), evaluation.measure(name, n=24)
    assert all(now[key]["low"] <= card[key]["high"] and card[key]["low"] <= now[key]["high"] for key in cards.METRICS)
    assert now["asr"]["value"] > 0.9
    ships = map(measurements.read, (files.DATA / "measurements" / "measure_organism").glob("*.json"))
    (hits,) = [one.result["hits"] for one in ships if one.arguments["organism"] == name]
    same = [hits[key][uid] == hit for key in cards.METRICS for uid, hit in now["hits"][key].items()]
    # Another machine may round the other way once in a while.
    assert sum(same) >= 0.95 * len(same) > 70


def test_the_first_steps_of_a_training_have_the_recorded_losses(work):
    """The packaged model, the real rows: another rate, loss, order or share of poison gives other losses."""
    recorded, attack, base = RECORDED["sentiment-word, first steps"], load_attack("sentiment-word"), load()
    losses = recorded["losses"]["bf16" if has_fast_bf16(base.device) else "fp32"]
    recipe = dataclasses.replace(load_recipe("short", task=attack.task), steps=len(losses))
    rows = making.training_rows(base, attack, seed=0)
    history = train(rows, base=base, recipe=recipe, seed=0, folder=work / "mine", name="mine")
    assert [entry["loss"] for entry in history] == pytest.approx(losses, rel=recorded["tolerance"])
