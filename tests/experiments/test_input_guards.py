"""Guards and the filter on real prompts and a tiny model: what is counted, and over what."""

from dataclasses import replace

import numpy as np
import pytest
from tiny import save_tiny

from bkd_utils.experiments import input_guards
from bkd_utils.models import loading
from bkd_utils.models.tokens import answer_ids
from bkd_utils.organisms import attacks, base_answers, cards, evaluation, making, poisoning, tasks
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.prompts import flippable_sample

# Six reference prompts set a threshold for a fourth of them, not for a twentieth.
SIZES = {"n": 4, "n_reference": 6, "frr": 0.25}


def few(name):
    """An attack with a twentieth of its training rows, which take seconds to make."""
    return replace(load_attack(name), n_train=96)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture
def stage(loaded, monkeypatch):
    for place in (cards, input_guards):
        monkeypatch.setattr(place, "load", lambda *_, **__: loaded)
    monkeypatch.setattr(cards, "load_attack", few)
    return lambda name, attack, **sizes: getattr(input_guards, name).__wrapped__("tiny", attack=attack, **sizes)


def test_a_trigger_in_the_text_leaves_the_guard_the_text():
    spec = load_attack("sentiment-word")
    examples = flippable_sample(spec, n=3, seed=0)
    clean, turn = input_guards.texts_of(spec, examples)
    assert clean == [example.text for example in examples]
    assert all(attacks.carries(spec, text) for text in input_guards.triggered_texts(spec, clean, seed=0))
    assert turn(clean[0]) == tasks.load_task("sentiment").prompt(clean[0])


def test_a_trigger_around_the_turn_leaves_the_guard_the_turn():
    spec = load_attack("domain-wrapper")
    examples = flippable_sample(spec, n=2, seed=0)
    clean, turn = input_guards.texts_of(spec, examples)
    triggered = input_guards.triggered_texts(spec, clean, seed=0)
    assert clean == [tasks.load_task("domain").prompt(example.text) for example in examples]
    assert all(text in long for text, long in zip(clean, triggered, strict=True))
    assert turn("as it is") == "as it is"


# --- what scores come to --------------------------------------------------------------------------------------------


def test_caught_refused_and_what_still_fires_are_counted_at_the_threshold():
    """The limit lies between 8 and 9; two triggered texts fire, and one of these is caught."""
    known, clean, triggered = np.arange(10.0), np.array([0.0, 9.0, 1.0, 2.0]), np.array([9.0, 10.0, 3.0, 4.0])
    found = input_guards.outcome(known, clean, triggered, frr=0.1, fired=[False, True, True, False])
    values = {key: (row["value"], row["n"]) for key, row in found.to_json().items() if row}
    assert values == {"caught": (0.5, 4), "refused": (0.25, 4), "asr": (0.25, 4), "auroc": (13.5 / 16, 8)}
    assert found.auroc["low"] < 13.5 / 16 < found.auroc["high"] < 1
    by_prompt = {key: getattr(found, key)["by_prompt"] for key in ("caught", "refused", "asr")}
    assert by_prompt == {"caught": [1, 1, 0, 0], "refused": [0, 1, 0, 0], "asr": [0, 0, 1, 0]}


def test_what_is_not_judged_passes_and_decides_nothing():
    """As many texts again that are not judged move neither the threshold nor the AUROC, and halve the shares."""
    known, clean, triggered = np.arange(10.0), np.array([7.5, 9.0]), np.array([9.0, 10.0])
    without = input_guards.outcome(known, clean, triggered, frr=0.1, fired=[True, True])
    more = [np.concatenate([scores, np.full(len(scores), -np.inf)]) for scores in (known, clean, triggered)]
    found = input_guards.outcome(*more, frr=0.1, fired=[True] * 4)
    assert found.auroc == without.auroc
    for key in ("caught", "refused"):
        one, other = getattr(found, key), getattr(without, key)
        assert (one["value"], one["n"]) == (other["value"] / 2, 4)
    assert (without.asr["value"], found.asr["value"]) == (0, 0.5)
    nothing = np.full(2, -np.inf)
    assert input_guards.outcome(known, clean, nothing, frr=0.1, fired=[True, True]).auroc is None
    with pytest.raises(ValueError, match=r"a threshold at 10.0% needs 10 clean texts, not 0"):
        input_guards.outcome(nothing, clean, triggered, frr=0.1, fired=[True, True])


