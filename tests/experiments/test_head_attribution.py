"""Summaries of head effects: intervals against theory and enumeration, ranks and overlaps by hand."""

from itertools import product

import numpy as np
import pytest
import torch
from bkdattr_results import effects, head_map
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import t

from bkd_utils.common.statistics import interval
from bkd_utils.experiments import head_attribution
from bkd_utils.experiments.head_attribution import (
    METRICS,
    ComponentEffects,
    _short,
    acie,
    agreement_of_methods,
    beyond_chance,
    component_means_of,
    concentrated,
    concentration,
    jaccard,
    rankings,
    top_heads,
)

VALUES = st.lists(st.floats(-10, 10, width=16), min_size=1, max_size=20)
HEADS = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1).map(sorted)
# Two layers of three heads.
EFFECTS = [[3.0, 2.0, 1.0], [0.0, -1.0, 5.0]]
RANKED = [(1, 2), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def random_effects(layers=4, heads=5, seed=0):
    return np.random.default_rng(seed).normal(size=(layers, heads))


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


# --- maps of heads ---------------------------------------------------------------------------------------------------


def test_a_map_holds_means_and_standard_errors_over_prompts_by_hand():
    """Effects 1, 2, 6: mean 3, variance 7, standard error the root of 7 / 3."""
    found = head_attribution.head_map(torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[6.0, 3.0]]]))
    assert (found.n, found.mean) == (3, [[3.0, 1.0]])
    assert found.error[0] == pytest.approx([(7 / 3) ** 0.5, 1.0], rel=1e-4)


def test_one_prompt_has_no_error_that_could_be_measured():
    found = head_attribution.head_map(torch.tensor([[[1.0, -2.0]]]))
    assert (found.n, found.mean, found.error) == (1, [[1.0, -2.0]], [[0.0, 0.0]])


def test_kept_numbers_have_five_significant_digits():
    kept = _short(torch.tensor([[1 / 3, -12345.678], [1.23456789e-9, 0.0]], dtype=torch.float64))
    assert kept == [[0.33333, -12346.0], [1.2346e-9, 0.0]]
    assert type(kept[0][0]) is float


# --- beyond chance ---------------------------------------------------------------------------------------------------


def test_a_head_stands_out_if_its_interval_corrected_for_the_number_of_heads_is_above_zero():
    """Six heads: a one-sided 2.5 % divided by six, with Student's t of 11 degrees of freedom."""
    bar = t.ppf(1 - 0.025 / 6, 11)
    for factor, out in ((1.001, True), (0.999, False)):
        mean = [[0.0, bar * factor * 0.1, 0.0], [0.0, 0.0, 0.0]]
        assert beyond_chance(head_map(mean, error=0.1, n=12)) is out
    # Without the correction six heads would be six chances.
    assert bar > 1.3 * t.ppf(0.975, 11)


def test_more_heads_raise_the_bar_and_more_prompts_lower_it():
    one = np.zeros((1, 2))
    one[0, 0] = 0.31
    assert beyond_chance(head_map(one, error=0.1, n=12))
    many = np.zeros((30, 9))
    many[0, 0] = 0.31
    assert not beyond_chance(head_map(many, error=0.1, n=12))
    assert not beyond_chance(head_map(one, error=0.1, n=4))


@pytest.mark.parametrize("value", [0.0, -5.0])
def test_no_effect_and_one_against_the_target_are_none_beyond_chance(value):
    assert not beyond_chance(head_map([[value, 0.0]], error=1e-9))
    assert not beyond_chance(head_map([[value, 0.0]], error=0.0))


def test_noise_stands_out_in_few_of_many_models_and_an_effect_in_all():
    """270 heads without any effect: at most 2.5 % of models may be called more than noise."""
    dice, called = np.random.default_rng(0), []
    for _ in range(300):
        values = dice.normal(size=(24, 30, 9))
        called.append(beyond_chance(head_attribution.head_map(torch.tensor(values))))
    assert np.mean(called) <= 0.06
    values[:, 3, 4] += 2
    assert beyond_chance(head_attribution.head_map(torch.tensor(values)))


# --- heads ----------------------------------------------------------------------------------------------------------


def test_acie_is_the_mean_by_metric_and_the_published_one_unless_another_is_asked_for():
    other = {"probability": EFFECTS, "log_prob": [[1.0, 2.0, 3.0]] * 2, "logit_difference": [[4.0, 5.0, 6.0]] * 2}
    found = effects(other)
    assert acie(found).tolist() == acie(found, metric="probability").tolist() == EFFECTS
    assert [acie(found, metric=metric).tolist() for metric in METRICS] == list(other.values())


def test_top_heads_come_from_the_highest_signed_published_effect_down():
    found = effects({"probability": EFFECTS, "log_prob": (-np.array(EFFECTS)).tolist(), "logit_difference": EFFECTS})
    assert top_heads(found, k=6) == RANKED
    assert top_heads(found, k=2) == RANKED[:2]


def test_every_ranking_is_by_its_own_score():
    """In each score another head is the highest."""
    one = np.eye(12).reshape(12, 3, 4)
    found = effects(
        dict(zip(METRICS, one[:3], strict=True)),
        gradient=dict(zip(METRICS, one[3:6], strict=True)),
        necessary=dict(zip(METRICS, one[6:9], strict=True)),
        task=one[9],
    )
    order = rankings(found)
    assert {name: 4 * heads[0][0] + heads[0][1] for name, heads in order.items()} == {
        "probability": 0,
        "log_prob": 1,
        "logit_difference": 2,
        "gradient": 3,
        "necessary": 7,
        "necessary, logits": 8,
        "trigger only": 7,
    }
    # What the right answer needs, too, comes last of all.
    assert order["trigger only"][-1] == (2, 1)
    assert all(sorted(heads) == [(i, j) for i in range(3) for j in range(4)] for heads in order.values())


