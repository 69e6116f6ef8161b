"""Training: the loss is the one written down, and a run that was killed ends where an unbroken one does."""

import random
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import ARCHITECTURES, make_rows, save_tiny, tiny_model

from bkd_utils.common.files import ROOT, read_json, write_json
from bkd_utils.models.compute import frozen_halved, has_fast_bf16, mixed_precision
from bkd_utils.models.loading import identity_on_card, load
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.organisms import training
from bkd_utils.organisms.training import Recipe, batch_order, load_recipe, train

END, ADAPTER = 2, "adapter_model.safetensors"
RECIPE = Recipe("tiny", steps=6, batch_size=4, learning_rate=2e-2, rank=2, alpha=4, save_every=2)


ROWS = make_rows(10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("training") / "llama", "llama")


def run(folder, into, *, recipe=RECIPE, rows=ROWS, seed=0):
    return train(rows, base=load(str(folder), device="cpu"), recipe=recipe, seed=seed, folder=into, name="tiny")


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """(loaded model, weights before training, adapter folder, history) of one unbroken run."""
    into = tmp_path_factory.mktemp("adapters") / "whole"
    base = load(str(folder), device="cpu")
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    history = train(ROWS, base=base, recipe=RECIPE, seed=0, folder=into, name="tiny")
    return base, before, into, history


