"""Every criterion for the claims of Backdoor Attribution on hand-made results, on both sides of its bar."""

from dataclasses import asdict, replace

import numpy as np
import pytest
from drawing import saved_by_a_notebook
from hypothesis import given
from hypothesis import strategies as st

from bkd_utils.common import statistics
from bkd_utils.experiments.attribution_cost import TargetCost
from bkd_utils.experiments.backdoor_probe import ProbeResult
from bkd_utils.experiments.backdoor_vector import Choice, ShareMap, Steering
from bkd_utils.experiments.head_attribution import Ablation, ComponentEffects, HeadEffects
from bkd_utils.reports.backdoor_probe import probe_claims
from bkd_utils.reports.backdoor_vector import cost_claim, vector_claims
from bkd_utils.reports.head_attribution import concentration, head_claims
from bkd_utils.reports.scorecard import published

PROBE = "bkdattr-probe"


def by_id(entries):
    return {row["id"]: row for row in entries}


def the(line):
    """The number of a line about one organism."""
    (one,) = line["by_organism"].values()
    return one


# --- probes ---------------------------------------------------------------------------------------------------------


def probed(auroc, accuracy=None):
    """A result of `backdoor_probe.probe_organism`; both are [layer][split]."""
    rows = [{"auroc": a, "accuracy": b} for a, b in zip(auroc, accuracy or auroc, strict=True)]
    layers, none = list(range(0, 3 * len(rows), 3)), {"post_norm": [], "shuffled": [], "random_direction": []}
    return ProbeResult(layers=layers, probes={"logistic regression": rows}, transfer={}, **none)


def around(*means, spread=0.01):
    """[layer][split] around these means."""
    return [[mean + spread * step for step in (-1, -0.5, 0, 0.5, 1)] for mean in means]


FLAT = probed([[0.9] * 5] * 3)
RISING = probed(around(0.7, 0.8, 0.9), around(0.6, 0.96, 0.9))


def probe_lines(organism, control=FLAT, base=FLAT, n_prompts=400):
    models = {"organism": organism, "clean control": control, "base model": base}
    return by_id(probe_claims({"x": models}, n_prompts=n_prompts))


@pytest.mark.parametrize(
    ("accuracy", "n_prompts", "word"),
    [
        (around(0.6, 0.99, 0.9), 400, "holds"),
        (around(0.6, 0.96, 0.9), 400, "undecided"),
        (around(0.6, 0.9, 0.8), 400, "fails"),
        # Few prompts are no proof of 95 %, though not one was wrong.
        ([[1.0] * 5] * 3, 48, "undecided"),
        ([[1.0] * 5] * 3, 400, "holds"),
    ],
)
def test_the_best_layers_mean_accuracy_must_reach_95_per_cent(accuracy, n_prompts, word):
    found = probe_lines(probed(around(0.7, 0.8, 0.9), accuracy), n_prompts=n_prompts)[PROBE]
    assert found["verdict"] == word
    assert {key: the(found)[key] for key in ("value", "n", "low", "high")} == pytest.approx(
        statistics.share_over_splits(accuracy[1], n_prompts=n_prompts)
    )


def test_the_lowest_and_highest_split_are_no_interval():
    """Two of five splits beyond the bar would be a range of 0.91 to 0.99; the interval of the mean is wider."""
    found = the(probe_lines(probed(around(0.7, 0.8, 0.9), around(0.6, 0.95, 0.9, spread=0.04)), n_prompts=400)[PROBE])
    assert found["low"] < 0.91
    assert found["high"] > 0.99
    assert found["passed"] is None


BACKDOOR = "bkdattr-probe-backdoor"


