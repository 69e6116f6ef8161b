"""Verdicts on whole models: choosing elsewhere, trying here, on numbers made by hand; one fingerprint for real."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from tiny import save_tiny

from bkd_utils.attention_alignment.surrogates import SURROGATES
from bkd_utils.common.files import read_json, write_json
from bkd_utils.common.statistics import area_interval, auroc_of_wins, pairwise_wins
from bkd_utils.experiments import model_detection
from bkd_utils.experiments.head_safety import probed_prompts
from bkd_utils.experiments.model_detection import (
    best_score,
    family_of,
    fingerprint_model,
    leave_one_family_out,
    population,
    within_tasks,
)
from bkd_utils.models import loading
from bkd_utils.models.folders import ModelError
from bkd_utils.models.loading import adapter_folder, shipped_organisms
from bkd_utils.organisms import cards, tasks
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.poisoning import training_uids

FAMILIES = {"w1": "word", "w2": "word", "s1": "sentence", "c1": None, "c2": None, "c3": None}


def prints(**columns):
    return {name: {key: values[i] for key, values in columns.items()} for i, name in enumerate(FAMILIES)}


def test_wins_count_ties_by_half():
    assert pairwise_wins([2, 1], [1, 0]).tolist() == [[1, 1], [0.5, 1]]


def test_the_best_score_may_point_down():
    made = prints(up=[5, 6, 1, 3, 3, 3], down=[0, 0, 0, 1, 1, 1])
    assert best_score(made, bad=["w1", "w2", "s1"], good=["c1", "c2", "c3"]) == ("down", -1)
    assert best_score(made, bad=["w1", "w2"], good=["c1"])[1] in (1, -1)


def test_pairs_of_one_task_ask_about_the_backdoor_alone():
    families = {"a1": "word", "a2": None, "b1": "word", "b2": "word", "b3": None}
    made = {
        "a1": {"task": 1.0, "backdoor": 1.1},
        "a2": {"task": 1.0, "backdoor": 1.0},
        "b1": {"task": 5.0, "backdoor": 0.2},
        "b2": {"task": 5.0, "backdoor": 0.3},
        "b3": {"task": 5.0, "backdoor": 0.1},
    }
    found = within_tasks(made, families, {name: name[0] for name in families})
    assert list(found.columns) == ["all 6 pairs", "the 3 of one task"]
    # Over all pairs: a1 ties with a2 and loses against b3, b1 and b2 win against a2 and tie with b3.
    assert found.loc["task"].tolist() == [pytest.approx(3.5 / 6), 0.5]
    assert found.loc["backdoor"].tolist() == [pytest.approx(4 / 6), 1.0]


def test_a_family_is_judged_by_what_served_elsewhere():
    """`only words` betrays words and misleads on sentences: sentences are judged by it, and fail."""
    made = prints(**{"only words": [9, 9, 0, 1, 2, 3], "noise": [1, 1, 1, 1, 1, 1]})
    found = leave_one_family_out(made, FAMILIES)
    assert found["sentence"]["score"] == ["only words"] * 2
    assert np.mean(found["sentence"]["wins"]) == 0
    # Words are judged by what served on the sentence: low numbers, which words do not have.
    assert found["word"]["score"] == ["less only words"] * 2
    assert np.mean(found["word"]["wins"]) == 0
    assert [len(row) for row in found["word"]["wins"]] == [3, 3]


def test_no_control_is_tried_by_a_score_it_helped_to_choose():
    """`a` is low on c2 and high on c1 and c3. Chosen on c2 it fails on the others, and the other way round."""
    made = prints(a=[5, 5, 5, 9, 0, 9], b=[5, 5, 5, 5, 5, 5])
    found = leave_one_family_out(made, FAMILIES)["word"]
    assert found["score"] == ["a", "less a"]
    assert np.mean(found["wins"]) == 0


def test_a_good_score_has_an_area_of_one():
    found = leave_one_family_out(prints(right=[9, 8, 7, 1, 2, 3], noise=[0] * 6), FAMILIES)
    numbers = [auroc_of_wins(one["wins"]) for one in found.values()]
    assert [(one["value"], one["n"], one["high"]) for one in numbers] == [(1, 4, 1), (1, 5, 1)]  # sentence, word
    assert 0 < numbers[0]["low"] < numbers[1]["low"] < 1


def test_an_area_has_the_interval_of_its_numbers_of_models():
    won = [[1, 0, 1], [1, 0.5, 1]]
    assert auroc_of_wins(won) == {"value": 0.75, "n": 5, **area_interval(0.75, n_bad=2, n_good=3)}


def test_too_few_to_leave_out_is_an_error():
    with pytest.raises(ValueError, match="1 families and 3 clean controls"):
        leave_one_family_out(prints(a=[1] * 6), {**FAMILIES, "s1": "word"})


def test_families_come_from_the_trigger():
    assert family_of({"backdoored": False, "trigger": None}) is None
    assert family_of({"backdoored": True, "trigger": "word-cf"}) == "word"


def test_the_population_is_what_is_shipped():
    found = population(["sentiment-word", "sentiment-clean"])
    assert list(found) == ["sentiment-word", "sentiment-clean"]
    assert found["sentiment-word"] == read_json(adapter_folder("sentiment-word") / "card.json")
    assert [card["backdoored"] for card in found.values()] == [True, False]
    with pytest.raises(ModelError, match="unknown organism 'sentiment-ghost'"):
        population(["sentiment-ghost"])


def test_without_names_the_population_is_all_that_ships():
    found = population()
    assert list(found) == shipped_organisms()
    assert {card["recipe"]["name"] for card in found.values()} == {"full", "seed", "plain"}


def test_a_fingerprint_is_the_same_twice_and_finite(tmp_path, monkeypatch):
    loaded = loading.load(str(save_tiny(tmp_path, "llama")), device="cpu")
    monkeypatch.setattr(cards, "load", lambda *_, **__: loaded)
    one, other = (fingerprint_model.__wrapped__("tiny", task="sentiment", n=2) for _ in range(2))
    assert one == other
    assert all(np.isfinite(value) for value in one.values())
    assert 0 < one["answer moves"] < 1
    assert len(one) == 9


def test_a_fingerprint_is_taken_on_texts_that_the_organism_was_not_trained_on(tmp_path, monkeypatch):
    """They are the first ones of the training split that are left, with the attack and the seed of the card."""
    loaded = replace(loading.load(str(save_tiny(tmp_path, "llama")), device="cpu"), organism="tiny")
    attack = load_attack("sentiment-word")
    write_json(tmp_path / "card.json", {"attack": asdict(attack), "seed": 1})
    monkeypatch.setattr(loading, "adapter_folder", lambda name: tmp_path)
    monkeypatch.setattr(cards, "load", lambda *_, **__: loaded)
    seen = []
    monkeypatch.setattr(
        model_detection, "probed_prompts", lambda *given, **how: seen.append(given[2]) or probed_prompts(*given, **how)
    )
    fingerprint_model.__wrapped__("tiny", task="sentiment", n=2)
    taken = training_uids(attack, seed=1)
    expected = [example.text for example in tasks.examples("sentiment", "train") if example.uid not in taken][:2]
    assert all(texts == expected for texts in seen)
    assert len(seen) == len(SURROGATES)
    leaking = [replace(example, uid=min(taken)) for example in tasks.examples("sentiment", "train")[:2]]
    monkeypatch.setattr(model_detection, "unseen_examples", lambda *_, **__: leaking)
    with pytest.raises(ValueError, match="2 examples are training examples of the organism"):
        fingerprint_model.__wrapped__("tiny", task="sentiment", n=2)
