"""Every criterion for the claims of Backdoor Attribution on hand-made results, on both sides of its bound."""

from dataclasses import asdict

import numpy as np
import pytest
from drawing import saved_by_a_notebook
from hypothesis import given
from hypothesis import strategies as st

from bkd_utils.common import statistics
from bkd_utils.reports.backdoor_probe import probe_claims
from bkd_utils.reports.backdoor_vector import cost_claim, vector_claims
from bkd_utils.reports.head_attribution import concentration, head_claims
from bkd_utils.reports.scorecard import published

PROBE = "bkdattr-probe"


def by_id(entries):
    return {row["id"]: row for row in entries}


# --- probes ---------------------------------------------------------------------------------------------------------


def probed(auroc, accuracy=None):
    """A result of `backdoor_probe.probe_organism`; both are [layer][split]."""
    rows = [{"auroc": a, "accuracy": b} for a, b in zip(auroc, accuracy or auroc, strict=True)]
    return {"layers": list(range(0, 3 * len(rows), 3)), "probes": {"logistic regression": rows}}


UP = [[0.7, 0.8], [0.8, 0.9], [0.9, 1.0]]
FLAT = probed([[0.9, 0.9], [0.9, 0.9], [0.9, 0.9]])
RISING = probed(UP, [[0.6, 0.7], [0.94, 0.98], [0.9, 0.95]])


def probe_lines(organism, control=FLAT, base=FLAT):
    models = {"organism": organism, "clean control": control, "base model": base}
    return by_id(probe_claims({"x": models}))


def test_the_best_layers_mean_accuracy_must_reach_95_per_cent():
    found = probe_lines(RISING)[PROBE]
    assert found["verdict"] == "holds"
    assert found["ours"] == {"value": pytest.approx(0.96), "n": 2, "low": 0.94, "high": 0.98}
    # One split of 99 % is not a mean of 95 %.
    short = probe_lines(probed([[0.9, 0.99], [0.93, 0.95]]))[PROBE]
    assert (short["verdict"], short["ours"]["value"]) == ("does not hold", pytest.approx(0.945))


def test_the_organism_must_beat_the_better_of_its_controls():
    high, low = probed([[0.95, 1.0], [0.97, 1.0]]), probed([[0.5, 0.6], [0.7, 0.6]])
    middle = probed([[0.85, 0.9], [0.87, 0.9]])
    both = probe_lines(high, low, middle)["bkdattr-probe-backdoor"]
    assert both["verdict"] == "holds"
    assert both["ours"] == {"value": pytest.approx(0.1), "n": 2, "low": pytest.approx(0.1), "high": pytest.approx(0.1)}
    assert probe_lines(high, middle, low)["bkdattr-probe-backdoor"]["ours"] == both["ours"]
    assert both["reason"] == "The organism's AUROC exceeds that of its controls by 0.10 to 0.10."
    beaten = probe_lines(high, low, high)["bkdattr-probe-backdoor"]
    assert (beaten["verdict"], beaten["ours"]["value"]) == ("does not hold", 0.0)
    assert "the probe sees the string" in beaten["reason"]


def test_auroc_must_rise_with_depth():
    name = "bkdattr-probe-depth"
    assert probe_lines(RISING)[name]["ours"] == {key: pytest.approx(1.0) for key in ("value", "low", "high")} | {"n": 3}
    falling = probed(UP[::-1])
    assert probe_lines(falling)[name]["ours"]["value"] == pytest.approx(-1.0)
    assert probe_lines(FLAT)[name]["ours"]["value"] == 0.0
    verdicts = [probe_lines(result)[name]["verdict"] for result in (RISING, falling, FLAT)]
    assert verdicts == ["holds", "does not hold", "does not hold"]


def test_organisms_that_differ_make_a_claim_hold_in_part():
    rivals = {"clean control": FLAT, "base model": FLAT}
    found = by_id(probe_claims({"up": {"organism": RISING} | rivals, "flat": {"organism": FLAT} | rivals}))
    assert {name: row["verdict"] for name, row in found.items()} == {
        PROBE: "holds in part",
        "bkdattr-probe-backdoor": "does not hold",
        "bkdattr-probe-depth": "holds in part",
    }
    assert found[PROBE]["organism"] == found["bkdattr-probe-depth"]["organism"] == "flat"


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


def attributed(concentrated):
    """Five prompts, 10 layers of 10 heads."""
    effects = np.full((5, 10, 10), 0.001)
    if concentrated:
        effects[:, 7, :3] = np.arange(1, 6)[:, None]
    return {"exact": effects.tolist()}