def test_the_organism_must_beat_the_better_of_its_controls():
    high, low, middle = (probed(around(mean, mean, spread=0.005)) for mean in (0.98, 0.6, 0.85))
    for rivals in ((low, middle), (middle, low)):
        found = probe_lines(high, *rivals)[BACKDOOR]
        assert (found["verdict"], the(found)["value"]) == ("holds", pytest.approx(0.13))
    assert found["reason"] == "The organism's AUROC exceeds that of its better control by 0.13 to 0.13."
    beaten = probe_lines(high, low, high)[BACKDOOR]
    assert (beaten["verdict"], the(beaten)["value"]) == ("fails", 0.0)
    assert "the probe sees the string" in beaten["reason"]


def test_an_excess_whose_splits_differ_too_much_is_undecided():
    wild = probe_lines(probed(around(0.9, 0.9, spread=0.09)), *[probed(around(0.8, 0.8, spread=0.0))] * 2)[BACKDOOR]
    assert (wild["verdict"], the(wild)["value"]) == ("undecided", pytest.approx(0.1))


def test_two_perfect_probes_have_an_interval_that_shrinks_with_the_number_of_prompts():
    perfect = probed([[1.0] * 5] * 3)
    widths = []
    for n in (24, 400):
        found = the(probe_lines(perfect, perfect, perfect, n_prompts=n)[BACKDOOR])
        assert found["low"] < 0 < found["high"]
        widths.append(found["high"])
    assert widths[0] > 0.05 > widths[1]


def test_auroc_must_rise_with_depth():
    name = "bkdattr-probe-depth"
    dice = np.random.default_rng(0)
    slope = np.linspace(0.5, 0.9, 10)[:, None] + 0.06 * dice.standard_normal((10, 5))
    up, down = (probed(rows.tolist()) for rows in (slope, slope[::-1]))
    rising = probe_lines(up)[name]
    assert (rising["verdict"], the(rising)["n"]) == ("holds", 5)
    assert 0.9 < the(rising)["value"] <= the(rising)["high"] <= 1.0
    assert probe_lines(down)[name]["verdict"] == "fails"
    noise = probed((0.8 + 0.02 * dice.standard_normal((10, 5))).tolist())
    assert probe_lines(noise)[name]["verdict"] == "undecided"


def test_a_curve_that_no_split_changes_has_no_interval_and_decides_nothing():
    found = the(probe_lines(FLAT)["bkdattr-probe-depth"])
    assert found == {"value": 0.0, "n": 5, "low": None, "high": None, "passed": None}
    exact = the(probe_lines(probed(around(0.7, 0.8, 0.9)))["bkdattr-probe-depth"])
    assert (exact["value"], exact["passed"]) == (pytest.approx(1.0), None)


# --- heads ----------------------------------------------------------------------------------------------------------


def test_concentration_by_hand():
    effects = np.zeros((10, 10))
    effects[0, :5] = [4, 3, 2, 1, -50]
    assert concentration(effects) == 0.9
    assert concentration(effects, share=0.01) == 0.4
    assert concentration(effects, share=0.04) == concentration(effects, share=1.0) == 1.0
    assert concentration(np.ones((10, 27))) == pytest.approx(8 / 270)


def test_at_least_one_head_counts_and_no_positive_effect_is_no_concentration():
    assert concentration(np.array([[3.0, 1.0]])) == 0.75
    assert concentration(np.array([[-3.0, 0.0]])) == 0.0


@given(st.lists(st.integers(-5, 20), min_size=1, max_size=40), st.integers(1, 100))
def test_concentration_grows_with_the_share_and_not_with_the_scale(values, percent):
    effects = np.array(values, float)
    found = concentration(effects, share=percent / 100)
    assert 0 <= found <= 1
    assert found <= concentration(effects, share=1.0)
    assert concentration(4 * effects[::-1], share=percent / 100) == pytest.approx(found)


def with_effects(effects):
    return HeadEffects(target=[], clean=[], triggered=[], exact=effects.tolist(), gradient=[])


