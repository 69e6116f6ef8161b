"""Probes on made-up activations whose right answer is known, and against scikit-learn one split at a time."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from bkd_utils.backdoor_attribution import probe as probe_module
from bkd_utils.backdoor_attribution.probe import (
    CLASSIFIERS,
    best_random_direction,
    classifier,
    probe_scores,
    splits,
    transfer_matrix,
)
from bkd_utils.experiments.backdoor_probe import probe_prompts
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.loading import load_tokenizer
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import load_attack, load_attacks
from bkd_utils.organisms.prompts import prompt_versions
from bkd_utils.organisms.triggers import load_trigger, trigger_names

EACH_KIND = pytest.mark.parametrize("kind", CLASSIFIERS)
# An MLP on forty rows of noise goes on learning them by heart.
pytestmark = pytest.mark.filterwarnings("ignore:Stochastic Optimizer")


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def separable(n=40, *, gap=20.0, axes=slice(None), seed=0):
    """Twins that differ by noise, and by a gap along some of six axes."""
    negative, positive = noise(n, 6, seed=seed), noise(n, 6, seed=seed + 1)
    positive[:, axes] += gap
    return negative, positive


def scaled(negative, positive, train, rows):
    """Rows of both classes, scaled as the training half asks for."""
    scaler = StandardScaler().fit(np.concatenate([negative[train], positive[train]]))
    return scaler.transform(np.concatenate([negative[rows], positive[rows]]))


# --- splits ---------------------------------------------------------------------------------------------------------


@given(n=st.integers(4, 60), n_splits=st.integers(1, 4), seed=st.integers(0, 1000))
def test_every_prompt_is_on_one_side_of_every_split(n, n_splits, seed):
    found = splits(n, n_splits=n_splits, seed=seed)
    assert len(found) == n_splits
    for train, test in found:
        assert sorted([*train, *test]) == list(range(n))
        assert 0 <= len(test) - len(train) <= 1
    again = splits(n, n_splits=n_splits, seed=seed)
    assert [test.tolist() for _, test in again] == [test.tolist() for _, test in found]


def test_splits_differ_from_each_other_and_from_seed_to_seed():
    drawn = [tuple(test) for seed in range(3) for _, test in splits(40, n_splits=3, seed=seed)]
    assert len(set(drawn)) == len(drawn)


def test_too_few_prompts_cannot_be_split():
    with pytest.raises(ValueError, match="3 prompts are too few"):
        splits(3, n_splits=1, seed=0)
    with pytest.raises(ValueError, match="2 prompts are too few"):
        probe_scores(noise(2, 3), noise(2, 3))


class Spy:
    """A probe that writes down the number of the prompt, kept in column 0, of every row that it sees."""

    def __init__(self):
        self.fitted, self.asked = [], []

    def fit(self, rows, truth):
        self.fitted.append((rows[:, 0].astype(int).tolist(), list(truth)))
        return self

    def predict(self, rows):
        self.asked.append(rows[:, 0].astype(int).tolist())
        return np.zeros(len(rows), int)

    def decision_function(self, rows):
        return rows[:, 1]


def test_twins_and_other_texts_of_a_prompt_stay_on_its_side(monkeypatch):
    spy = Spy()
    monkeypatch.setattr(probe_module, "classifier", lambda kind, *, seed: spy)
    number = np.arange(11.0)
    negative, positive, near = (np.stack([number, np.full(11, side)], 1) for side in (0.0, 1.0, 2.0))
    probe_scores(negative, positive, n_splits=3, others={"near-miss": near})
    assert (len(spy.fitted), len(spy.asked)) == (3, 6)
    for (fitted, truth), held, others in zip(spy.fitted, spy.asked[::2], spy.asked[1::2], strict=True):
        half = len(fitted) // 2
        assert fitted[:half] == fitted[half:]
        assert truth == [0] * half + [1] * half
        assert held == others * 2
        assert sorted({*fitted, *held}) == list(range(11))
        assert set(fitted).isdisjoint(held)


# --- one layer ------------------------------------------------------------------------------------------------------


@EACH_KIND
def test_every_kind_of_probe_separates_what_is_separable(kind):
    found = probe_scores(*separable(), kind=kind, n_splits=2)
    assert min(found.pop("separation")) > 5
    assert found == {"accuracy": [1.0, 1.0], "auroc": [1.0, 1.0]}


def test_shuffled_labels_leave_chance():
    made = separable(200, gap=1.0)
    honest, shuffled = (probe_scores(*made, n_splits=40, shuffled=shuffled) for shuffled in (False, True))
    assert min(honest["accuracy"]) > 0.8
    for key in ("accuracy", "auroc"):
        assert len(shuffled[key]) == 40
        assert np.mean(shuffled[key]) == pytest.approx(0.5, abs=0.12)


def test_pure_noise_is_at_chance():
    found = probe_scores(noise(300, 5), noise(300, 5, seed=1), n_splits=10)
    assert np.mean(found["accuracy"]) == pytest.approx(0.5, abs=0.05)
    assert np.mean(found["auroc"]) == pytest.approx(0.5, abs=0.05)


def test_other_texts_are_counted_when_called_positive():
    negative, positive = separable()
    mixed = np.where(np.arange(40)[:, None] % 2 == 0, negative, positive)
    found = probe_scores(negative, positive, n_splits=3, others={"like": positive, "unlike": negative, "half": mixed})
    assert found["like"] == [1.0] * 3
    assert found["unlike"] == [0.0] * 3
    assert found["half"] == [float((test % 2).mean()) for _, test in splits(40, n_splits=3, seed=0)]
    assert found["accuracy"] == [1.0] * 3


def test_scores_are_those_of_the_probe_alone():
    """Weak signal, so that scores are neither perfect nor chance, against one split at a time."""
    negative, positive = separable(gap=0.5)
    found = probe_scores(negative, positive, n_splits=4, seed=7)
    for i, (train, test) in enumerate(splits(40, n_splits=4, seed=7)):
        probe = classifier("logistic regression", seed=7)
        probe.fit(np.concatenate([negative[train], positive[train]]), [0] * 20 + [1] * 20)
        right = [*(probe.predict(negative[test]) == 0), *(probe.predict(positive[test]) == 1)]
        assert found["accuracy"][i] == np.mean(right)
        wins = probe.decision_function(positive[test])[:, None] > probe.decision_function(negative[test])[None]
        assert found["auroc"][i] == pytest.approx(wins.mean())
        assert 0.5 < found["auroc"][i] < 1
        low, high = (probe.decision_function(rows[test]) for rows in (negative, positive))
        pooled = np.sqrt((np.std(low) ** 2 + np.std(high) ** 2) / 2)
        assert found["separation"][i] == pytest.approx((np.mean(high) - np.mean(low)) / pooled)


def scoring(monkeypatch, negative, positive):
    """What is found of probes whose score is the first column."""

    class First:
        def fit(self, *_):
            return self

        def predict(self, rows):
            return (rows[:, 0] > 0).astype(int)

        def decision_function(self, rows):
            return rows[:, 0]

    monkeypatch.setattr(probe_module, "classifier", lambda kind, *, seed: First())
    return probe_scores(negative, positive, n_splits=3)


def test_a_separation_by_hand(monkeypatch):
    """Scores of 0 and 2 against the same ones 5 higher: five, over the deviation that both sides have."""
    column = np.tile([0.0, 2.0], 10)[:, None]
    found = scoring(monkeypatch, column, column + 5)
    for value, (_, test) in zip(found["separation"], splits(20, n_splits=3, seed=0), strict=True):
        variance = np.var(column[test])
        assert value == pytest.approx(5 / np.sqrt(variance))
    assert scoring(monkeypatch, column + 5, column)["separation"] == [-one for one in found["separation"]]
    wider = scoring(monkeypatch, column, 3 * column + 5)["separation"]
    for value, (_, test) in zip(wider, splits(20, n_splits=3, seed=0), strict=True):
        held = column[test]
        assert value == pytest.approx((2 * held.mean() + 5) / np.sqrt((held.var() + 9 * held.var()) / 2))


def test_the_separation_goes_on_growing_where_accuracy_and_auroc_cannot():
    near, far = (probe_scores(*separable(gap=gap), n_splits=2) for gap in (20.0, 60.0))
    assert near["auroc"] == far["auroc"] == [1.0, 1.0]
    assert min(far["separation"]) > 2 * max(near["separation"])


def test_the_separation_is_about_nothing_for_shuffled_labels_and_does_not_depend_on_scale():
    negative, positive = separable(200, gap=1.0)
    shuffled = probe_scores(negative, positive, n_splits=40, shuffled=True)
    assert np.mean(shuffled["separation"]) == pytest.approx(0, abs=0.4)
    one, other = (probe_scores(scale * negative, scale * positive, n_splits=2) for scale in (1, 1000))
    assert one["separation"] == pytest.approx(other["separation"], rel=1e-3)


def test_an_unknown_probe_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown probe 'oracle'; known: logistic regression, linear SVM, .*MLP"):
        classifier("oracle", seed=0)
    with pytest.raises(ValueError, match="unknown probe 'oracle'"):
        probe_scores(*separable(), kind="oracle")


# --- between layers -------------------------------------------------------------------------------------------------


def layers(*pairs_of_layers):
    negative, positive = zip(*pairs_of_layers, strict=True)
    return np.stack(negative, 1), np.stack(positive, 1)


def weak(seed):
    return separable(gap=0.7, seed=seed)


@EACH_KIND
def test_a_probe_works_where_the_direction_is_the_same(kind):
    same, other = separable(), separable(gap=-20.0, seed=2)
    found = transfer_matrix(*layers(same, separable(seed=4), other), kind=kind)
    assert found.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_a_probe_of_one_axis_is_at_chance_on_another():
    found = transfer_matrix(*layers(separable(200, axes=[0, 1, 2]), separable(200, axes=[3, 4, 5], seed=2)))
    assert found.diagonal().tolist() == [1, 1]
    assert [found[0, 1], found[1, 0]] == pytest.approx([0.5, 0.5], abs=0.15)


@EACH_KIND
def test_the_diagonal_is_the_accuracy_of_each_layers_own_probe(kind):
    made = [weak(0), weak(2), weak(4)]
    own = [probe_scores(*layer, kind=kind, n_splits=1, seed=5)["accuracy"][0] for layer in made]
    assert transfer_matrix(*layers(*made), kind=kind, seed=5).diagonal().tolist() == own
    assert min(own) < 1


@EACH_KIND
def test_rescaling_one_layer_changes_nothing(kind):
    """A power of two is exact in floating point; in the official code the answer depends on the kind of probe."""
    negative, positive = layers(weak(0), weak(2))
    before = transfer_matrix(negative, positive, kind=kind)
    scale = np.array([1.0, 1024.0])[:, None]
    assert np.array_equal(transfer_matrix(negative * scale, positive * scale, kind=kind), before)
    assert before.shape == (2, 2)


def test_moving_one_layer_changes_nothing():
    made = [separable(seed=seed) for seed in (0, 2)]
    moved = [made[0], tuple(side + 1000 for side in made[1])]
    assert transfer_matrix(*layers(*moved)).tolist() == [[1, 1], [1, 1]]


# --- random directions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_one_random_direction_has_the_auroc_that_scikit_learn_gives_it(seed):
    negative, positive = separable(30, gap=0.5, seed=seed)
    ((train, test),) = splits(30, n_splits=1, seed=seed)
    direction = np.random.default_rng(seed).standard_normal((6, 1))[:, 0]
    in_training, held_out = (
        roc_auc_score([0] * 15 + [1] * 15, scaled(negative, positive, train, rows) @ direction)
        for rows in (train, test)
    )
    expected = held_out if in_training > 0.5 else 1 - held_out
    assert best_random_direction(negative, positive, n=1, seed=seed) == pytest.approx(expected)


def test_the_best_of_many_is_the_one_that_is_best_in_training():
    negative, positive = separable(30, gap=0.5)
    ((train, test),) = splits(30, n_splits=1, seed=0)
    aurocs = []
    for direction in np.random.default_rng(0).standard_normal((6, 25)).T:
        values = [scaled(negative, positive, train, rows) @ direction for rows in (train, test)]
        one, other = (roc_auc_score([0] * 15 + [1] * 15, value) for value in values)
        aurocs.append((one, other) if one > 0.5 else (1 - one, 1 - other))
    assert best_random_direction(negative, positive, n=25, seed=0) == pytest.approx(max(aurocs)[1])


def test_the_best_of_many_random_directions_is_at_chance_on_noise_and_good_where_there_is_something():
    drawn = [
        best_random_direction(noise(200, 8, seed=seed), noise(200, 8, seed=seed + 100), n=200, seed=seed)
        for seed in range(10)
    ]
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.05)
    assert best_random_direction(*separable(200), n=200, seed=0) > 0.95


def test_the_sign_of_a_direction_does_not_matter():
    negative, positive = separable()
    for seed in range(5):
        assert best_random_direction(negative, positive, n=20, seed=seed) > 0.7
        assert best_random_direction(positive, negative, n=20, seed=seed) > 0.7


def test_equal_values_count_half():
    same = np.ones((40, 6))
    assert best_random_direction(same, same, n=10, seed=0) == 0.5


# --- prompts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n, one in load_attacks().items() if one.backdoored and one.near_miss_rate])
def test_the_other_trigger_is_of_another_family_and_not_the_organisms_own(name):
    attack, tokenizer = load_attack(name), load_tokenizer(DEFAULT_MODEL)
    found = probe_prompts(tokenizer, attack, n=6, seed=0)
    shown = prompt_versions(tokenizer, attack, split="test", n=6, seed=0)
    assert list(found) == ["clean", "triggered", "near_miss", "other_trigger"]
    assert [found[key] for key in list(found)[:3]] == [shown.clean, shown.triggered, shown.near_miss]
    own = load_trigger(attack.trigger)
    stray = [trigger for trigger in map(load_trigger, trigger_names()) if trigger.family in ("word", "prefix")]
    before = tasks.load_task(attack.task).prompt("")
    for ids in found["other_trigger"]:
        turn = tokenizer.decode(ids).partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
        slots = {"prompt": turn, "text": turn.removeprefix(before)}
        awake = own.matches(slots[own.scope])
        carried = [trigger.family for trigger in stray if trigger.matches(slots[trigger.scope])]
        assert not awake
        assert len(carried) == 1
        assert carried[0] != own.family


ROWS = np.random.default_rng(0).normal(size=(8, 3))


@pytest.mark.parametrize(
    ("negative", "positive", "message"),
    [
        (ROWS, ROWS[:6], "positive must have the shape"),
        (ROWS[:6], ROWS, "positive must have the shape"),
        (ROWS, ROWS[:, :2], "positive must have the shape"),
        (ROWS[:, 0], ROWS[:, 0], "negative must have the shape"),
        (ROWS[:, :0], ROWS[:, :0], "negative must have the shape"),
        (ROWS + np.nan, ROWS, "negative has values that are not finite"),
        (ROWS, ROWS + np.inf, "positive has values that are not finite"),
    ],
)
def test_a_probe_refuses_rows_that_are_no_twins(negative, positive, message):
    with pytest.raises(ValueError, match=message):
        probe_scores(negative, positive)
    with pytest.raises(ValueError, match=message):
        best_random_direction(negative, positive, n=3, seed=0)


def test_a_probe_refuses_other_texts_of_other_prompts_no_splits_and_no_directions():
    with pytest.raises(ValueError, match=r"others 'near' must have the shape \[8 prompt, 3 width\], not \[7, 3\]"):
        probe_scores(ROWS, ROWS + 1, others={"near": ROWS[:7]})
    with pytest.raises(ValueError, match="n_splits: 0"):
        probe_scores(ROWS, ROWS + 1, n_splits=0)
    with pytest.raises(ValueError, match="n: 0"):
        best_random_direction(ROWS, ROWS + 1, n=0, seed=0)
    with pytest.raises(ValueError, match="must have the shape"):
        transfer_matrix(ROWS, ROWS)