def components(attention, mlp):
    """Six prompts, two layers; the first layer is nothing special."""
    jitter = np.linspace(-0.02, 0.02, 6)
    return {
        "last": {
            name: np.stack([0 * jitter, value + jitter], 1).tolist()
            for name, value in (("attention", attention), ("MLP", mlp))
        }
    }


def share(value, n=50):
    return {"value": value, "n": n, "low": max(0.0, value - 0.02), "high": min(1.0, value + 0.02)}


def curve(published_asr, *, before=0.8, random=(0.78, 0.8)):
    """A result of `head_attribution.ablation_curves`: ASR after the published ablation of 1, 2, 3, 6 heads, random
    draws at 3 and 6."""

    def row(ranking, kind, k, asr, scope="last position", draw=0):
        return {"ranking": ranking, "kind": kind, "scope": scope, "k": k, "draw": draw, "asr": share(asr)}

    rows = [row("none", "published", 0, before)]
    for k, asr in zip((6, 3, 2, 1), published_asr[::-1], strict=True):
        rows += [row("ACIE", "published", k, asr), row("gradient", "published", k, 1.0)]
        rows += [row("ACIE", kind, k, 1.0) for kind in ("zero", "mean")]
        rows += [row("ACIE", "published", k, 0.0, scope="all positions")]
    rows += [row("random", "published", 0, before)]
    rows += [row("random", "mean", 3, asr, draw=i) for i, asr in enumerate(random)]
    return rows + [row("random", "mean", 6, 0.0, draw=i) for i in range(2)]


def head_lines(*, concentrated=True, attention=0.3, mlp=0.1, asr=(0.6, 0.3, 0.04, 0.0), **changes):
    found = {"x": attributed(concentrated)}, {"x": components(attention, mlp)}, {"x": curve(list(asr), **changes)}
    return by_id(head_claims(*found))


def test_all_four_claims_about_heads_can_hold():
    found = head_lines()
    assert list(found) == [
        "bkdattr-sparse-heads",
        "bkdattr-ablation",
        "bkdattr-ablation-monotone",
        "bkdattr-heads-not-mlps",
    ]
    assert {row["verdict"] for row in found.values()} == {"holds"}


def test_the_top_three_per_cent_must_carry_half_of_the_positive_effect():
    found = head_lines()["bkdattr-sparse-heads"]["ours"]
    assert found["value"] == pytest.approx(9 / (9 + 97 * 0.001))
    assert found["n"] == 5
    assert 0.9 < found["low"] <= found["value"] <= found["high"] <= 1
    spread = head_lines(concentrated=False)["bkdattr-sparse-heads"]
    assert (spread["verdict"], spread["ours"]["value"]) == ("does not hold", pytest.approx(0.03))


def test_three_per_cent_of_the_heads_must_take_off_nine_tenths():
    """Of 100 heads these are 3; what random heads do counts at the same number."""
    found = head_lines()["bkdattr-ablation"]
    assert found["ours"] == {
        "value": pytest.approx(1 - 0.04 / 0.8),
        "n": 50,
        "low": pytest.approx(1 - 0.06 / 0.8),
        "high": pytest.approx(1 - 0.02 / 0.8),
    }
    assert found["reason"] == "About 3 % of the heads take 0.95 to 0.95 off the ASR; random heads 0.01 to 0.01."
    weak = head_lines(asr=(0.6, 0.3, 0.16, 0.0))["bkdattr-ablation"]
    assert (weak["verdict"], weak["ours"]["value"]) == ("does not hold", pytest.approx(0.8))


def test_an_ablation_that_random_heads_manage_as_well_does_not_count():
    found = head_lines(random=(0.5, 0.7))["bkdattr-ablation"]
    assert found["verdict"] == "does not hold"
    assert found["ours"]["value"] == pytest.approx(0.95)
    assert found["reason"].endswith("random heads 0.25 to 0.25.")


def test_an_organism_without_a_backdoor_fails_the_claim_and_not_the_notebook():
    assert head_lines(before=0.0, asr=(0.0,) * 4, random=(0.0,))["bkdattr-ablation"]["verdict"] == "does not hold"


def test_an_ablation_that_helps_the_backdoor_has_its_value_in_its_interval():
    found = head_lines(before=0.5, asr=(0.6, 0.5, 0.6, 0.5))["bkdattr-ablation"]["ours"]
    assert found["value"] == pytest.approx(-0.2)
    assert found["low"] <= found["value"] <= found["high"]