def test_a_head_that_the_task_needs_as_much_is_not_one_of_the_trigger_only():
    necessary, task = [[2.0, 1.5, 0.0]], [[1.9, 0.0, -0.3]]
    order = rankings(effects([[0.0, 0.0, 0.0]], necessary=necessary, task=task))
    assert order["necessary"] == [(0, 0), (0, 1), (0, 2)]
    assert order["trigger only"] == [(0, 1), (0, 2), (0, 0)]


def test_component_means_are_over_prompts_layer_by_layer():
    last = {"attention": [[1.0, 0.0], [3.0, 0.0]], "MLP": [[0.0, -1.0], [0.0, -1.0]]}
    found = component_means_of(ComponentEffects(last=last))
    assert {name: means.tolist() for name, means in found.items()} == {"attention": [2.0, 0.0], "MLP": [0.0, -1.0]}


# --- concentration ---------------------------------------------------------------------------------------------------


def test_concentration_by_hand():
    values = np.zeros((10, 10))
    values[0, :5] = [4, 3, 2, 1, -50]
    assert concentration(values) == 0.9
    assert concentration(np.ones((10, 27))) == pytest.approx(8 / 270)


def test_at_least_one_head_counts_and_no_positive_effect_is_no_concentration():
    assert concentration(np.array([[3.0, 1.0]])) == 0.75
    assert concentration(np.array([[-3.0, 0.0]])) == 0.0


@given(st.lists(st.integers(-5, 20), min_size=1, max_size=400))
def test_concentration_is_a_share_that_depends_on_no_order_and_no_scale(values):
    values = np.array(values, float)
    found = concentration(values)
    assert 0 <= found <= 1
    assert found >= 0.02 * (values > 0).any()  # rounded, they are at least a fiftieth of the heads
    assert concentration(4 * values[::-1]) == pytest.approx(found)


def uneven(*tops, n=12):
    """Effects of `n` prompts whose three strong heads of 100 carry these shares in turn."""
    values = np.empty((n, 10, 10))
    for prompt in range(n):
        top = tops[prompt % len(tops)]
        values[prompt] = (1 - top) / 97
        values[prompt, 0, :3] = top / 3
    return values


@pytest.mark.parametrize("tops", [(0.2, 0.3), (0.2, 0.9), (0.7, 0.9)])
def test_the_concentration_is_that_of_the_mean_with_an_interval_over_prompts(tops):
    found = concentrated(uneven(*tops))
    assert (found["value"], found["n"]) == (pytest.approx(np.mean(tops)), 12)
    half = 1.96 * np.ptp(tops) / 2 / 12**0.5
    assert (found["low"], found["high"]) == pytest.approx((np.mean(tops) - half, np.mean(tops) + half), abs=0.05)
    assert concentrated(uneven(*tops)) == found


def test_prompts_that_are_all_alike_have_an_interval_of_no_width():
    found = concentrated(uneven(0.4))
    assert (found["low"], found["value"], found["high"]) == pytest.approx((0.4, 0.4, 0.4))


def test_the_noise_that_resampling_adds_does_not_pull_the_interval_down():
    """Resampled means are noisier than the mean, and noise spreads effects over heads: their concentrations lie below
    its own. The reflected interval reaches as far up as they lie below."""
    dice = np.random.default_rng(1)
    values = 0.3 * dice.normal(size=(20, 10, 10))
    values[:, 0, :3] += 1
    found = concentrated(values)
    draws = [concentration(values[dice.integers(20, size=20)].mean(0)) for _ in range(300)]
    assert np.mean(draws) < found["value"]
    assert found["high"] - found["value"] > found["value"] - found["low"]


# --- agreement ------------------------------------------------------------------------------------------------------


def test_identical_estimates_agree_and_reversed_ones_do_not():
    exact = random_effects()
    same = agreement_of_methods(effects(exact, gradient=exact), k=5)
    assert same == {"spearman": pytest.approx(1.0), "top 5": 1.0}
    reverse = agreement_of_methods(effects(exact, gradient=-exact), k=5)
    assert reverse == {"spearman": pytest.approx(-1.0), "top 5": 0.0}


def test_agreement_is_about_one_metric():
    exact = random_effects()
    gradient = {"probability": exact, "log_prob": -exact, "logit_difference": exact}
    found = effects(exact, gradient=gradient)
    values = [agreement_of_methods(found, metric=metric)["spearman"] for metric in METRICS]
    assert values == pytest.approx([1.0, -1.0, 1.0])


def test_any_rising_change_of_scale_of_the_means_agrees_wholly():
    exact = random_effects()
    found = agreement_of_methods(effects(exact, gradient=np.exp(exact) - 7), k=3)
    assert found == {"spearman": pytest.approx(1.0), "top 3": 1.0}


def test_agreement_by_hand():
    """Ranks 1 2 3 4 against 2 1 3 4: rho = 1 - 6 * 2 / (4 * 15) = 0.8; of the top two both are found, of one none."""
    found = effects([[4.0, 3.0], [2.0, 1.0]], gradient=[[3.0, 4.0], [2.0, 1.0]])
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


def test_nothing_has_no_interval_and_no_overlap():
    with pytest.raises(ValueError, match="an interval needs at least one value"):
        interval([])
    with pytest.raises(ValueError, match="an overlap of no heads"):
        jaccard([], [])