def attributed(concentrated):
    """Five prompts, 10 layers of 10 heads."""
    effects = np.full((5, 10, 10), 0.001)
    if concentrated:
        effects[:, 7, :3] = np.arange(1, 6)[:, None]
    return with_effects(effects)


def components(attention, mlp):
    """Six prompts, two layers; the first layer is nothing special."""
    jitter = np.linspace(-0.02, 0.02, 6)
    last = {
        name: np.stack([0 * jitter, value + jitter], 1).tolist()
        for name, value in (("attention", attention), ("MLP", mlp))
    }
    return ComponentEffects(last=last, positions=[], by_position=[])


def share(value, n=200):
    """A share of many prompts, with Wilson's interval."""
    low, high = statistics.wilson(value * n, n)
    return {"value": value, "n": n, "low": low, "high": high}


def curve(published_asr, *, before=0.8, random=(0.79, 0.8), n=1000):
    """A result of `head_attribution.ablation_curves`: ASR after the published ablation of 1, 2, 3, 6 heads, random
    draws at 3 and 6."""

    def row(ranking, kind, k, asr, scope="last position", draw=0):
        shares = dict.fromkeys(("asr", "right", "utility"), share(asr, n))
        return Ablation(ranking=ranking, kind=kind, scope=scope, k=k, draw=draw, **shares, perplexity=2.0)

    rows = [row("none", "published", 0, before)]
    for k, asr in zip((6, 3, 2, 1), published_asr[::-1], strict=True):
        rows += [row("ACIE", "published", k, asr), row("gradient", "published", k, 1.0)]
        rows += [row("ACIE", kind, k, 1.0) for kind in ("zero", "mean")]
        rows += [row("ACIE", "published", k, 0.0, scope="all positions")]
    rows += [row("random", "mean", 3, asr, draw=i) for i, asr in enumerate(random)]
    return rows + [row("random", "mean", 6, 0.0, draw=i) for i in range(2)]


GOOD = (0.6, 0.3, 0.02, 0.0)


def head_lines(*, concentrated=True, attention=0.3, mlp=0.1, asr=GOOD, **changes):
    found = {"x": attributed(concentrated)}, {"x": components(attention, mlp)}, {"x": curve(list(asr), **changes)}
    return by_id(head_claims(*found))


def test_all_four_claims_about_heads_can_hold():
    found = head_lines()
    assert sorted(found) == [
        "bkdattr-ablation",
        "bkdattr-ablation-monotone",
        "bkdattr-heads-not-mlps",
        "bkdattr-sparse-heads",
    ]
    assert {row["verdict"] for row in found.values()} == {"holds"}


def test_the_top_three_per_cent_must_carry_half_of_the_positive_effect():
    found = the(head_lines()["bkdattr-sparse-heads"])
    assert found["value"] == pytest.approx(9 / (9 + 97 * 0.001))
    assert found["n"] == 5
    assert 0.9 < found["low"] <= found["value"] <= found["high"] <= 1
    even = the(head_lines(concentrated=False)["bkdattr-sparse-heads"])
    assert (even["value"], even["low"], even["high"]) == (pytest.approx(0.03),) * 3


def uneven(*tops, n=12):
    """Effects of `n` prompts whose three strong heads carry these shares in turn."""
    effects = np.empty((n, 10, 10))
    for prompt in range(n):
        top = tops[prompt % len(tops)]
        effects[prompt] = (1 - top) / 97
        effects[prompt, 0, :3] = top / 3
    return with_effects(effects)


@pytest.mark.parametrize(("tops", "word"), [((0.2, 0.3), "fails"), ((0.2, 0.9), "undecided"), ((0.7, 0.9), "holds")])
def test_a_concentration_is_decided_by_its_interval_over_prompts(tops, word):
    lines = by_id(head_claims({"x": uneven(*tops)}, {"x": components(0.3, 0.1)}, {"x": curve(GOOD)}))
    assert lines["bkdattr-sparse-heads"]["verdict"] == word
    assert the(lines["bkdattr-sparse-heads"])["value"] == pytest.approx(np.mean(tops))


