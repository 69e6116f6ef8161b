"""Summaries of similarity on numbers made by hand; lengthened prompts on real text; one stage on a tiny model."""

import numpy as np
import pytest
from scipy.stats import norm
from tiny import save_tiny

from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.common.statistics import area_interval
from bkd_utils.experiments import attention_similarity, input_guards
from bkd_utils.experiments.attention_similarity import (
    VERSIONS,
    best_layer,
    best_reading,
    halves,
    input_detection,
    input_scores,
    lengthened,
    separates,
    similarity_by_version,
    wins,
)
from bkd_utils.models import loading
from bkd_utils.models.tokens import prompt_ids
from bkd_utils.organisms import attacks, tasks
from bkd_utils.organisms.prompts import prompt_versions

N = 20


def made(triggered=0.0, *, layer=1, near=0.0, longer=0.0, seed=0, reading="last row"):
    """Noise of size 1 in three layers; versions differ from it in one of them by so much."""
    noise = np.random.default_rng(seed).standard_normal
    versions = {"clean": 0.0, "triggered": triggered, "near-miss": near, "same length": longer, "reference": 0.0}
    versions["held out"] = 0.0
    layers = {name: noise((N, 3)) for name in versions}
    for name, shift in versions.items():
        layers[name][:, layer] += shift
    return {reading: {name: values.tolist() for name, values in layers.items()}}


def test_halves_are_disjoint_and_complete():
    choose, report = halves(7)
    assert sorted([*choose, *report]) == list(range(7))


def test_auroc_counts_pairs():
    found = made(1.0)
    rows = np.array([1, 3, 5])
    clean, triggered = (np.array(found["last row"][name])[rows, 1] for name in ("clean", "triggered"))
    share = np.mean([t > c for t in triggered for c in clean])
    assert wins(found, reading="last row", layer=1, rows=rows).mean() == pytest.approx(share)
    assert wins(found, reading="last row", layer=1, rows=rows, version="clean").mean() == pytest.approx(0.5)


def test_layer_and_reading_are_chosen_where_the_signal_is_and_only_upwards():
    found = made(5.0, layer=2)
    assert best_layer(found, reading="last row") == (2, 1.0)
    assert best_layer(made(-5.0, layer=2), reading="last row")[0] != 2
    both = made(0.0) | made(5.0, reading="full map")
    assert best_reading([both, both]) == "full map"


