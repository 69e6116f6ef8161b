"""Summaries of similarity on numbers made by hand; lengthened prompts on real text; one stage on a tiny model."""

import numpy as np
import pytest
from tiny import save_tiny

from bkd_utils import attacks, models, tasks
from bkd_utils.observe import (
    auroc,
    best_layer,
    best_reading,
    gap,
    halves,
    input_detection,
    input_scores,
    lengthened,
    observed,
    separates,
)
from bkd_utils.pairs import pairs
from bkd_utils.prompts import prompt_ids
from bkd_utils.similarity import head_similarity

N = 20


def made(triggered=0.0, *, layer=1, near=0.0, longer=0.0, seed=0, reading="last row"):
    """Noise of size 1 in three layers; versions differ from it in one of them by so much."""
    noise = np.random.default_rng(seed).standard_normal
    versions = {"clean": 0.0, "triggered": triggered, "near-miss": near, "same length": longer, "reference": 0.0}
    layers = {name: noise((N, 3)) for name in versions}
    for name, shift in versions.items():
        layers[name][:, layer] += shift
    return {"layers": {reading: {name: values.tolist() for name, values in layers.items()}}}


def test_the_gap_is_between_twins():
    found = {"layers": {"r": {"clean": [[1.0, 2.0], [3.0, 5.0]], "triggered": [[1.5, 2.0], [3.0, 4.0]]}}}
    assert gap(found, reading="r").tolist() == [[0.5, 0.0], [0.0, -1.0]]


def test_halves_are_disjoint_and_complete():
    choose, report = halves(7)
    assert sorted([*choose, *report]) == list(range(7))


def test_auroc_counts_pairs():
    found = made(1.0)
    rows = np.array([1, 3, 5])
    clean, triggered = (np.array(found["layers"]["last row"][name])[rows, 1] for name in ("clean", "triggered"))
    wins = np.mean([t > c for t in triggered for c in clean])
    assert auroc(found, reading="last row", layer=1, rows=rows) == pytest.approx(wins)
    assert auroc(found, reading="last row", layer=1, rows=rows, version="clean") == pytest.approx(0.5)


def test_layer_and_reading_are_chosen_where_the_signal_is_and_only_upwards():
    found = made(5.0, layer=2)
    assert best_layer(found, reading="last row") == (2, 1.0)
    assert best_layer(made(-5.0, layer=2), reading="last row")[0] != 2
    both = {"layers": made(0.0)["layers"] | made(5.0, reading="full map")["layers"]}
    assert best_reading([both, both]) == "full map"


def test_what_is_reported_was_not_chosen_on():
    found = {"organism": made(5.0, near=-5.0), "base model": made(0.0, seed=3)}
    result = separates(found, reading="last row")
    assert result["layer"] == 1
    assert result["organism"]["triggered"] == {"value": 1.0, "n": N // 2, "low": 1.0, "high": 1.0}
    assert result["organism"]["near-miss"]["value"] == 0.0
    base = result["base model"]["triggered"]
    assert base["low"] <= base["value"] <= base["high"]
    assert 0.1 < base["value"] < 0.9
    report = halves(N)[1]
    for row in report:  # swap sides on the reporting half only: the layer stays, the number turns round
        lines = found["organism"]["layers"]["last row"]
        lines["clean"][row], lines["triggered"][row] = lines["triggered"][row], lines["clean"][row]
    turned = separates(found, reading="last row")
    assert (turned["layer"], turned["organism"]["triggered"]["value"]) == (1, 0.0)


def test_inputs_are_flagged_by_their_most_unusual_layer():
    found = made(8.0)
    assert input_scores(found, reading="last row", version="triggered").min() > 3
    result = input_detection(found, reading="last row")
    assert result["auroc"] > 0.99
    assert result["caught at 5%"] == 1.0
    assert result["refused at 1%"] <= result["refused at 5%"] < 0.5
    order = np.random.default_rng(0).permutation(N)
    shuffled = {
        "layers": {"last row": {k: np.array(v)[order].tolist() for k, v in found["layers"]["last row"].items()}}
    }
    expected = input_scores(found, reading="last row", version="triggered")[order]
    assert input_scores(shuffled, reading="last row", version="triggered") == pytest.approx(expected)


# --- real text, tiny model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama"))


def test_lengthened_prompts_are_as_long_as_asked_and_start_as_before(folder):
    loaded = models.load(folder, device="cpu")
    spec = attacks.load_attack("sentiment-sentence")
    shown = pairs(loaded.tokenizer, spec, split="test", n=6, seed=0)
    texts = [example.text for example in shown.examples]
    lengths = [len(ids) for ids in shown.triggered]
    found = lengthened(loaded.tokenizer, spec, texts, lengths=lengths)
    for text, ids, length in zip(texts, found, lengths, strict=True):
        assert length <= len(ids) <= length + 6  # the last word may have several tokens
        plain = prompt_ids(loaded.tokenizer, tasks.load_task(spec.task).prompt(text))
        assert ids != plain
        assert len(ids) > len(plain)
    same = lengthened(loaded.tokenizer, spec, texts, lengths=[0] * 6)
    assert same == shown.clean


def test_observed_keeps_means_over_heads(folder):
    where = {"attack": "sentiment-word", "model": folder, "device": "cpu", "n": 4}
    found = observed(None, readings=["last row", "head outputs"], n_reference=5, **where)
    assert set(found["layers"]) == {"last row", "head outputs"}
    for name in found["layers"]:
        assert set(found["layers"][name]) == {"clean", "triggered", "near-miss", "same length", "reference"}
        assert len(found["layers"][name]["reference"]) == 5
    loaded = models.load(folder, device="cpu")
    shown = pairs(loaded.tokenizer, attacks.load_attack("sentiment-word"), split="test", n=4, seed=0)
    expected = head_similarity(loaded.model, shown.triggered, readings=["last row"])["last row"].mean(2)
    assert np.array(found["layers"]["last row"]["triggered"]) == pytest.approx(expected.numpy(), abs=1e-5)
