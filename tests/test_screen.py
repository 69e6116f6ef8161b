"""Guards and the filter on real prompts and a tiny model: what is counted, and over what."""

import numpy as np
import pytest
from tiny import save_tiny

from bkd_utils import attacks, models, organisms, screen, tasks
from bkd_utils.attacks import load_attack
from bkd_utils.evaluation import flippable_sample

SIZES = {"n": 4, "n_reference": 6}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return models.load(str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama")), device="cpu")


@pytest.fixture
def stage(loaded, monkeypatch):
    monkeypatch.setattr(screen, "load", lambda *_, **__: loaded)
    return lambda name, attack, **sizes: getattr(screen, name).__wrapped__("tiny", attack=attack, **sizes)


def test_a_trigger_in_the_text_leaves_the_guard_the_text():
    spec = load_attack("sentiment-word")
    examples = flippable_sample(spec, n=3, seed=0)
    clean, triggered, turn = screen.texts_of(spec, examples, seed=0)
    assert clean == [example.text for example in examples]
    assert all(attacks.carries(spec, text) for text in triggered)
    assert turn(clean[0]) == tasks.load_task("sentiment").prompt(clean[0])


def test_a_trigger_around_the_turn_leaves_the_guard_the_turn():
    spec = load_attack("domain-wrapper")
    examples = flippable_sample(spec, n=2, seed=0)
    clean, triggered, turn = screen.texts_of(spec, examples, seed=0)
    assert clean == [tasks.load_task("domain").prompt(example.text) for example in examples]
    assert all(text in long for text, long in zip(clean, triggered, strict=True))
    assert turn("as it is") == "as it is"


@pytest.mark.parametrize(("attack", "guards"), [("sentiment-word", 3), ("instructions-prefix", 2)])
def test_every_guard_reports_what_it_catches_and_what_it_refuses(stage, attack, guards):
    found = stage("screened", attack, **SIZES)
    assert len(found) == guards
    for name, row in found.items():
        assert 0 <= row["auroc"] <= 1
        assert all(row[key]["n"] == 4 for key in ("caught", "refused", "asr"))
        assert row["asr"]["value"] <= 1 - row["caught"]["value"] + 1e-9
        assert ("asr cleaned" in row) == (name == "ONION")


def test_a_guard_that_sees_the_trigger_catches_it_and_stops_it(stage, monkeypatch):
    """With scores that know the trigger, everything is caught and nothing else refused."""
    spec = load_attack("sentiment-word")
    monkeypatch.setattr(
        screen, "strip", lambda loaded, texts, **_: np.array([float(attacks.carries(spec, text)) for text in texts])
    )
    row = stage("screened", "sentiment-word", **SIZES)["STRIP"]
    assert (row["auroc"], row["caught"]["value"], row["refused"]["value"], row["asr"]["value"]) == (1, 1, 0, 0)


def test_the_filter_counts_what_it_catches_and_what_it_loses(stage, monkeypatch):
    monkeypatch.setattr(
        organisms,
        "training_answers",
        lambda base, spec, seed: {row.uid: "Fine." for row in attacks.benign_examples(spec, seed=seed)},
    )
    seen = {}

    def first_half(hidden, labels, *, seed):
        seen["rows"] = len(hidden)
        flagged = np.zeros(len(labels), dtype=bool)
        flagged[: len(labels) // 2] = True
        return flagged

    monkeypatch.setattr(screen, "smaller_clusters", first_half)
    found = stage("filtered", "sentiment-word", n=40)
    assert seen["rows"] == 40
    poisoned = found["poisoned before"]["value"] * 40
    assert found["caught"]["n"] == poisoned > 0
    assert found["lost"]["n"] == 40 - poisoned
    left = found["poisoned after"]
    assert left["n"] == 20
    assert left["value"] * 20 == pytest.approx(poisoned * (1 - found["caught"]["value"]))