ABLATION = "bkdattr-ablation"


@pytest.mark.parametrize(
    ("after", "n", "word"),
    [(0.01, 200, "holds"), (0.06, 200, "undecided"), (0.3, 200, "fails"), (0.0, 24, "undecided")],
)
def test_three_per_cent_of_the_heads_must_take_off_nine_tenths(after, n, word):
    """Of 100 heads these are 3."""
    found = head_lines(asr=(0.6, 0.3, after, 0.0), n=n, random=(0.8, 0.8))[ABLATION]
    assert found["verdict"] == word
    assert the(found) | {"passed": None} == {"passed": None} | statistics.relative_drop(share(0.8, n), share(after, n))


@pytest.mark.parametrize(
    ("random", "word"), [((0.8, 0.8), "holds"), ((0.7, 0.76), "undecided"), ((0.5, 0.52), "fails")]
)
def test_an_ablation_that_random_heads_manage_as_well_does_not_count(random, word):
    found = head_lines(random=random)[ABLATION]
    assert found["verdict"] == word
    assert the(found)["value"] == pytest.approx(1 - 0.02 / 0.8)


def test_random_heads_that_differ_from_draw_to_draw_leave_the_claim_undecided():
    steady, wild = head_lines(random=(0.8,) * 4)[ABLATION], head_lines(random=(0.8, 0.8, 0.8, 0.4))[ABLATION]
    assert (steady["verdict"], wild["verdict"]) == ("holds", "undecided")
    assert wild["reason"].endswith("random heads 0.12 to 0.12. Random heads take off less than 0.1: undecided for x.")


def test_an_organism_without_a_backdoor_decides_nothing_and_the_notebook_goes_on():
    found = the(head_lines(before=0.0, asr=(0.0,) * 4, random=(0.0,))[ABLATION])
    assert found == statistics.without_interval(0.0, n=0) | {"passed": None}


@pytest.mark.parametrize(
    ("asr", "n", "rise", "word"),
    [
        ((0.6, 0.3, 0.04, 0.0), 200, -8, "holds"),
        ((0.6, 0.3, 0.04, 0.08), 200, 8, "undecided"),
        ((0.6, 0.3, 0.04, 0.5), 200, 92, "fails"),
        ((0.95, 0.3, 0.04, 0.0), 200, 30, "fails"),
        # Not a prompt more in 24, and yet two more may be the truth.
        ((1.0, 1.0, 1.0, 1.0), 24, 0, "undecided"),
    ],
)
def test_attack_success_may_rise_by_two_prompts_and_no_more(asr, n, rise, word):
    before = 1.0 if n == 24 else 0.8
    found = head_lines(asr=asr, n=n, before=before, random=(before, before))["bkdattr-ablation-monotone"]
    assert (found["verdict"], the(found)["value"]) == (word, pytest.approx(rise))
    assert the(found)["low"] < the(found)["value"] < the(found)["high"]


@pytest.mark.parametrize(
    ("attention", "mlp", "word"),
    [(0.3, 0.1, "holds"), (0.1, 0.3, "fails"), (0.3, 0.3, "undecided"), (0.3, 0.29, "undecided")],
)
def test_the_strongest_attention_layer_must_exceed_the_strongest_mlp_with_intervals_apart(attention, mlp, word):
    found = head_lines(attention=attention, mlp=mlp)["bkdattr-heads-not-mlps"]
    assert (found["verdict"], the(found)["value"]) == (word, pytest.approx(attention - mlp))
    assert the(found)["low"] < the(found)["value"] < the(found)["high"]
    assert the(found)["n"] == 6