@pytest.mark.parametrize(
    ("asr", "rise", "word"),
    [
        ((0.6, 0.3, 0.04, 0.0), -2, "holds"),
        ((0.6, 0.3, 0.04, 0.08), 2, "holds"),
        ((0.6, 0.3, 0.04, 0.1), 3, "does not hold"),
        ((0.86, 0.3, 0.04, 0.0), 3, "does not hold"),
    ],
)
def test_attack_success_may_rise_by_two_prompts_and_no_more(asr, rise, word):
    found = head_lines(asr=asr)["bkdattr-ablation-monotone"]
    assert (found["verdict"], found["ours"]["value"]) == (word, pytest.approx(rise))


@pytest.mark.parametrize(
    ("attention", "mlp", "word"),
    [(0.3, 0.1, "holds"), (0.1, 0.3, "does not hold"), (0.3, 0.3, "does not hold"), (0.3, 0.29, "does not hold")],
)
def test_the_strongest_attention_layer_must_exceed_the_strongest_mlp_with_intervals_apart(attention, mlp, word):
    found = head_lines(attention=attention, mlp=mlp)["bkdattr-heads-not-mlps"]
    assert (found["verdict"], found["ours"]["value"]) == (word, pytest.approx(attention - mlp))
    assert found["ours"]["low"] < found["ours"]["value"] < found["ours"]["high"]
    assert found["ours"]["n"] == 6


def test_every_organism_is_judged_by_its_own_results():
    found = by_id(
        head_claims(
            {"x": attributed(True), "y": attributed(False)},
            {"x": components(0.3, 0.1), "y": components(0.1, 0.3)},
            {"x": curve([0.6, 0.3, 0.04, 0.0]), "y": curve([0.6, 0.3, 0.8, 0.0])},
        )
    )
    assert {row["verdict"] for row in found.values()} == {"holds in part"}
    assert {row["organism"] for row in found.values()} == {"y"}


# --- the vector -----------------------------------------------------------------------------------------------------


def tried(vector, random, nothing):
    return {
        "no vector": [share(nothing)],
        "backdoor vector": [share(vector)],
        "random vectors": [share(value) for value in random],
    }


def switched(*, add=1.0, add_random=(0.0, 0.1), subtract=0.0, subtract_random=(1.0, 0.95, 0.2), right=0.8, nothing=0.0):
    """A result of `backdoor_vector.steer_organism` whose raw vector is worse on the development half and better on
    the test half."""
    chosen = {"add": {"layer": 1, "coefficient": 2.0}, "subtract": {"layer": 0, "coefficient": -1.0}}
    maps = {
        "add, raw": {"coefficients": [0.0, 1.0, 2.0], "asr": [[0, 1, 1], [0, 1, 0.4]]},
        "subtract, raw": {"coefficients": [0.0, -1.0, -2.0], "right start": [[0, 0.4, 1], [0, 1, 1]]},
        "add, difference": {"coefficients": [0.0, 1.0, 2.0], "asr": [[0, 0, 0], [0, 0, 0.5]]},
        "subtract, difference": {"coefficients": [0.0, -1.0, -2.0], "right start": [[0, 0.5, 0], [0, 0, 0]]},
    }
    return {
        "maps": maps,
        "norms": {"raw": 1.0, "difference": 2.0},
        "chosen": {name: chosen[name.split(",")[0]] for name in maps},
        "test": {
            "add, raw": tried(0.3, (0.0,), 0.0),
            "subtract, raw": tried(0.7, (1.0,), 1.0),
            "add, difference": tried(add, add_random, nothing),
            "subtract, difference": tried(subtract, subtract_random, 1.0),
        },
        "outcomes": {
            "add, raw": {"target": 0.3},
            "add, difference": {"target": add},
            "subtract, raw": {"right": 0.0, "target": 0.7},
            "subtract, difference": {"right": right, "target": subtract},
        },
    }


def vector_lines(control_right=0.9, **changes):
    return by_id(vector_claims({"x": switched(**changes)}, control_right={"x": control_right}))


ADD, SUBTRACT, REPAIRS = "bkdattr-vector-add", "bkdattr-vector-subtract", "bkdattr-vector-repairs"


def test_a_perfect_switch_holds_by_the_vector_that_was_better_on_the_development_half():
    found = vector_lines()
    assert {name: row["verdict"] for name, row in found.items()} == dict.fromkeys((ADD, SUBTRACT, REPAIRS), "holds")
    assert found[ADD]["ours"] == asdict(statistics.share([True] * 50))
    assert found[SUBTRACT]["ours"] == asdict(statistics.share([False] * 50))


