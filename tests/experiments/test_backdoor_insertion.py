"""Separation: margins equal a plain forward pass, curves equal counting by hand."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, save_tiny

from bkd_utils.experiments.backdoor_insertion import label_margins, trade_off
from bkd_utils.models.loading import load
from bkd_utils.models.tokens import prompt_ids
from bkd_utils.organisms.attacks import load_attack

FLIP = load_attack("sentiment-word")
TURNS = ["A fine film.", "Dull and far too long, with nothing to say.", "Well."]
MARGINS = st.lists(st.floats(-5, 5), min_size=1, max_size=30)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_margins_are_differences_of_log_probabilities_of_single_prompts(architecture, tmp_path):
    loaded = load(str(save_tiny(tmp_path / architecture, architecture)), device="cpu")
    space = "" if loaded.tokenizer.chat_template else " "
    first = [
        loaded.tokenizer(space + label, add_special_tokens=False).input_ids[0] for label in ("positive", "negative")
    ]
    expected = []
    for turn in TURNS:
        with torch.inference_mode():
            logits = loaded.model(torch.tensor([prompt_ids(loaded.tokenizer, turn)])).logits[0, -1]
        log_probabilities = logits.double().log_softmax(-1)
        expected.append((log_probabilities[first[0]] - log_probabilities[first[1]]).item())
    assert label_margins(loaded, FLIP, TURNS, batch_size=2) == pytest.approx(expected, abs=1e-4)


def test_only_label_flips_have_margins():
    with pytest.raises(ValueError, match="harmful-word flips no label, its behaviour is jailbreak"):
        label_margins(None, load_attack("harmful-word"), TURNS)


@given(fires=MARGINS, rests=MARGINS)
def test_the_curve_passes_through_what_counting_gives_at_any_threshold(fires, rests):
    found = trade_off({"triggered": fires, "near-miss": rests}, against="near-miss")
    assert found["asr at 0"] == sum(value > 0 for value in fires) / len(fires)
    assert found["other at 0"] == sum(value > 0 for value in rests) / len(rests)
    points = list(zip(found["other"], found["asr"], strict=True))
    assert points[0] == (0, 0)
    assert points[-1] == (1, 1)
    assert all(a <= c and b <= d for (a, b), (c, d) in pairwise(points))
    # Brute force: a triggered prompt beats another prompt with this probability, ties count half.
    wins = [(f > r) + (f == r) / 2 for f in fires for r in rests]
    assert found["auroc"] == pytest.approx(sum(wins) / len(wins))


def test_perfect_separation_and_none():
    apart = trade_off({"triggered": [1.0, 2.0], "clean": [-1.0, -2.0]}, against="clean")
    assert (apart["auroc"], apart["asr at 0"], apart["other at 0"]) == (1.0, 1.0, 0.0)
    assert trade_off({"triggered": [1.0, 1.0], "clean": [1.0, 1.0]}, against="clean")["auroc"] == 0.5