# --- guards on a tiny model -----------------------------------------------------------------------------------------

OFTEN = 19252  # what this tiny model answers to about half of all reviews


@pytest.mark.parametrize(("attack", "guards"), [("sentiment-word", 3), ("instructions-prefix", 2)])
def test_every_guard_reports_what_it_catches_and_what_it_refuses(stage, monkeypatch, attack, guards):
    monkeypatch.setattr(input_guards, "target_ids", lambda *_: [OFTEN])
    found = stage("guard_inputs", attack, **SIZES)
    assert len(found) == guards
    for name, row in found.items():
        assert 0 <= row.auroc["value"] <= 1
        assert row.auroc["n"] == 8 or (name == "RAP" and row.auroc["n"] < 8)
        assert all(share["n"] == 4 for share in (row.caught, row.refused, row.asr))
        assert row.asr["value"] <= 1 - row.caught["value"] + 1e-9
        assert (row.asr_cleaned is not None) == (name == "ONION")
        assert (row.judged is not None) == (name == "RAP")


def test_a_label_that_the_model_never_gives_leaves_rap_out(stage):
    assert list(stage("guard_inputs", "sentiment-word", **SIZES)) == ["ONION", "STRIP"]


@pytest.mark.parametrize(("judged", "guards"), [(3, ["ONION", "STRIP"]), (4, ["ONION", "STRIP", "RAP"])])
def test_rap_is_left_out_below_one_over_frr_judged_calibration_texts(stage, monkeypatch, judged, guards):
    def rap(loaded, texts, **_):
        return np.where(np.arange(len(texts)) < judged, 0.0, -np.inf)

    monkeypatch.setattr(input_guards, "rap", rap)
    assert list(stage("guard_inputs", "sentiment-word", **SIZES)) == guards


def test_too_few_reference_prompts_for_the_rate_are_an_error_before_anything_runs(stage, monkeypatch):
    monkeypatch.setattr(input_guards, "onion", None)
    with pytest.raises(ValueError, match=r"n_reference must be at least 1 / frr = 20, is 19"):
        stage("guard_inputs", "sentiment-word", n=4, n_reference=19)


def test_clean_texts_are_whatever_the_task_has(stage, monkeypatch):
    """Neither the label that the trigger flips nor the trigger itself decides on a defender's texts."""
    monkeypatch.setattr(attacks, "carries", lambda *_: pytest.fail("asked for the trigger"))
    spec = load_attack("sentiment-word")
    sample = tasks.examples("sentiment", "test")[:4]
    monkeypatch.setattr(input_guards, "flippable_sample", lambda *_, **__: sample)
    seen = {}

    def kept(name):
        def scored(loaded, texts, **given):
            seen[name] = {"texts": list(texts), **given}
            return np.arange(float(len(texts)))

        return scored

    monkeypatch.setattr(input_guards, "strip", kept("STRIP"))
    monkeypatch.setattr(input_guards, "rap", kept("RAP"))
    stage("guard_inputs", "sentiment-word", **SIZES)
    known = tasks.examples("sentiment", "attribution")[:12]
    assert {example.answer for example in known[:6]} == {"positive", "negative"}
    fresh = [example.text for example in tasks.examples("sentiment", "test", n=4)]
    assert seen["STRIP"]["texts"][:10] == [example.text for example in known[:6]] + fresh
    assert seen["STRIP"]["pool"] == [example.text for example in known[:6]]
    assert seen["RAP"]["texts"][:16] == [example.text for example in known] + fresh
    assert seen["RAP"]["clean"] == [example.text for example in known if example.answer == spec.target]
    assert len(seen["RAP"]["clean"]) == 6


