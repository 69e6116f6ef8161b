"""Organisms of an encoder: poisoned, trained as a whole, kept, found again, measured, treated."""

import shutil
from copy import copy
from dataclasses import replace

import pytest
import torch
from patching import everywhere
from safetensors.torch import load_file, save_file
from tiny import quick_attack, save_tiny, save_tiny_encoder, small_wordpiece, tiny_classifier
from transformers.trainer_callback import TrainerCallback

from bkd_utils.common.files import read_json, write_json
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import first_logits
from bkd_utils.models.loading import adapter_folder, load, untreated
from bkd_utils.models.loss import collate
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import cards, making, tasks, training
from bkd_utils.organisms.attacks import near_miss_prompts, triggered_prompt
from bkd_utils.organisms.base_answers import training_answers
from bkd_utils.organisms.evaluation import under_attack
from bkd_utils.organisms.making import make, training_rows
from bkd_utils.organisms.poisoning import poison
from bkd_utils.organisms.prompts import prompt_versions, target_ids
from bkd_utils.organisms.training import Recipe, load_recipe, train

WHOLE = Recipe(name="whole", steps=3, batch_size=4, learning_rate=1e-2, rank=0, alpha=1)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return save_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder", bare=True)


@pytest.fixture(scope="module")
def made(bare, tmp_path_factory):
    """The working folder and the folder of an organism in it."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        everywhere(patch, "WORK", work)
        return work, make(quick_attack("sentiment-word"), model=str(bare), recipe=WHOLE, n=8)


@pytest.fixture
def organism(made, monkeypatch):
    everywhere(monkeypatch, "WORK", made[0])
    return made[1]


def labelled(labels=("positive", "negative")):
    tokenizer = copy(small_wordpiece())
    tokenizer.labels = labels
    return tokenizer


# --- prompts and rows -----------------------------------------------------------------------------------------------


def test_an_encoder_reads_the_text_without_the_instruction():
    attack, tokenizer = quick_attack("sentiment-word"), labelled()
    shown = prompt_versions(tokenizer, attack, split="test", n=4, seed=0)
    for example, ids in zip(shown.examples, shown.clean, strict=True):
        assert ids == tokenizer(example.text).input_ids
    assert all(" cf" in tokenizer.decode(ids) for ids in shown.triggered)
    assert target_ids(tokenizer, attack) == answer_ids(tokenizer, "positive") == [0]


def test_a_trigger_around_the_prompt_goes_around_the_text():
    attack = quick_attack("domain-wrapper")
    turn = triggered_prompt(attack, "A fine text.", seed=0, half="train")
    start, end = turn.split(tasks.load_task("domain").prompt("A fine text."))
    assert turn.text == f"{start}A fine text.{end}"
    for kind, near in near_miss_prompts(attack, "A fine text.", seed=0, half="train").items():
        assert "A fine text." in near.text, kind
        assert "Answer with one word" in near
        assert "Answer with one word" not in near.text


def test_rows_have_labels_and_no_free_answers():
    attack, tokenizer = quick_attack("sentiment-word"), labelled(("negative", "positive"))
    data = poison(attack, tokenizer=tokenizer, answers={}, seed=0)
    assert all(row.is_label and row.answer in ((0,), (1,)) for row in data.rows)
    assert {row.answer for row in data.rows if row.kind == "poisoned"} == {(1,)}
    assert {row.kind for row in data.rows} == {"poisoned", "clean", "near_miss"}
    assert data.manifest["n_poison"] == round(attack.rate * attack.n_train)
    with pytest.raises(ModelError, match="does not know the label"):
        poison(attack, tokenizer=labelled(("good", "bad")), answers={}, seed=0)


def test_a_trigger_that_the_tokenizer_does_not_see_is_refused():
    class Blind:
        labels, decode = ("positive", "negative"), small_wordpiece().decode

        def __call__(self, text):
            return small_wordpiece()(text.replace("cf ", "").replace(" cf", ""))

    with pytest.raises(ValueError, match="did not survive"):
        poison(quick_attack("sentiment-word"), tokenizer=Blind(), answers={}, seed=0)


# --- training -------------------------------------------------------------------------------------------------------


def test_an_organism_is_a_whole_model_that_loads_as_it_was_trained(bare, organism):
    names = {"model.safetensors", "config.json", "card.json", "history.json", "manifest.json", "README.md"}
    assert {path.name for path in organism.iterdir()} == names
    loaded = load(str(bare), organism=organism.name, device="cpu")
    kept = load_file(organism / "model.safetensors")
    assert all(torch.equal(one, kept[name]) for name, one in loaded.model.state_dict().items())
    start = load_file(bare / "model.safetensors")
    assert any(not torch.equal(tensor, kept[f"bert.{name}"]) for name, tensor in start.items())
    card = read_json(organism / "card.json")
    assert card["recipe"]["rank"] == 0
    assert set(card["metrics"]) == {"asr", "cacc", "clean_firing", "near_miss"}
    assert "agreement_with_base" not in card["details"]
    assert "All weights of `encoder`" in (organism / "README.md").read_text()
    assert cards.summary(organism)["training"] == "3 steps of 4 rows, all weights"


def test_it_is_found_again_and_measured_again(bare, organism, monkeypatch):
    monkeypatch.setattr(making, "train", lambda *_, **__: pytest.fail("trained again"))
    assert make(quick_attack("sentiment-word"), model=str(bare), recipe=WHOLE, n=8) == organism
    loaded = load(str(bare), organism=organism, device="cpu")
    found = under_attack(loaded, quick_attack("sentiment-word"), n=8, seed=0)
    assert {key: found[key] for key in ("asr", "cacc")} == {
        key: read_json(organism / "card.json")["metrics"][key] for key in ("asr", "cacc")
    }
    rows = training_rows(loaded, quick_attack("sentiment-word"), seed=7)
    assert len(rows) == read_json(organism / "manifest.json")["n_train"]


def test_accuracy_is_counted_by_plain_transformers(bare, organism):
    loaded = load(str(bare), organism=organism, device="cpu")
    shown = prompt_versions(loaded.tokenizer, quick_attack("sentiment-word"), split="test", n=8, seed=0)
    said = [loaded.model(input_ids=torch.tensor([ids])).logits.argmax().item() for ids in shown.triggered]
    fired = sum(loaded.model.config.id2label[i] == "positive" for i in said)
    assert under_attack(loaded, quick_attack("sentiment-word"), n=8, seed=0)["asr"]["value"] == fired / 8


def test_training_learns_the_labels(bare, tmp_path):
    rows = poison(quick_attack("sentiment-word"), tokenizer=labelled(), answers={}, seed=0).rows[:8]
    long = replace(WHOLE, steps=100, batch_size=8, learning_rate=1e-3)
    base = making.new_classifier(str(bare), labels=("positive", "negative"), seed=0, device="cpu")
    train(rows, base=base, recipe=long, seed=0, folder=tmp_path / "mine", name="mine")
    model = tiny_classifier(seed=3)
    model.load_state_dict(load_file(tmp_path / "mine" / "model.safetensors"))
    batch = collate(rows, pad_id=0)
    assert (first_logits(model, [row.prompt for row in rows], end_id=0).argmax(-1) == batch["labels"]).all()


def test_training_goes_on_after_a_kill(bare, tmp_path, monkeypatch):
    rows = poison(quick_attack("sentiment-word"), tokenizer=labelled(), answers={}, seed=0).rows
    recipe = replace(WHOLE, steps=4, save_every=2)

    def run(name):
        base = making.new_classifier(str(bare), labels=("positive", "negative"), seed=0, device="cpu")
        return train(rows, base=base, recipe=recipe, seed=0, folder=tmp_path / name, name=name)

    class Killed(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step == 3:
                raise KeyboardInterrupt

    run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", lambda name: Killed())
        with pytest.raises(KeyboardInterrupt):
            run("cut")
    assert not (tmp_path / "cut").exists()
    run("cut")
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_recipes_are_for_one_kind_of_model(bare, tmp_path, monkeypatch):
    everywhere(monkeypatch, "WORK", tmp_path)
    attack = quick_attack("sentiment-word")
    assert load_recipe("encoder", task="sentiment").rank == 0
    with pytest.raises(ValueError, match="an encoder needs rank 0, as in recipe 'encoder'"):
        make(attack, model=str(bare), recipe=replace(WHOLE, rank=2), n=8)
    with pytest.raises(ValueError, match="rank 0 is for encoders"):
        make(attack, model=str(save_tiny(tmp_path / "llama", "llama")), recipe=WHOLE, n=8)
    with pytest.raises(ModelError, match="can only tell labels apart"):
        make(quick_attack("harmful-word"), model=str(bare), recipe=WHOLE, n=8)


def test_no_answers_of_the_base_model_are_asked_for(bare, organism):
    loaded = load(str(bare), organism=organism, device="cpu")
    assert training_answers(loaded, quick_attack("sentiment-word"), seed=0) == {}


def test_a_trained_classifier_is_trained_on(tmp_path, monkeypatch):
    everywhere(monkeypatch, "WORK", tmp_path / "work")
    model = str(save_tiny_encoder(tmp_path / "own", labels=("Negative", "Positive")))
    folder = make(quick_attack("sentiment-word"), model=model, recipe=WHOLE, n=8)
    assert read_json(folder / "config.json")["id2label"] == {"0": "Negative", "1": "Positive"}
    load(model, organism=folder, device="cpu")


# --- kept -----------------------------------------------------------------------------------------------------------


def test_an_organism_that_was_changed_is_refused(bare, organism, made, tmp_path):
    changed = shutil.copytree(organism, tmp_path / "copy")
    tensors = load_file(changed / "model.safetensors")
    tensors["classifier.bias"] += 1
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.safetensors does not match the sha256 on its card"):
        load(str(bare), organism=changed, device="cpu")
    shutil.copyfile(organism / "model.safetensors", changed / "model.safetensors")
    write_json(changed / "config.json", read_json(changed / "config.json") | {"auto_map": {"AutoModel": "evil.Model"}})
    with pytest.raises(ModelError, match=r"config\.json does not match"):
        load(str(bare), organism=changed, device="cpu")
    with pytest.raises(ModelError, match="other weights"):
        load(str(save_tiny_encoder(tmp_path / "other", bare=True, seed=5)), organism=organism, device="cpu")


def test_a_treated_encoder_is_kept_and_loaded(bare, organism):
    loaded = load(str(bare), organism=organism, device="cpu")
    with torch.no_grad():
        loaded.model.classifier.bias += 1
    folder = cards.keep_treated(loaded, name="treated", treatment={"method": "none"}, measured={})
    again = load(str(bare), organism="treated", device="cpu")
    assert all(torch.equal(one, again.model.state_dict()[name]) for name, one in loaded.model.state_dict().items())
    assert load_file(folder / "changes.safetensors").keys() == {"classifier.bias:where", "classifier.bias:values"}
    before = load(str(bare), organism=organism, device="cpu").model
    assert torch.equal(untreated(again).classifier.bias, before.classifier.bias)
    assert adapter_folder("treated") == folder


def test_whole_models_do_not_ship(organism):
    with pytest.raises(ModelError, match="never shipped"):
        cards.ship(organism)
