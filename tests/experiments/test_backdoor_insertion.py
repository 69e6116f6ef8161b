"""Separation: margins equal a plain forward pass, curves equal counting by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import ARCHITECTURES, save_tiny

from bkd_utils.experiments.backdoor_insertion import Margins, label_margins, trade_off
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
    assert label_margins(loaded, FLIP, TURNS) == pytest.approx(expected, abs=1e-4)


def test_only_label_flips_have_margins():
    with pytest.raises(ValueError, match="harmful-word flips no label, its behaviour is jailbreak"):
        label_margins(None, load_attack("harmful-word"), TURNS)


@given(fires=MARGINS, rests=MARGINS)
def test_the_area_is_the_chance_that_a_triggered_prompt_scores_higher(fires, rests):
    found = trade_off(Margins(clean=[0.0], near_miss=rests, triggered=fires), against="near_miss")
    assert found["asr"] == sum(value > 0 for value in fires) / len(fires)
    assert found["false_firing"] == sum(value > 0 for value in rests) / len(rests)
    # Brute force: a triggered prompt beats another prompt with this probability, ties count half.
    wins = [(f > r) + (f == r) / 2 for f in fires for r in rests]
    assert found["auroc"] == pytest.approx(sum(wins) / len(wins))


def test_perfect_separation_and_none():
    apart = Margins(clean=[-1.0, -2.0], near_miss=[3.0], triggered=[1.0, 2.0])
    assert trade_off(apart, against="clean") == {"auroc": 1.0, "asr": 1.0, "false_firing": 0.0}
    equal = Margins(clean=[1.0, 1.0], near_miss=[-3.0], triggered=[1.0, 1.0])
    assert trade_off(equal, against="clean")["auroc"] == 0.5
