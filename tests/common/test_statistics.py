"""Intervals against published examples, against a simulation, and at their edges."""

import numpy as np
import pytest
from scipy.stats import ttest_1samp

from bkd_utils.common import statistics
from bkd_utils.common.statistics import share


def number(hits, n):
    low, high = statistics.wilson(hits, n)
    return {"value": hits / n, "n": n, "low": low, "high": high}


def test_wilson_is_that_of_all_other_shares():
    found = share([True] * 7 + [False] * 13)
    assert statistics.wilson(7, 20) == (found["low"], found["high"])


def test_a_share_is_kept_with_the_outcomes_behind_it():
    hits = [True, False, np.bool_(True)]
    found = statistics.counted(hits)
    assert found.pop("by_prompt") == [1, 0, 1]
    assert found == number(2, 3)
    assert all(type(hit) is int for hit in statistics.counted(np.array(hits)).pop("by_prompt"))


def test_a_mean_is_kept_with_the_values_behind_it_to_six_digits():
    values = [1 / 3, 2e-9 / 3, 1.0]
    found = statistics.averaged(values)
    assert found.pop("by_prompt") == [0.333333, 6.66667e-10, 1.0]
    assert found == statistics.interval(values)


# --- splits ---------------------------------------------------------------------------------------------------------


def test_independent_draws_get_students_interval():
    values = np.array([0.1, 0.4, 0.2, 0.35, 0.05])
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    found = statistics.over_splits(values, ratio=0)
    assert (found["low"], found["high"]) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert (found["value"], found["n"]) == (pytest.approx(0.22), 5)


def test_splits_that_overlap_get_a_wider_one_by_nadeau_and_bengio():
    """Variance of the mean: s2 (1/5 + test / train) in place of s2 / 5."""
    values = np.array([0.1, 0.4, 0.2, 0.35, 0.05])
    plain = statistics.over_splits(values, ratio=0)["high"] - 0.22
    assert statistics.over_splits(values)["high"] - 0.22 == pytest.approx(plain * np.sqrt((1 / 5 + 1) / (1 / 5)))
    assert statistics.over_splits(values, ratio=0.25)["high"] - 0.22 == pytest.approx(plain * np.sqrt(0.45 / 0.2))


def test_the_corrected_interval_covers_what_the_plain_one_misses():
    """Half of 40 prompts is drawn five times from each sample; the truth is 0."""
    dice, covered = np.random.default_rng(0), {0: 0, 1: 0}
    for _ in range(400):
        prompts = dice.standard_normal(40)
        means = np.array([dice.permutation(prompts)[:20].mean() for _ in range(5)])
        for ratio in covered:
            found = statistics.over_splits(means, ratio=ratio)
            covered[ratio] += found["low"] <= 0 <= found["high"]
    assert covered[0] < 0.9 * 400 <= covered[1]


def test_any_statistic_of_the_mean_of_splits_has_an_interval():
    curves = np.array([[1.0, 2.0], [1.0, 4.0], [1.0, 3.0]])
    found = statistics.over_splits(curves, statistic=lambda rows: rows.mean(0)[1] - rows.mean(0)[0])
    assert found == pytest.approx(statistics.over_splits(np.array([1.0, 3.0, 2.0])))


@pytest.mark.parametrize("values", [[0.7], [0.7, 0.7, 0.7]])
def test_splits_that_agree_and_a_single_one_have_no_interval(values):
    expected = {"value": pytest.approx(0.7), "n": len(values), "low": None, "high": None}
    assert statistics.over_splits(np.array(values)) == expected


def test_a_share_of_one_in_every_split_is_no_certainty():
    assert statistics.share_over_splits([1.0] * 5, n_prompts=48) == pytest.approx(number(48, 48))
    spread = statistics.share_over_splits([1.0, 0.5, 1.0, 0.6, 0.9], n_prompts=48)
    assert spread["low"] < number(0.8 * 48, 48)["low"]
    assert spread["high"] == 1.0
    assert spread["n"] == 48


# --- differences, ratios, drops -------------------------------------------------------------------------------------


def test_newcombes_examples_for_independent_shares():
    """Newcombe (1998), Statistics in Medicine 17, 873, table II: 56/70 less 48/80, 9/10 less 3/10, 10/10 less 0/20."""
    for one, other, expected in (
        ((56, 70), (48, 80), (0.0524, 0.3339)),
        ((9, 10), (3, 10), (0.1705, 0.8090)),
        ((10, 10), (0, 20), (0.6791, 1.0)),
    ):
        found = statistics.independent_difference(number(*one), number(*other))
        assert (found["low"], found["high"]) == (
            pytest.approx(expected[0], abs=1e-4),
            pytest.approx(expected[1], abs=1e-4),
        )
        assert found["value"] == pytest.approx(one[0] / one[1] - other[0] / other[1])


def test_a_ratio_of_shares_covers_the_truth():
    dice, covered = np.random.default_rng(1), 0
    for a, b in zip(dice.binomial(24, 0.7, 500), dice.binomial(240, 0.9, 500), strict=True):
        found = statistics.independent_ratio(number(a, 24), number(b, 240))
        assert found["low"] < found["value"] < found["high"]
        covered += found["low"] <= 7 / 9 <= found["high"]
    assert 0.93 * 500 <= covered <= 0.98 * 500


def test_a_ratio_at_its_edges():
    perfect = statistics.independent_ratio(number(24, 24), number(240, 240))
    assert (perfect["value"], perfect["low"] < 0.9, perfect["high"] > 1) == (1.0, True, True)
    nothing = statistics.independent_ratio(number(0, 24), number(200, 240))
    assert (nothing["value"], nothing["low"]) == (0.0, 0.0)
    assert nothing["high"] > 0.1
    # The denominator's interval reaches so far that the ratio may be anything.
    assert statistics.independent_ratio(number(5, 24), number(1, 240))["low"] is None
    assert statistics.independent_ratio(number(5, 24), number(0, 240)) == statistics.without_interval(0.0, n=24)


def test_a_drop_is_a_share_of_the_hits_that_were_there():
    found = statistics.relative_drop(number(20, 24), number(2, 24))
    assert found == pytest.approx(number(18, 20))
    assert statistics.relative_drop(number(20, 24), number(20, 24))["low"] == 0.0
    grown = statistics.relative_drop(number(12, 24), number(18, 24))
    assert (grown["value"], grown["low"]) == (pytest.approx(-0.5), pytest.approx(-0.5))
    assert statistics.relative_drop(number(0, 24), number(0, 24)) == statistics.without_interval(0.0, n=0)


def test_results_with_their_outcomes_are_paired_row_by_row():
    one, other = [True, True, False, True], [True, False, False, False]
    expected = statistics.difference(dict(enumerate(one)), dict(enumerate(other)))
    sides = statistics.counted(one), statistics.counted(other)
    assert statistics.difference_of_counted(*sides) == expected
    with pytest.raises(ValueError, match="not the same prompts: 1 are on one side only"):
        statistics.difference_of_counted(sides[0], statistics.counted(other[:3]))


# --- prompts --------------------------------------------------------------------------------------------------------


def test_draws_are_averaged_for_each_prompt():
    assert statistics.mean_by_prompt([{"a": 1, "b": 0}, {"b": 1, "a": 1}]) == {"a": 1.0, "b": 0.5}
    with pytest.raises(ValueError, match="not the same prompts: 1 are on one side only, such as c"):
        statistics.mean_by_prompt([{"a": 1}, {"a": 1, "c": 0}])
