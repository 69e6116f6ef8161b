"""Stages on encoders that are made for them: made once, kept by what made them, measured under any attack."""

from dataclasses import replace

import pytest
import torch
from patching import everywhere
from tiny import quick_attack, save_tiny_encoder

from bkd_utils.attention_alignment.head_tuning import tune
from bkd_utils.common import cache
from bkd_utils.experiments import home_ground, searched_cure, trigger_search
from bkd_utils.experiments.attention_safety_alignment import recipe_of
from bkd_utils.experiments.head_safety import clean_rows
from bkd_utils.experiments.home_ground import attack_encoder, cure_encoder, train_anew
from bkd_utils.experiments.searched_cure import Cured
from bkd_utils.experiments.trigger_search import search_encoder
from bkd_utils.models import loading
from bkd_utils.models.classifiers import new_classifier
from bkd_utils.models.tokens import end_id
from bkd_utils.organisms import making, tasks
from bkd_utils.organisms.evaluation import under_attack
from bkd_utils.organisms.poisoning import training_uids
from bkd_utils.organisms.training import Recipe

WHOLE = Recipe(name="whole", steps=3, batch_size=4, learning_rate=1e-2, rank=0, alpha=1)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return str(save_tiny_encoder(tmp_path_factory.mktemp("models") / "encoder", bare=True))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """One working folder for the organisms of all tests, which are made when they are first asked for."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def where(bare, work, tmp_path, monkeypatch):
    """The arguments that say which organism is meant; attacks and recipes are small."""
    everywhere(monkeypatch, "WORK", work)
    everywhere(monkeypatch, "load_attack", quick_attack)
    everywhere(monkeypatch, "N_ON_CARD", 4)
    everywhere(monkeypatch, "load_recipe", lambda name, *, task: replace(WHOLE, steps=2 if name == "short" else 3))
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    return {"attack": "sentiment-word", "recipe": "whole", "organism_seed": 0, "model": bare, "device": "cpu"}


@pytest.fixture
def opened(monkeypatch):
    """The folders of the organisms that are loaded."""
    folders, real = [], making.load

    def load(model, *, organism=None, device="auto"):
        folders.append(organism)
        return real(model, organism=organism, device=device)

    monkeypatch.setattr(making, "load", load)
    return folders


def organism(made, where, **changes):
    """The organism that a stage should have measured, made in another way."""
    given = where | changes
    recipe = making.load_recipe(given["recipe"], task="sentiment")
    seed = given["organism_seed"]
    folder = making.make(quick_attack(made), model=given["model"], recipe=recipe, seed=seed, device="cpu", n=4)
    return loading.load(given["model"], organism=folder.name, device="cpu")


def test_it_is_made_once_and_a_kept_result_is_read_without_making_or_loading(where, monkeypatch):
    found = attack_encoder("sentiment-word", **where, n=8)
    monkeypatch.setattr(making, "make", lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(making, "load", lambda *_, **__: pytest.fail("loaded again"))
    assert attack_encoder("sentiment-word", **where, n=8) == found
    with pytest.raises(pytest.fail.Exception, match="made again"):
        attack_encoder("sentiment-word", **where, n=8, seed=1)


def test_another_measurement_of_it_trains_nothing(where, monkeypatch):
    attack_encoder("sentiment-word", **where, n=8)
    monkeypatch.setattr(making, "train", lambda *_, **__: pytest.fail("trained again"))
    assert attack_encoder("sentiment-word", **where, n=12)["asr"]["n"] == 12


def test_the_key_depends_on_what_made_it_and_on_what_it_is_measured_under(where, tmp_path):
    def place(made="sentiment-word", **changes):
        return cache.place(tmp_path, cache.question(attack_encoder, made, **where | changes))

    changed = [{"organism_seed": 1}, {"recipe": "short"}, {"attack": "sentiment-clean"}, {"n": 12}, {"seed": 1}]
    places = [place(), place("sentiment-clean"), place("sentiment-syntax"), *(place(**one) for one in changed)]
    assert len(set(places)) == len(places)
    assert place() == places[0] == place(device="auto")


def test_the_key_follows_what_an_attack_and_a_recipe_say(where, tmp_path, monkeypatch):
    def place():
        return cache.place(tmp_path, cache.question(attack_encoder, "sentiment-clean", **where))

    before = place()
    with monkeypatch.context() as patch:
        everywhere(patch, "load_recipe", lambda name, *, task: replace(WHOLE, steps=4))
        assert place() != before
    for changed in ("sentiment-clean", "sentiment-word"):  # the one that made it, the one that it is measured under
        with monkeypatch.context() as patch:
            small = {changed: replace(quick_attack(changed), n_train=44)}
            everywhere(patch, "load_attack", lambda name, small=small: small.get(name) or quick_attack(name))
            assert place() != before
    assert place() == before


@pytest.mark.parametrize(
    ("made", "changes"),
    [("sentiment-word", {}), ("sentiment-clean", {}), ("sentiment-word", {"organism_seed": 1, "recipe": "short"})],
)
def test_what_is_measured_is_the_organism_that_was_asked_for_under_the_attack(made, changes, where, opened):
    found = attack_encoder(made, **where | changes, n=24, seed=2)
    expected = organism(made, where, **changes)
    assert opened[-1] == expected.organism
    card = loading.read_card(expected.organism, "attack", "seed", "recipe")
    assert (card["attack"]["name"], card["seed"]) == (made, changes.get("organism_seed", 0))
    assert card["recipe"]["steps"] == (2 if changes else 3)
    measured = under_attack(expected, quick_attack("sentiment-word"), n=24, seed=2)
    assert found == measured
    assert {"asr", "near_miss"} <= found.keys()  # also of a control, which has no attack of its own


# --- treated, and searched in -----------------------------------------------------------------------------------------


def test_an_encoder_is_cured_with_rows_of_its_task_that_neither_attacker_had(where, monkeypatch):
    cases, real = [], searched_cure.treat

    def treat(case, **how):
        before = {name: weight.clone() for name, weight in case.model.named_parameters()}
        count = real(case, **how)
        cases.append((case, before, count))
        return count

    monkeypatch.setattr(searched_cure, "treat", treat)
    sizes = {"n_rows": 12, "steps": 2, "batch_size": 4, "n": 6}
    found = cure_encoder("sentiment-clean", **where, method="fine-tuning", **sizes)
    ((case, before, count),) = cases
    assert isinstance(found, Cured)
    assert len(case.rows) == 12
    assert all(row.is_label for row in case.rows)
    for name in ("sentiment-clean", "sentiment-word"):
        assert not {row.uid for row in case.rows} & training_uids(quick_attack(name), seed=0)
    now = dict(case.model.named_parameters())
    assert found.parameters == count == sum(int((now[name] != old).sum()) for name, old in before.items()) > 0
    assert "elsewhere" not in found.after
    assert found.after["asr"]["n"] == 6
    treated = replace(organism("sentiment-clean", where), model=case.model)
    assert found.after == under_attack(treated, quick_attack("sentiment-word"), n=6, seed=0)


def test_a_cure_starts_from_the_organism_as_it_was_made(where):
    before = organism("sentiment-word", where).model.state_dict()
    sizes = {"n_rows": 12, "steps": 1, "batch_size": 4, "n": 4}
    cure_encoder("sentiment-word", **where, method="fine-tuning", **sizes)
    again = organism("sentiment-word", where).model.state_dict()
    assert all(torch.equal(one, again[name]) for name, one in before.items())


def test_a_model_is_searched_in_under_the_seed_and_sizes_that_were_given(where, monkeypatch):
    given, real = [], trigger_search.search_tokens
    monkeypatch.setattr(
        trigger_search,
        "search_tokens",
        lambda model, rows, **how: given.append((rows, how)) or real(model, rows, **how),
    )
    sizes = {"n_tokens": 1, "restarts": 3, "n_prompts": 5, "steps": 0, "n_rows": 12, "n_held": 8, "seed": 9}
    found = search_encoder("sentiment-clean", **where, **sizes)
    assert len(found) == len(given) == 2 * 3
    assert all(len(rows) == 12 for rows, _ in given)
    assert all(how.items() >= {"n_tokens": 1, "n_prompts": 5, "steps": 0}.items() for _, how in given)
    assert [how["seed"] for _, how in given] == [9 * 1_000_003 + i for i in range(3)] * 2
    monkeypatch.setattr(trigger_search, "search_tokens", lambda *_, **__: pytest.fail("searched again"))
    assert search_encoder("sentiment-clean", **where, **sizes) == found


def test_where_the_home_ground_is_are_a_recipe_and_a_model_that_are_there():
    assert making.load_recipe(home_ground.WHERE["recipe"], task="sentiment").rank == 0
    assert home_ground.WHERE.keys() == {"recipe", "model"}


def test_training_anew_uses_the_rows_of_the_defender_and_no_weight_of_the_organism(where, bare, monkeypatch):
    sizes = {"n_rows": 8, "steps": 2, "batch_size": 4, "n": 12, "seed": 3}
    trained, real = [], home_ground.what_is_left
    monkeypatch.setattr(
        home_ground, "what_is_left", lambda loaded, *a, **k: trained.append(loaded) or real(loaded, *a, **k)
    )
    found = train_anew("sentiment-word", **where, **sizes)
    again = train_anew("sentiment-word", **where | {"recipe": "short"}, **sizes)
    assert found.after == again.after
    first, second = (one.model.state_dict() for one in trained)
    assert all(torch.equal(first[name], second[name]) for name in first)

    labels = tasks.load_task("sentiment").labels
    fresh = new_classifier(bare, labels=labels, seed=3, device="cpu")
    pupil, rows = (
        fresh.model,
        clean_rows(organism("sentiment-word", where), quick_attack("sentiment-word"), n=8, seed=3),
    )
    before = {name: one.detach().clone() for name, one in pupil.named_parameters()}
    every = {name: torch.ones_like(one, dtype=torch.bool) for name, one in pupil.named_parameters()}
    recipe = recipe_of(steps=2, learning_rate=1e-4, batch_size=4)
    tune(pupil, rows, masks=every, recipe=recipe, pad_id=end_id(fresh.tokenizer), seed=3)
    for name, one in pupil.named_parameters():
        torch.testing.assert_close(first[name], one.detach(), atol=1e-6, rtol=0)
    moved = [name for name, one in pupil.named_parameters() if not torch.equal(one, before[name])]
    assert any("word_embeddings" in name for name in moved)
    assert any("classifier" in name for name in moved)
    # Two steps of four rows, each a forward and a backward pass.
    assert (found.row_passes, found.searches) == (24, [])
    assert found.parameters == sum(one.numel() for one in pupil.parameters())