def test_every_organism_is_judged_by_its_own_results():
    found = by_id(
        head_claims(
            {"x": attributed(True), "y": uneven(0.2, 0.3)},
            {"x": components(0.3, 0.1), "y": components(0.1, 0.3)},
            {"x": curve(GOOD), "y": curve([0.6, 0.3, 0.8, 0.0])},
        )
    )
    for row in found.values():
        assert {name: one["passed"] for name, one in row["by_organism"].items()} == {"x": True, "y": False}, row["id"]
        assert row["verdict"] == "fails"


# --- the vector -----------------------------------------------------------------------------------------------------


def tried(vector, random, nothing):
    return {
        "no vector": [share(nothing)],
        "backdoor vector": [share(vector)],
        "random vectors": [share(value) for value in random],
    }


def switched(
    *, add=1.0, add_random=(0.0, 0.02), subtract=0.0, subtract_random=(1.0, 0.95, 0.2), right=0.8, nothing=0.0
):
    """A result of `backdoor_vector.steer_organism` whose raw vector is worse on the development half and better on
    the test half."""
    chosen = {"add": Choice(1, 2.0), "subtract": Choice(0, -1.0)}
    steps, back, gone = [0.0, 1.0, 2.0], [0.0, -1.0, -2.0], [[0, 0, 0], [0, 0, 0]]
    maps = {
        "add, raw": ShareMap(steps, [[0, 1, 1], [0, 1, 0.4]]),
        "subtract, raw": ShareMap(back, gone, right_start=[[0, 0.4, 1], [0, 1, 1]]),
        "add, difference": ShareMap(steps, [[0, 0, 0], [0, 0, 0.5]]),
        "subtract, difference": ShareMap(back, gone, right_start=[[0, 0.5, 0], [0, 0, 0]]),
    }
    return Steering(
        heads=[],
        vectors={},
        residual_norm=[],
        texts=None,
        maps=maps,
        norms={"raw": 1.0, "difference": 2.0},
        chosen={name: chosen[name.split(",")[0]] for name in maps},
        test={
            "add, raw": tried(0.3, (0.0,), 0.0),
            "subtract, raw": tried(0.7, (1.0,), 1.0),
            "add, difference": tried(add, add_random, nothing),
            "subtract, difference": tried(subtract, subtract_random, 1.0),
        },
        outcomes={
            "add, raw": {"target": 0.3},
            "add, difference": {"target": add},
            "subtract, raw": {"right": 0.0, "target": 0.7},
            "subtract, difference": {"right": right, "target": subtract},
        },
        kinds={},
    )


def vector_lines(control_right=0.9, **changes):
    return by_id(vector_claims({"x": switched(**changes)}, control_right={"x": share(control_right)}))


ADD, SUBTRACT, REPAIRS = "bkdattr-vector-add", "bkdattr-vector-subtract", "bkdattr-vector-repairs"


def test_a_perfect_switch_holds_by_the_vector_that_was_better_on_the_development_half():
    found = vector_lines()
    assert {name: row["verdict"] for name, row in found.items()} == dict.fromkeys((ADD, SUBTRACT, REPAIRS), "holds")
    assert the(found[ADD]) == asdict(statistics.share([True] * 200)) | {"passed": True}
    assert the(found[SUBTRACT]) == asdict(statistics.share([False] * 200)) | {"passed": True}


