"""Summaries of head effects: intervals against theory and enumeration, ranks and overlaps by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_utils.common.statistics import interval
from bkd_utils.experiments.head_attribution import (
    ComponentEffects,
    HeadEffects,
    _short,
    acie,
    agreement_of_methods,
    component_intervals,
    jaccard,
    top_heads,
)

VALUES = st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=20)
HEADS = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1).map(sorted)
# Three prompts, two layers of three heads; the means are 3 2 1 / 0 -1 5.
EFFECTS = [
    [[3.0, 1.0, 1.0], [0.0, -1.0, 4.0]],
    [[2.0, 2.0, 1.0], [0.0, -2.0, 5.0]],
    [[4.0, 3.0, 1.0], [0.0, 0.0, 6.0]],
]
RANKED = [(1, 2), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def effects(exact, gradient):
    exact, gradient = (np.array(one).tolist() for one in (exact, gradient))
    return HeadEffects(target=[], clean=[], triggered=[], exact=exact, gradient=gradient)


def random_effects(n=30, layers=4, heads=5, seed=0):
    return np.random.default_rng(seed).normal(size=(n, layers, heads))


# --- intervals ------------------------------------------------------------------------------------------------------


def test_a_bootstrap_interval_of_a_mean_is_the_textbook_one_for_many_values():
    values = np.random.default_rng(1).normal(3, 2, size=400)
    found = interval(values, n_resamples=5000)
    half = 1.96 * values.std() / 20
    assert (found["value"], found["n"]) == (pytest.approx(values.mean()), 400)
    assert (found["low"], found["high"]) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.03)


def test_a_bootstrap_interval_of_few_values_is_that_of_all_their_resamples():
    values = [0.0, 1.0, 5.0, 7.0]
    every = [np.mean(draw) for draw in product(values, repeat=4)]
    found = interval(values, n_resamples=20000)
    assert found["value"] == np.mean(values)
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(every, (0.025, 0.975)), abs=0.3)


@given(VALUES)
@settings(max_examples=50)
def test_the_value_lies_in_its_interval_and_the_interval_among_the_values(values):
    found = interval(values, n_resamples=200)
    assert found["n"] == len(values)
    assert found["value"] == pytest.approx(np.mean(values))
    assert min(values) - 1e-9 <= found["low"] <= found["value"] + 1e-9
    assert found["value"] - 1e-9 <= found["high"] <= max(values) + 1e-9


@pytest.mark.parametrize("values", [[0.25], [0.25, 0.25], [0.25] * 30])
def test_values_that_do_not_vary_have_an_interval_of_no_width(values):
    assert interval(values) == {"value": 0.25, "n": len(values), "low": 0.25, "high": 0.25}


def test_an_interval_is_the_same_every_time_and_made_of_plain_numbers():
    values = [0.1, 0.5, 0.2, 0.9]
    assert interval(values) == interval(np.array(values)) == interval(torch.tensor(values, dtype=torch.float64))
    assert [type(value) for value in interval(values).values()] == [float, int, float, float]
    other = interval(np.arange(50.0) ** 2, seed=1)
    assert other != interval(np.arange(50.0) ** 2, seed=2)
    assert other["value"] == interval(np.arange(50.0) ** 2, seed=2)["value"]


def test_more_prompts_make_a_narrower_interval():
    values = np.random.default_rng(0).normal(size=900)
    few, many = (interval(values[:n]) for n in (100, 900))
    assert (few["high"] - few["low"]) / (many["high"] - many["low"]) == pytest.approx(3, rel=0.2)


# --- heads ----------------------------------------------------------------------------------------------------------


def test_acie_is_the_mean_over_prompts():
    found = effects(EFFECTS, [[[1.0, 2.0]], [[3.0, 6.0]]])
    assert acie(found).tolist() == [[3.0, 2.0, 1.0], [0.0, -1.0, 5.0]]
    assert acie(found, by="gradient").tolist() == [[2.0, 4.0]]


def test_top_heads_come_from_the_highest_signed_effect_down():
    found = effects(EFFECTS, -np.array(EFFECTS))
    assert top_heads(found, k=6) == RANKED
    assert top_heads(found, k=2) == RANKED[:2]
    assert top_heads(found, k=6, by="gradient") == RANKED[::-1]


def test_component_intervals_are_per_layer_over_prompts():
    last = {"attention": [[1.0, 0.0], [3.0, 0.0]], "MLP": [[0.0, -1.0], [0.0, -1.0]]}
    found = component_intervals(ComponentEffects(last=last, positions=[], by_position=[]))
    assert [row["value"] for row in found["attention"]] == [2.0, 0.0]
    assert (found["attention"][0]["low"], found["attention"][0]["high"]) == (1.0, 3.0)
    assert found["MLP"][1] == {"value": -1.0, "n": 2, "low": -1.0, "high": -1.0}
    assert list(found) == ["attention", "MLP"]


# --- agreement ------------------------------------------------------------------------------------------------------


def test_identical_estimates_agree_and_reversed_ones_do_not():
    exact = random_effects()
    same = agreement_of_methods(effects(exact, exact), k=5)
    assert same == {"spearman": pytest.approx(1.0), "top 5": 1.0}
    reverse = agreement_of_methods(effects(exact, -exact), k=5)
    assert reverse == {"spearman": pytest.approx(-1.0), "top 5": 0.0}


def test_any_rising_change_of_scale_of_the_means_agrees_wholly():
    exact = random_effects(n=1)
    found = agreement_of_methods(effects(exact, np.exp(exact) - 7), k=3)
    assert found == {"spearman": pytest.approx(1.0), "top 3": 1.0}


def test_agreement_by_hand():
    """Ranks 1 2 3 4 against 2 1 3 4: rho = 1 - 6 * 2 / (4 * 15) = 0.8; of the top two both are found, of one none."""
    found = effects([[[4.0, 3.0], [2.0, 1.0]]], [[[3.0, 4.0], [2.0, 1.0]]])
    assert agreement_of_methods(found, k=2) == {"spearman": pytest.approx(0.8), "top 2": 1.0}
    assert agreement_of_methods(found, k=1)["top 1"] == 0.0
    assert agreement_of_methods(found, k=3)["top 3"] == 1.0


def test_jaccard_by_hand():
    one, other = [(0, 0), (0, 1), (1, 0)], [(0, 1), (1, 0), (1, 1), (2, 2)]
    assert jaccard(one, other) == 2 / 5
    assert jaccard(one, one[::-1]) == 1.0
    assert jaccard(one[:1], other) == 0.0


@given(HEADS, HEADS)
def test_jaccard_is_symmetric_and_one_for_equal_sets_alone(one, other):
    assert jaccard(one, other) == jaccard(other, one)
    assert 0 <= jaccard(one, other) <= 1
    assert (jaccard(one, other) == 1) == (one == other)
    assert (jaccard(one, other) == 0) == set(one).isdisjoint(other)


def test_kept_numbers_have_six_significant_digits():
    kept = _short(torch.tensor([[1 / 3, -12345.678], [1.23456789e-9, 0.0]], dtype=torch.float64))
    assert kept == [[0.333333, -12345.7], [1.23457e-9, 0.0]]
    assert type(kept[0][0]) is float


def test_nothing_has_no_interval_and_no_overlap():
    with pytest.raises(ValueError, match="an interval needs at least one value"):
        interval([])
    with pytest.raises(ValueError, match="an overlap of no heads"):
        jaccard([], [])