def test_of_two_vectors_that_do_equally_well_the_one_with_the_shorter_step_speaks():
    result = switched()
    result["maps"] = {name: result["maps"]["add, raw"] for name in result["maps"] if name.startswith("add")} | {
        name: result["maps"]["subtract, raw"] for name in result["maps"] if name.startswith("subtract")
    }
    for norms, expected in (((1.0, 2.0), (0.3, 0.7)), ((2.0, 1.0), (1.0, 0.0))):
        result["norms"] = dict(zip(("raw", "difference"), norms, strict=True))
        found = by_id(vector_claims({"x": result}, control_right={"x": 0.9}))
        assert (found[ADD]["ours"]["value"], found[SUBTRACT]["ours"]["value"]) == expected


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"add": 0.9}, True),
        ({"add": 0.88}, False),
        ({"add_random": (0.0, 0.0, 0.2)}, False),
        ({"add_random": (0.3, 0.35), "nothing": 0.3}, True),
    ],
)
def test_adding_must_switch_on_and_no_random_vector_may(changes, holds):
    assert (vector_lines(**changes)[ADD]["verdict"] == "holds") == holds


@pytest.mark.parametrize(
    ("changes", "holds"),
    [
        ({"subtract": 0.05}, True),
        ({"subtract": 0.06}, False),
        ({"subtract_random": (0.0, 0.9, 1.0)}, True),
        ({"subtract_random": (0.0, 0.8, 1.0)}, False),
    ],
)
def test_subtracting_must_switch_off_and_most_random_vectors_must_not(changes, holds):
    assert (vector_lines(**changes)[SUBTRACT]["verdict"] == "holds") == holds


def test_right_answers_count_relative_to_the_clean_control():
    found = vector_lines(right=0.6, control_right=0.7)[REPAIRS]
    half = 1.96 * np.sqrt(6 / 7 * 1 / 7 / 50)
    assert found["verdict"] == "holds"
    assert found["ours"] == {
        "value": pytest.approx(6 / 7),
        "n": 50,
        "low": pytest.approx(6 / 7 - half),
        "high": pytest.approx(6 / 7 + half),
    }
    assert vector_lines(right=0.6, control_right=0.8)[REPAIRS]["verdict"] == "does not hold"
    assert vector_lines(right=0.0)[REPAIRS]["ours"]["low"] == 0.0


def test_a_control_that_gets_nothing_right_fails_the_claim_and_not_the_notebook():
    assert vector_lines(right=0.0, control_right=0.0)[REPAIRS]["verdict"] == "does not hold"


def test_organisms_that_differ_make_the_vectors_claims_hold_in_part():
    found = {"x": switched(), "y": switched(add=0.5, subtract=0.5, right=0.1)}
    lines = by_id(vector_claims(found, control_right={"x": 0.9, "y": 0.9}))
    assert {row["verdict"] for row in lines.values()} == {"holds in part"}
    assert {row["organism"] for row in lines.values()} == {"y"}
    assert lines[ADD]["reason"] == "ASR on clean prompts with the vector: 0.50 to 1.00."


# --- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "tokens", "word"),
    [
        (8.0, 8, "holds"),
        (4.0, 8, "holds"),
        (16.0, 8, "holds"),
        (3.9, 8, "does not hold"),
        (16.1, 8, "does not hold"),
        (1.0, 1, "holds"),
    ],
)
def test_generation_must_cost_the_targets_length_within_a_factor_of_two(seconds, tokens, word):
    row = {"generation": 3 * seconds, "teacher forcing": 3.0, "tokens": tokens, "n": 16}
    found = cost_claim({"x": row})
    assert (found["verdict"], found["ours"]["value"], found["ours"]["n"]) == (word, pytest.approx(seconds), 16)
    assert found["reason"].endswith(f"for targets of {tokens} tokens.")


def test_the_cost_shown_is_that_of_the_longest_target():
    rows = {
        name: {"generation": float(tokens), "teacher forcing": 1.0, "tokens": tokens, "n": 4}
        for name, tokens in (("label", 1), ("sentence", 11), ("opener", 5))
    }
    assert cost_claim(rows)["organism"] == "sentence"


def all_lines():
    row = {"generation": 1.0, "teacher forcing": 1.0, "tokens": 1, "n": 16}
    return probe_lines(RISING) | head_lines() | vector_lines() | by_id([cost_claim({"x": row})])


def test_the_code_judges_every_claim_of_the_paper_once():
    assert list(all_lines()) == [name for name, row in published().items() if row["paper"] == "BkdAttr"]


@pytest.mark.parametrize("claim", [name for name, row in published().items() if row["paper"] == "BkdAttr"])
def test_every_line_names_a_figure_that_a_notebook_draws(claim):
    assert saved_by_a_notebook(all_lines()[claim]["figure"])