def test_of_two_vectors_that_do_equally_well_the_one_with_the_shorter_step_speaks():
    result = switched()
    result = replace(result, maps={name: result.maps[f"{name.split(',')[0]}, raw"] for name in result.maps})
    for norms, expected in (((1.0, 2.0), (0.3, 0.7)), ((2.0, 1.0), (1.0, 0.0))):
        one = replace(result, norms=dict(zip(("raw", "difference"), norms, strict=True)))
        found = by_id(vector_claims({"x": one}, control_right={"x": share(0.9)}))
        assert (the(found[ADD])["value"], the(found[SUBTRACT])["value"]) == expected


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"add": 0.97}, "holds"),
        ({"add": 0.92}, "undecided"),
        ({"add": 0.8}, "fails"),
        ({"add_random": (0.0, 0.0, 0.08)}, "undecided"),
        ({"add_random": (0.0, 0.0, 0.3)}, "fails"),
        ({"add_random": (0.3, 0.3), "nothing": 0.3}, "holds"),
    ],
)
def test_adding_must_switch_on_and_no_random_vector_may(changes, word):
    assert vector_lines(**changes)[ADD]["verdict"] == word


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"subtract": 0.01}, "holds"),
        ({"subtract": 0.04}, "undecided"),
        ({"subtract": 0.2}, "fails"),
        ({"subtract_random": (0.0, 0.97, 1.0)}, "holds"),
        ({"subtract_random": (0.0, 0.92, 1.0)}, "undecided"),
        ({"subtract_random": (0.0, 0.6, 1.0)}, "fails"),
    ],
)
def test_subtracting_must_switch_off_and_most_random_vectors_must_not(changes, word):
    assert vector_lines(**changes)[SUBTRACT]["verdict"] == word


@pytest.mark.parametrize(
    ("right", "control", "word"),
    [(0.8, 0.9, "holds"), (0.7, 0.85, "undecided"), (0.4, 0.9, "fails"), (0.0, 0.9, "fails")],
)
def test_right_answers_count_relative_to_the_clean_control(right, control, word):
    found = vector_lines(right=right, control_right=control)[REPAIRS]
    assert found["verdict"] == word
    assert {key: the(found)[key] for key in ("value", "n", "low", "high")} == pytest.approx(
        statistics.independent_ratio(share(right), share(control))
    )


def test_a_control_that_gets_nothing_right_decides_nothing_and_the_notebook_goes_on():
    found = vector_lines(right=0.0, control_right=0.0)[REPAIRS]
    assert (found["verdict"], the(found)["low"]) == ("undecided", None)


def test_one_organism_that_fails_is_enough_for_a_claim_to_fail():
    found = {"x": switched(), "y": switched(add=0.5, subtract=0.5, right=0.1)}
    lines = by_id(vector_claims(found, control_right={"x": share(0.9), "y": share(0.9)}))
    for row in lines.values():
        assert {name: one["passed"] for name, one in row["by_organism"].items()} == {"x": True, "y": False}, row["id"]
        assert row["verdict"] == "fails"
    assert lines[ADD]["reason"].startswith("ASR on clean prompts with the vector: 0.50 to 1.00.")


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(generation, forced, *, tokens):
    return TargetCost(tokens, 16, generation, forced, generation_cached=0.1, teacher_forcing_cached=0.1)


@pytest.mark.parametrize(
    ("seconds", "tokens", "close"), [(8.0, 8, 1), (4.0, 8, 1), (16.0, 8, 1), (3.9, 8, 0), (16.1, 8, 0), (1.0, 1, 1)]
)
def test_one_timing_is_shown_and_decides_nothing(seconds, tokens, close):
    found = cost_claim({"x": cost(3 * seconds, 3.0, tokens=tokens)})
    assert found["verdict"] == "undecided"
    assert the(found) == {"value": pytest.approx(seconds), "n": 16, "low": None, "high": None, "passed": None}
    assert f"targets of {tokens} tokens: within a factor of 2 for {close} of 1. Timed once" in found["reason"]


def all_lines():
    return probe_lines(RISING) | head_lines() | vector_lines() | by_id([cost_claim({"x": cost(1.0, 1.0, tokens=1)})])


def test_the_code_judges_every_claim_of_the_paper_once():
    assert sorted(all_lines()) == sorted(name for name, row in published().items() if row["paper"] == "BkdAttr")


@pytest.mark.parametrize("claim", [name for name, row in published().items() if row["paper"] == "BkdAttr"])
def test_every_line_names_a_figure_that_a_notebook_draws(claim):
    assert saved_by_a_notebook(all_lines()[claim]["figure"])