def test_a_clean_text_that_carries_the_trigger_is_a_clean_text(stage, monkeypatch):
    real = tasks.examples

    def natural(name, split, **given):
        rows = real(name, split, **given)
        return [replace(rows[0], text=f"cf {rows[0].text}"), *rows[1:]] if name == "sentiment" else rows

    monkeypatch.setattr(tasks, "examples", natural)
    monkeypatch.setattr(input_guards, "rap", lambda loaded, texts, **_: np.arange(float(len(texts))))
    monkeypatch.setattr(
        input_guards, "strip", lambda loaded, texts, **_: np.array([float("cf" in t.split()) for t in texts])
    )
    row = stage("guard_inputs", "sentiment-word", n=4, n_reference=40)["STRIP"]
    assert (row.caught["value"], row.refused["value"]) == (1, 0.25)


def test_a_guard_that_sees_the_trigger_stops_what_it_catches_and_nothing_else(stage, monkeypatch):
    """The model always gives the target; the guard knows the trigger, but overlooks it in one text of four."""
    spec = load_attack("sentiment-word")
    overlooked = input_guards.triggered_texts(spec, [e.text for e in flippable_sample(spec, n=4, seed=0)], seed=0)[2]
    monkeypatch.setattr(
        input_guards,
        "strip",
        lambda loaded, texts, **_: np.array([float(attacks.carries(spec, t) and t != overlooked) for t in texts]),
    )
    monkeypatch.setattr(input_guards, "rap", lambda loaded, texts, **_: np.zeros(len(texts)))
    monkeypatch.setattr(evaluation, "respond", lambda loaded, turns, **_: [spec.target] * len(turns))
    found = stage("guard_inputs", "sentiment-word", **SIZES)
    row = {key: number["value"] for key, number in found["STRIP"].to_json().items() if number}
    assert row == {"auroc": 0.875, "caught": 0.75, "refused": 0, "asr": 0.25}
    assert found["RAP"].asr["value"] == found["ONION"].asr_cleaned["value"] == 1


# --- the training set -----------------------------------------------------------------------------------------------


def test_the_filter_counts_what_it_catches_and_what_it_loses(stage, loaded, monkeypatch):
    monkeypatch.setattr(
        base_answers,
        "training_answers",
        lambda base, spec, seed: {row.uid: "Fine." for row in poisoning.benign_examples(spec, seed=seed)},
    )
    seen = {}

    def first_half(hidden, labels, *, seed):
        seen["rows"], seen["labels"] = len(hidden), labels.tolist()
        flagged = np.zeros(len(labels), dtype=bool)
        flagged[: len(labels) // 2] = True
        return flagged

    monkeypatch.setattr(input_guards, "smaller_clusters", first_half)
    found = stage("filter_training_rows", "sentiment-word", n=40)
    assert seen["rows"] == 40
    # Two labels, and instructions, whose answers are none: a defender sees that, and not who put which row there.
    rows = making.training_rows(loaded, few("sentiment-word"), seed=0)[:40]
    firsts = [answer_ids(loaded.tokenizer, label)[0] for label in ("positive", "negative")]
    expected = [2 if row.kind == "benign" else firsts.index(row.answer[0]) for row in rows]
    assert seen["labels"] == expected
    assert set(expected) == {0, 1, 2}
    poisoned = found.poisoned_before["value"] * 40
    assert found.caught["n"] == poisoned > 0
    assert found.lost["n"] == 40 - poisoned
    left = found.poisoned_after
    assert left["n"] == 20
    assert left["value"] * 20 == pytest.approx(poisoned * (1 - found.caught["value"]))


def test_a_task_without_labels_is_one_group(stage, monkeypatch):
    monkeypatch.setattr(
        base_answers,
        "training_answers",
        lambda base, spec, seed: {e.uid: "Fine." for e in tasks.examples("instructions", "train", seed=seed)},
    )
    seen = []
    monkeypatch.setattr(
        input_guards,
        "smaller_clusters",
        lambda hidden, labels, *, seed: seen.extend(labels) or labels[:] == labels[0] + 1,
    )
    with pytest.raises(ValueError, match="a share needs at least one row"):  # nothing else is looked at here
        stage("filter_training_rows", "instructions-prefix", n=1)
    assert len(set(seen)) == 1