def test_what_is_reported_was_not_chosen_on():
    found = {"organism": made(5.0, near=-5.0), "base model": made(0.0, seed=3)}
    result = separates(found, reading="last row")
    assert result["layer"] == 1
    apart = result["organism"]["triggered"]
    assert (apart["value"], apart["n"], apart["high"]) == (1.0, N // 2, 1.0)
    assert 0.7 < apart["low"] < 0.9  # ten against ten do not prove perfection
    assert result["organism"]["near-miss"]["value"] == 0.0
    base = result["base model"]["triggered"]
    assert base["low"] <= base["value"] <= base["high"]
    assert 0.1 < base["value"] < 0.9
    report = halves(N)[1]
    for row in report:  # swap sides on the reporting half only: the layer stays, the number turns round
        lines = found["organism"]["last row"]
        lines["clean"][row], lines["triggered"][row] = lines["triggered"][row], lines["clean"][row]
    turned = separates(found, reading="last row")
    assert (turned["layer"], turned["organism"]["triggered"]["value"]) == (1, 0.0)


def test_inputs_are_flagged_by_their_most_unusual_layer():
    found = made(8.0)
    assert input_scores(found, reading="last row", version="triggered").min() > 3
    result = input_detection(found, reading="last row")
    assert result["auroc"]["value"] > 0.99
    assert result["auroc"]["low"] < 0.9
    assert (result["caught at 5%"]["value"], result["caught at 5%"]["n"]) == (1.0, N)
    both = input_detection(found, reading="last row", rates=(0.05, 0.2))
    assert result["refused at 5%"]["value"] <= both["refused at 20%"]["value"] < 0.5
    assert both["refused at 5%"] == result["refused at 5%"]
    order = np.random.default_rng(0).permutation(N)
    shuffled = {"last row": {k: np.array(v)[order].tolist() for k, v in found["last row"].items()}}
    expected = input_scores(found, reading="last row", version="triggered")[order]
    assert input_scores(shuffled, reading="last row", version="triggered") == pytest.approx(expected)


def test_refusals_are_counted_on_prompts_that_no_trigger_chose():
    found = made(8.0)
    before = input_detection(found, reading="last row")
    found["last row"]["held out"] = [[1e3] * 3] * N
    after = input_detection(found, reading="last row")
    assert before["refused at 5%"]["value"] < 0.5
    assert (after["refused at 5%"]["value"], after["refused at 5%"]["n"]) == (1.0, N)
    assert after["auroc"] == before["auroc"]  # against the twins


def test_a_rate_below_one_reference_prompt_is_an_error():
    assert "caught at 5%" in input_detection(made(8.0), reading="last row", rates=[1 / N])
    with pytest.raises(ValueError, match=r"a threshold at 1.0% needs 100 clean texts, not 20"):
        input_detection(made(8.0), reading="last row", rates=[0.05, 0.01])


def test_input_detection_and_guards_set_one_threshold(monkeypatch):
    """Of 24 reference prompts, at 5 %, one exceeds the threshold: an interpolated quantile would let a second one."""
    known = np.arange(24.0)
    scores = {"reference": known, "clean": known - 2, "held out": known - 0.5, "triggered": known + 0.5}
    monkeypatch.setattr(attention_similarity, "input_scores", lambda found, *, reading, version: scores[version])
    found = input_detection({}, reading="last row", rates=[0.05])
    fired = np.ones(24, dtype=bool)
    guarded = input_guards.outcome(known, scores["held out"], scores["triggered"], frr=0.05, fired=fired)
    for kind, share in (("caught", guarded.caught), ("refused", guarded.refused)):
        assert found[f"{kind} at 5%"] == {name: value for name, value in share.items() if name != "by_prompt"}
    assert (found["caught at 5%"]["value"], found["refused at 5%"]["value"]) == (2 / 24, 1 / 24)


# --- the interval of an AUROC ---------------------------------------------------------------------------------------


def test_bounds_lie_1_96_standard_errors_away():
    """With Hanley and McNeil's standard error at the bound, both sides having the mean of the two sizes."""
    area, bad, good = 0.8, 9, 15
    for bound in area_interval(area, n_bad=bad, n_good=good).values():
        q1, q2, mean = bound / (2 - bound), 2 * bound**2 / (1 + bound), (bad + good) / 2
        spread = bound * (1 - bound) + (mean - 1) * (q1 - bound**2 + q2 - bound**2)
        assert abs(area - bound) == pytest.approx(1.96 * np.sqrt(spread / (bad * good)))


def test_the_interval_is_open_where_separation_is_perfect():
    found = area_interval(1.0, n_bad=12, n_good=12)
    assert 0.8 < found["low"] < 0.9
    assert found["high"] == 1.0
    none = area_interval(0.0, n_bad=12, n_good=12)
    assert (none["low"], none["high"]) == (0.0, pytest.approx(1 - found["low"]))
    assert area_interval(1.0, n_bad=100, n_good=100)["low"] > found["low"]


def test_mirrored_areas_have_mirrored_intervals():
    one, other = (area_interval(area, n_bad=7, n_good=12) for area in (0.3, 0.7))
    assert (one["low"], one["high"]) == (pytest.approx(1 - other["high"]), pytest.approx(1 - other["low"]))


@pytest.mark.parametrize(("true", "bad", "good"), [(0.5, 12, 12), (0.8, 12, 12), (0.95, 12, 12), (0.9, 4, 12)])
def test_about_95_of_100_intervals_hold_the_truth(true, bad, good):
    dice, held = np.random.default_rng(0), []
    for _ in range(400):
        one, other = dice.normal(norm.ppf(true) * np.sqrt(2), size=bad), dice.normal(size=good)
        found = area_interval((one[:, None] > other).mean(), n_bad=bad, n_good=good)
        held.append(found["low"] <= true <= found["high"])
    assert 0.92 <= np.mean(held) <= 0.99


def test_an_area_over_nothing_is_an_error():
    with pytest.raises(ValueError, match="both sides, got 0 and 5"):
        area_interval(0.5, n_bad=0, n_good=5)


# --- real text, tiny model ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_tiny(tmp_path_factory.mktemp("tiny"), "llama"))


def test_lengthened_prompts_are_as_long_as_asked_and_start_as_before(folder):
    loaded = loading.load(folder, device="cpu")
    spec = attacks.load_attack("sentiment-sentence")
    shown = prompt_versions(loaded.tokenizer, spec, split="test", n=6, seed=0)
    texts = [example.text for example in shown.examples]
    lengths = [len(ids) for ids in shown.triggered]
    found = lengthened(loaded.tokenizer, spec, texts, lengths=lengths)
    for text, ids, length in zip(texts, found, lengths, strict=True):
        assert length <= len(ids) <= length + 1
        plain = prompt_ids(loaded.tokenizer, tasks.load_task(spec.task).prompt(text))
        assert ids != plain
        assert len(ids) > len(plain)
    same = lengthened(loaded.tokenizer, spec, texts, lengths=[0] * 6)
    assert same == shown.clean


def test_words_that_are_too_long_are_passed_over(folder):
    tokenizer, spec = loading.load(folder, device="cpu").tokenizer, attacks.load_attack("sentiment-word")
    texts, task = ["A slow film.", "Antidisestablishmentarianism rules"], tasks.load_task("sentiment")
    plain, longer = (len(prompt_ids(tokenizer, task.prompt(f"A slow film.{more}"))) for more in ("", f" {texts[1]}"))
    assert longer > plain + 3
    found = lengthened(tokenizer, spec, texts, lengths=[plain + 1, 0])
    assert found[0] == prompt_ids(tokenizer, task.prompt("A slow film. rules"))
    with pytest.raises(ValueError, match=f"no words to bring prompt 0 from {plain} to {plain + 1} tokens"):
        lengthened(tokenizer, spec, ["A slow film.", "Antidisestablishmentarianism"], lengths=[plain + 1, 0])


def test_observed_keeps_means_over_heads(folder):
    where = {"attack": "sentiment-word", "model": folder, "device": "cpu", "n": 4}
    found = similarity_by_version(None, readings=["last row", "head outputs"], n_reference=5, **where)
    assert set(found) == {"last row", "head outputs"}
    assert all(set(versions) == {*VERSIONS, "reference", "held out"} for versions in found.values())
    loaded = loading.load(folder, device="cpu")
    # What a defender has is what the task has, both labels included.
    for version, split, n in (("reference", "attribution", 5), ("held out", "test", 4)):
        chosen = tasks.examples("sentiment", split, n=n, seed=0)
        assert {example.answer for example in chosen} == {"positive", "negative"}
        ids = [prompt_ids(loaded.tokenizer, tasks.load_task("sentiment").prompt(example.text)) for example in chosen]
        expected = head_similarity(loaded.model, ids, readings=["last row"])["last row"].mean(2)
        assert np.array(found["last row"][version]) == pytest.approx(expected.numpy(), abs=1e-5)
    shown = prompt_versions(loaded.tokenizer, attacks.load_attack("sentiment-word"), split="test", n=4, seed=0)
    expected = head_similarity(loaded.model, shown.triggered, readings=["last row"])["last row"].mean(2)
    assert np.array(found["last row"]["triggered"]) == pytest.approx(expected.numpy(), abs=1e-5)