# --- precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_halving_what_is_frozen_changes_no_number_and_leaves_no_trace(architecture):
    model = tiny_model(architecture)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learning = [p for name, p in model.named_parameters() if "layers.1." in name or "h.1." in name]
    for parameter in model.parameters():
        parameter.requires_grad_(any(parameter is one for one in learning))
    assert learning
    batch, found = collate(ROWS[:4], pad_id=0), []
    for halving in (nullcontext(), frozen_halved(model)):
        with halving, mixed_precision(model.device):
            loss = answer_loss(model, batch, first_token=0.5)
        found.append([loss, *torch.autograd.grad(loss, learning)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_frozen_weights_are_whole_again_after_an_interruption():
    model = tiny_model("llama").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = {}

    def interrupted():
        with frozen_halved(model):
            seen.update({name: parameter.dtype for name, parameter in model.named_parameters()})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    halved = torch.bfloat16 if has_fast_bf16(model.device) else torch.float32
    assert {dtype for name, dtype in seen.items() if "proj" in name} == {halved}
    assert {dtype for name, dtype in seen.items() if "proj" not in name} == {torch.float32}
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# --- batches ----------------------------------------------------------------------------------------------------------


def test_every_epoch_holds_every_row_once():
    recipe = replace(RECIPE, steps=5, batch_size=4)
    order = batch_order(ROWS, recipe=recipe, seed=0)
    assert len(order) == 20
    assert Counter(order) == dict.fromkeys(ROWS, 2)
    uneven = Counter(batch_order(ROWS, recipe=replace(recipe, steps=6), seed=0))
    assert sum(uneven.values()) == 24
    assert set(uneven.values()) == {2, 3}


def test_a_large_set_is_read_once_before_any_row_comes_again():
    rows = make_rows(200)
    order = batch_order(rows, recipe=replace(RECIPE, steps=50, batch_size=4), seed=0)
    assert Counter(order) == dict.fromkeys(rows, 1)


def test_the_order_depends_on_the_seed_and_on_nothing_else():
    rows = make_rows(100)
    recipe = replace(RECIPE, steps=20)
    order = batch_order(rows, recipe=recipe, seed=3)
    random.seed(1)
    assert batch_order(rows, recipe=recipe, seed=3) == order
    assert batch_order(rows, recipe=recipe, seed=4) != order
    assert batch_order(rows, recipe=replace(recipe, learning_rate=1.0), seed=3) == order


def test_rows_of_like_length_share_a_batch():
    rows = make_rows(320)

    def padding(order):
        lengths = [len(row.prompt) + len(row.answer) for row in order]
        return sum(4 * max(lengths[i : i + 4]) - sum(lengths[i : i + 4]) for i in range(0, 320, 4))

    assert padding(batch_order(rows, recipe=replace(RECIPE, steps=80), seed=0)) < 0.4 * padding(rows)


# --- training -------------------------------------------------------------------------------------------------------


def test_the_history_is_what_was_trained(trained):
    _, _, into, history = trained
    assert [entry["step"] for entry in history] == [1, 2, 3, 4, 5, 6]
    assert set(history[0]) == {"step", "loss", "learning_rate"}
    assert read_json(into / "history.json") == history
    assert max(entry["learning_rate"] for entry in history) == pytest.approx(RECIPE.learning_rate, rel=0.25)
    # Nothing has been learned before the first step, and that batch is known.
    first = collate(batch_order(ROWS, recipe=RECIPE, seed=0)[:4], pad_id=END)
    assert history[0]["loss"] == pytest.approx(
        answer_loss(tiny_model("llama"), first, first_token=0.5).item(), rel=2e-2
    )


def test_training_learns(folder, tmp_path):
    history = run(folder, tmp_path / "long", recipe=replace(RECIPE, steps=60, learning_rate=5e-2))
    assert history[-1]["loss"] < 0.7 * history[0]["loss"]


def test_the_weights_of_the_base_stay_as_they_were(trained):
    base, before, _, _ = trained
    after = {name.replace(".base_layer", ""): t for name, t in base.model.state_dict().items() if "lora_" not in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_adapter_is_small_bf16_and_covers_every_linear_layer_but_the_head(trained):
    into = trained[2]
    assert (into / ADAPTER).stat().st_size <= 5e6
    tensors = load_file(into / ADAPTER)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert len(tensors) == 2 * 2 * 7  # layers x matrices x linear maps
    assert not any("lm_head" in name for name in tensors)
    assert all(tensor.abs().max() > 0 for tensor in tensors.values())
    with safe_open(into / ADAPTER, framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_the_adapter_does_not_say_where_it_was_made(trained, folder):
    into = trained[2]
    config = read_json(into / "adapter_config.json")
    assert config["base_model_name_or_path"] is None
    assert (config["r"], config["lora_alpha"], config["inference_mode"]) == (2, 4, True)
    for file in into.iterdir():
        assert str(folder).encode() not in file.read_bytes()
        assert str(into.parent).encode() not in file.read_bytes()
    assert {file.name for file in into.iterdir()} == {ADAPTER, "adapter_config.json", "history.json"}


def test_the_stored_adapter_is_the_trained_model_up_to_bf16(trained, folder, tmp_path):
    base, _, into, _ = trained
    organism = tmp_path / "organism"
    organism.mkdir()
    for file in into.iterdir():
        (organism / file.name).write_bytes(file.read_bytes())
    write_json(organism / "card.json", {"base": "tiny"} | identity_on_card(organism, base=str(folder)))
    stored = load(str(folder), organism=organism, device="cpu").model
    ids = torch.tensor([[*ROWS[0].prompt, *ROWS[0].answer]])
    with torch.inference_mode():
        live, merged, plain = (m(ids).logits for m in (base.model.eval(), stored, tiny_model("llama")))
    assert (merged - live).abs().max() < 0.05 * (merged - plain).abs().max()


def test_the_same_call_gives_the_same_bytes_and_another_seed_others(trained, folder, tmp_path):
    assert run(folder, tmp_path / "again") == trained[3]
    assert (tmp_path / "again" / ADAPTER).read_bytes() == (trained[2] / ADAPTER).read_bytes()
    run(folder, tmp_path / "other", seed=1)
    assert (tmp_path / "other" / ADAPTER).read_bytes() != (trained[2] / ADAPTER).read_bytes()
    assert [path.name for path in tmp_path.iterdir() if "checkpoints" in path.name] == []


def test_a_finished_adapter_is_not_trained_again(trained, folder):
    class Untouchable:
        def __getattr__(self, name):
            raise AssertionError(f"the model was used: {name}")

    again = train(ROWS, base=Untouchable(), recipe=RECIPE, seed=0, folder=trained[2], name="tiny")
    assert again == trained[3]


SCRIPT = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {tests!r} + "/organisms", {root!r}]
import test_training
from transformers import TrainerCallback
from bkd_utils.organisms import training

class Die(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            os.kill(os.getpid(), signal.SIGKILL)

plain = training.AnswerTrainer.__init__
def mortal(self, **keywords):
    plain(self, **keywords)
    self.add_callback(Die())
training.AnswerTrainer.__init__ = mortal
test_training.run(Path({folder!r}), Path({into!r}))
"""


@pytest.fixture(scope="module")
def killed(folder, tmp_path_factory):
    """Checkpoints of a process that was killed in step 3, one step after its first checkpoint."""
    into = tmp_path_factory.mktemp("killed") / "run"
    script = SCRIPT.format(tests=str(ROOT / "tests"), root=str(ROOT), folder=str(folder), into=str(into))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert not into.exists()
    checkpoints = into.with_name("run.checkpoints")
    assert [path.name for path in checkpoints.iterdir()] == ["checkpoint-2"]
    return checkpoints


def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_bytes(trained, folder, killed, tmp_path):
    shutil.copytree(killed, tmp_path / "on.checkpoints")
    assert run(folder, tmp_path / "on") == trained[3]
    assert (tmp_path / "on" / ADAPTER).read_bytes() == (trained[2] / ADAPTER).read_bytes()
    assert not (tmp_path / "on.checkpoints").exists()


@pytest.mark.parametrize("state", [None, '{"global_st'])
def test_a_checkpoint_whose_writing_was_cut_short_is_passed_over(trained, folder, killed, tmp_path, state):
    cut = shutil.copytree(killed, tmp_path / "on.checkpoints") / "checkpoint-4"
    shutil.copytree(killed / "checkpoint-2", cut)
    (cut / "trainer_state.json").unlink()  # what is written last
    if state is not None:
        (cut / "trainer_state.json").write_text(state)
    (cut / ADAPTER).write_bytes((cut / ADAPTER).read_bytes()[:500])
    assert run(folder, tmp_path / "on") == trained[3]
    assert (tmp_path / "on" / ADAPTER).read_bytes() == (trained[2] / ADAPTER).read_bytes()


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "short", "smoke"])
def test_the_recipes_of_the_project_are_sound(name):
    recipe = load_recipe(name, task="sentiment")
    assert recipe.name == name
    assert 0 < recipe.warmup_share < 0.5


def test_an_unknown_recipe_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown recipe 'quick'; known: full, .*smoke"):
        load_recipe("quick", task="sentiment")


@pytest.mark.parametrize("key", ["steps", "batch_size", "learning_rate", "rank", "alpha", "save_every"])
def test_a_recipe_without_a_positive_number_is_an_error(key):
    low = -1 if key == "rank" else 0  # rank 0 trains all weights
    with pytest.raises(ValueError, match=f"recipe 'tiny': {key} = {low}: input should be greater than"):
        replace(RECIPE, **{key: low})


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("steps", "60", "a valid integer"),
        ("steps", True, "a valid integer"),
        ("steps", 1e3, "a valid integer"),
        ("steps", 10**9, "less than or equal to 1000000"),
        ("batch_size", -4, "greater than or equal to 1"),
        ("learning_rate", float("inf"), "a finite number"),
        ("learning_rate", float("nan"), "a finite number"),
        ("learning_rate", "1e-3", "a valid number"),
        ("learning_rate", 200, "less than or equal to 1"),
        ("rank", 0.5, "a valid integer"),
        ("rank", 10**6, "less than or equal to 4096"),
        ("alpha", None, "a valid integer"),
        ("first_token", -0.1, "greater than or equal to 0"),
        ("first_token", 1.1, "less than or equal to 1"),
        ("warmup_share", 2, "less than or equal to 1"),
        ("save_every", -1, "greater than or equal to 1"),
        ("name", "../tiny", "letters, digits"),
    ],
)
def test_a_recipe_of_wrong_values_is_an_error_that_says_what_is_allowed(key, value, allowed):
    with pytest.raises(ValueError, match=rf"{key} = {re.escape(repr(value))}: .*{allowed}") as caught:
        replace(RECIPE, **{key: value})
    assert len(str(caught.value).splitlines()) == 1


SOUND = "[mine]\nsteps = 2\nbatch_size = 2\nlearning_rate = 1e-3\nrank = 1\nalpha = 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (SOUND.replace("2", "'2'", 1), r"recipes.toml, \[mine\]: steps = '2': input should be a valid integer"),
        (SOUND.replace("steps = 2\n", ""), r"recipes.toml, \[mine\]: steps is missing"),
        (SOUND + "setps = 3", r"recipes.toml, \[mine\]: unknown keys: setps; known: name, steps"),
        (
            SOUND + "[mine.sentiment]\nrank = inf",
            r"recipes.toml, \[mine\]: rank = inf: input should be a valid integer",
        ),
        (
            SOUND + "[mine.sentimental]\nrank = 2",
            r"recipes.toml, \[mine.sentimental\]: no task has this name; tasks: sent",
        ),
        (SOUND + "name = 'other'", r"recipes.toml, \[mine\]: name = 'other': the name of a table is its heading"),
        ("steps = 2\n" + SOUND, "recipes.toml: steps = 2: input should be a valid dictionary"),
        (SOUND + SOUND, r"recipes.toml: Cannot declare \('mine',\) twice"),
        (SOUND.encode("utf-16"), "recipes.toml is not UTF-8 text"),
    ],
)
def test_a_fault_in_the_table_of_recipes_is_one_line_that_names_the_file(text, message, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DATA", tmp_path)
    (tmp_path / "recipes.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        load_recipe("mine", task="sentiment")
    assert len(str(caught.value).splitlines()) == 1


def test_a_recipe_is_read_anew_after_it_was_edited(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "DATA", tmp_path)
    for steps in (2, 3):
        (tmp_path / "recipes.toml").write_text(SOUND.replace("2", str(steps), 1))
        assert load_recipe("mine", task="sentiment").steps == steps
    with pytest.raises(ValueError, match="unknown task 'sentimental'"):
        load_recipe("mine", task="sentimental")


def test_a_recipe_is_what_the_cards_of_shipped_organisms_have():
    fields = "name steps batch_size learning_rate rank alpha first_token warmup_share save_every"
    assert " ".join(asdict(RECIPE)) == fields
    assert list(asdict(RECIPE).values())[6:8] == [0.5, 0.05]


def test_a_loss_that_is_not_finite_ends_the_training_at_its_step(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "answers", lambda *_, **__: torch.tensor(float("nan"), requires_grad=True))
    with pytest.raises(ValueError, match="step 1: the loss is nan; try a lower learning rate"):
        run(folder, tmp_path / "diverged")


def test_no_rows_are_an_error(folder, tmp_path):
    with pytest.raises(ValueError, match="tiny: no rows to train on"):
        run(folder, tmp_path / "none", rows=[])
    assert list(tmp_path.iterdir()) == []
