"""Every criterion for the claims of Backdoor Attribution on hand-made results, on both sides of its bar."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from bkdattr_results import ablated, effects, hits
from drawing import saved_by_a_notebook

from bkd_utils.common import statistics
from bkd_utils.experiments.attribution_cost import TargetCost
from bkd_utils.experiments.backdoor_probe import ProbeResult
from bkd_utils.experiments.backdoor_vector import Choice, ShareMap, Steering
from bkd_utils.experiments.head_attribution import ComponentEffects
from bkd_utils.reports.backdoor_probe import probe_claims
from bkd_utils.reports.backdoor_vector import cost_claim, vector_claims
from bkd_utils.reports.head_ablation import head_claims
from bkd_utils.reports.scorecard import published

KINDS = ("specific", "plain")


def by_id(entries):
    return {row["id"]: row for row in entries}


def the(line):
    """The number of a line about one organism."""
    (one,) = line["by_organism"].values()
    return one


def passed(line):
    return {name: one["passed"] for name, one in line["by_organism"].items()}


# --- probes ---------------------------------------------------------------------------------------------------------

PROBE, BACKDOOR, DEPTH = "bkdattr-probe", "bkdattr-probe-backdoor", "bkdattr-probe-depth"


def around(*means, spread=0.01):
    """[layer][split] around these means."""
    return [[mean + spread * step for step in (-1, -0.5, 0, 0.5, 1)] for mean in means]


FLAT = [[0.9] * 5] * 3
RISING = around(1.0, 2.0, 3.0, spread=0.1)


def probed(accuracy=FLAT, *, near=FLAT, separation=RISING):
    """A result of `backdoor_probe.probe_organism`; all are [layer][split]."""
    rows = [
        {"auroc": [0.5] * 5, "accuracy": a, "near_miss": b, "separation": c}
        for a, b, c in zip(accuracy, near, separation, strict=True)
    ]
    layers, none = list(range(0, 3 * len(rows), 3)), {"post_norm": [], "shuffled": [], "random_direction": []}
    return ProbeResult(layers=layers, probes={"logistic regression": rows}, transfer={}, **none)


def probe_lines(organism, control=None, base=None, *, n_prompts=400, kind="specific"):
    models = {"organism": organism, "clean control": control or probed(), "base model": base or probed()}
    return by_id(probe_claims({"x": models}, n_prompts=n_prompts, kind=kind))


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
    found = probe_lines(probed(accuracy), n_prompts=n_prompts)[PROBE]
    assert found["verdict"] == word
    assert {key: the(found)[key] for key in ("value", "n", "low", "high")} == pytest.approx(
        statistics.share_over_splits(accuracy[1], n_prompts=n_prompts)
    )


def test_the_lowest_and_highest_split_are_no_interval():
    """Two of five splits beyond the bar would be a range of 0.91 to 0.99; the interval of the mean is wider."""
    found = the(probe_lines(probed(around(0.6, 0.95, 0.9, spread=0.04)))[PROBE])
    assert found["low"] < 0.91
    assert found["high"] > 0.99
    assert found["passed"] is None


def called(mean, spread=0.01):
    """Probes that call this share of near-misses triggered."""
    return probed(near=around(mean, mean, mean, spread=spread))


@pytest.mark.parametrize(
    ("own", "control", "base", "gap", "word"),
    [
        (0.1, 0.9, 0.3, 0.2, "holds"),
        (0.1, 0.3, 0.9, 0.2, "holds"),
        (0.1, 0.9, 0.15, 0.05, "fails"),
        (0.1, 0.9, 0.2, 0.1, "undecided"),
        (0.5, 0.3, 0.9, -0.2, "fails"),
    ],
)
def test_the_organism_must_spare_near_misses_that_the_better_of_its_controls_does_not(own, control, base, gap, word):
    found = probe_lines(called(own, spread=0.002), called(control), called(base))[BACKDOOR]
    assert (found["verdict"], the(found)["value"]) == (word, pytest.approx(gap))
    assert f"better control less organism: {gap:.2f} to {gap:.2f}." in found["reason"]


def test_a_gap_whose_splits_differ_too_much_is_undecided():
    wild = probe_lines(called(0.1, spread=0.09), called(0.3, spread=0.0), called(0.9))[BACKDOOR]
    assert (wild["verdict"], the(wild)["value"]) == ("undecided", pytest.approx(0.2))


def test_a_gap_that_is_the_same_in_every_split_has_an_interval_that_shrinks_with_the_number_of_prompts():
    widths = []
    for n in (24, 4000):
        found = the(probe_lines(called(0.0, spread=0.0), *[called(0.2, spread=0.0)] * 2, n_prompts=n)[BACKDOOR])
        assert found["low"] < found["value"] < found["high"]
        widths.append(found["high"] - found["low"])
        assert found["passed"] is (None if n == 24 else True)
    assert widths[0] > 5 * widths[1]


def test_the_reason_names_how_well_probes_do_without_a_backdoor():
    assert "have a mean AUROC of 0.50 to 0.50" in probe_lines(probed())[BACKDOOR]["reason"]


def test_the_separation_must_rise_with_depth():
    dice = np.random.default_rng(0)
    slope = np.linspace(2, 30, 10)[:, None] + 3 * dice.standard_normal((10, 5))

    def line(separation):
        flat = [[0.9] * 5] * len(separation)
        return probe_lines(probed(flat, near=flat, separation=separation))[DEPTH]

    rising = line(slope.tolist())
    assert (rising["verdict"], the(rising)["n"]) == ("holds", 5)
    assert 0.9 < the(rising)["value"] <= the(rising)["high"] <= 1.0
    assert line(slope[::-1].tolist())["verdict"] == "fails"
    assert line((8 + 2 * dice.standard_normal((10, 5))).tolist())["verdict"] == "undecided"


def test_a_curve_that_no_split_changes_has_no_interval_and_decides_nothing():
    found = the(probe_lines(probed(separation=FLAT))[DEPTH])
    assert found == {"value": 0.0, "n": 5, "low": None, "high": None, "passed": None}
    exact = the(probe_lines(probed(separation=RISING))[DEPTH])
    assert (exact["value"], exact["passed"]) == (pytest.approx(1.0), None)


# --- heads ----------------------------------------------------------------------------------------------------------

SPARSE, ABLATION, MONOTONE, MLPS, SPARED = (
    f"bkdattr-{name}"
    for name in ("sparse-heads", "ablation", "ablation-monotone", "heads-not-mlps", "heads-spare-task")
)
STRONG = np.zeros((10, 10))
STRONG[7, :3] = 0.4


def attributed(*, low=0.6, high=0.9, noise=()):
    """Ten layers of ten heads; of the metrics in `noise` no head stands out from chance. The concentration of the two
    metrics that are not judged would fail."""
    maps = {metric: STRONG * (metric not in noise) for metric in ("probability", "log_prob", "logit_difference")}
    spread = {"value": (low + high) / 2, "n": 96, "low": low, "high": high}
    other = {"value": 0.1, "n": 96, "low": 0.05, "high": 0.15}
    return effects(maps, concentration={"probability": other, "log_prob": spread, "logit_difference": other})


def components(attention=0.3, mlp=0.1, *, last=(0.0, 0.0), jitter=0.02):
    """Twelve prompts, ten layers, of which the last is not judged."""
    steps = np.linspace(-jitter, jitter, 12)[:, None]
    rows = {}
    for name, value, end in (("attention", attention, last[0]), ("MLP", mlp, last[1])):
        layers = np.zeros((12, 10))
        layers[:, 4:5], layers[:, 9] = value + steps * (1 if name == "MLP" else -1), end
        rows[name] = layers.tolist()
    return ComponentEffects(last=rows | {"residual": np.full((12, 10), 9.0).tolist()})


GOOD = (0.6, 0.3, 0.02, 0.0)


def curve(
    asr=GOOD, *, before=0.8, random=(0.79, 0.8), spared=0.01, utility=(0.9, 0.88), beyond=1.0, n=1000, others=1.0
):
    """A result of `ablation_curves`: ASR after the published ablation of 1, 2, 3, 6 heads, random draws at 3 and 6,
    and the heads that only the trigger needs at their clean means. What is not judged has an ASR of `others`."""
    rows = [ablated("none", "published", 0, before, utility=utility[0], n=n)]
    for k, value in zip((6, 3, 2, 1), asr[::-1], strict=True):
        rows += [ablated("probability", "published", k, value, n=n), ablated("gradient", "published", k, others, n=n)]
        rows += [ablated("probability", kind, k, others, n=n) for kind in ("zero", "mean")]
    rows += [ablated("random", "published", 3, value, draw=i, n=n) for i, value in enumerate(random)]
    rows += [ablated("random", "published", 6, 0.0, draw=i, n=n) for i in range(2)]
    rows += [ablated("random", "mean", 3, 0.0, draw=i, n=n) for i in range(2)]
    rows += [ablated("trigger only", "mean", 16, spared, utility=utility[1], n=n)]
    rows += [ablated("trigger only", "mean", k, beyond, utility=0.0, n=n) for k in (8, 32)]
    rows += [ablated("trigger only", "published", 16, beyond, utility=0.0, n=n)]
    return rows


def head_lines(*, effects=None, parts=None, kind="specific", **changes):
    given = {"x": effects or attributed()}, {"x": parts or components()}, {"x": curve(**changes)}
    return by_id(head_claims(*given, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_all_five_claims_about_heads_can_hold_for_each_kind_of_organisms(kind):
    found = head_lines(kind=kind)
    end = "" if kind == "specific" else "-plain"
    assert list(found) == [name + end for name in (SPARSE, ABLATION, MONOTONE, MLPS, SPARED)]
    assert {row["verdict"] for row in found.values()} == {"holds"}
    assert {row["reading"] for row in found.values()} == {f"{kind} organisms"}


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [(0.51, 0.9, "holds"), (0.5, 0.9, "holds"), (0.49, 0.9, "undecided"), (0.2, 0.49, "fails")],
)
def test_the_top_three_per_cent_must_carry_half_of_the_positive_effect_in_log_probability(low, high, word):
    line = head_lines(effects=attributed(low=low, high=high))[SPARSE]
    assert line["verdict"] == word
    assert (the(line)["low"], the(line)["high"]) == (low, high)


@pytest.mark.parametrize(
    ("after", "n", "word"),
    [(0.01, 200, "holds"), (0.06, 200, "undecided"), (0.3, 200, "fails"), (0.0, 24, "undecided")],
)
def test_three_per_cent_of_the_heads_must_take_off_nine_tenths(after, n, word):
    """Of 100 heads these are 3."""
    found = head_lines(asr=(0.6, 0.3, after, 0.0), n=n, random=(0.8, 0.8))[ABLATION]
    assert found["verdict"] == word
    wanted = statistics.relative_drop(hits(0.8, n), hits(after, n))
    assert {key: the(found)[key] for key in wanted} == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("random", "word"), [((0.8, 0.8), "holds"), ((0.7, 0.76), "undecided"), ((0.5, 0.52), "fails")]
)
def test_an_ablation_that_random_heads_manage_as_well_does_not_count(random, word):
    found = head_lines(random=random)[ABLATION]
    assert found["verdict"] == word
    assert the(found)["value"] == pytest.approx(1 - 0.02 / 0.8)


def test_random_heads_that_differ_from_draw_to_draw_leave_the_claim_undecided():
    steady, wild = head_lines(random=(0.8,) * 4)[ABLATION], head_lines(random=(0.8, 0.8, 0.8, 0.6))[ABLATION]
    assert (steady["verdict"], wild["verdict"]) == ("holds", "undecided")
    assert wild["reason"].endswith("random heads 0.06 to 0.06.")


def test_twenty_steady_draws_on_few_prompts_are_no_proof_that_random_heads_do_nothing():
    """All draws share the prompts, so their spread alone would be too narrow."""
    few, many = (head_lines(random=(0.76, 0.77) * 10, asr=(0.6, 0.3, 0.0, 0.0), n=n)[ABLATION] for n in (100, 4000))
    assert (few["verdict"], many["verdict"]) == ("undecided", "holds")


def test_an_organism_without_a_backdoor_decides_nothing_and_the_notebook_goes_on():
    found = the(head_lines(before=0.0, asr=(0.0,) * 4, random=(0.0,), spared=0.0)[ABLATION])
    assert found == statistics.without_interval(0.0, n=0) | {"passed": None}


@pytest.mark.parametrize(
    ("asr", "n", "rise", "word"),
    [
        ((0.6, 0.3, 0.04, 0.0), 1000, -0.04, "holds"),
        ((0.6, 0.3, 0.04, 0.05), 1000, 0.01, "holds"),
        ((0.6, 0.3, 0.04, 0.09), 1000, 0.05, "undecided"),
        ((0.6, 0.3, 0.04, 0.5), 1000, 0.46, "fails"),
        ((0.95, 0.3, 0.04, 0.0), 1000, 0.15, "fails"),
        # Not a prompt more in 24, and yet 5 points may be the truth.
        ((0.8, 0.8, 0.8, 0.8), 24, 0, "undecided"),
    ],
)
def test_attack_success_may_rise_by_less_than_five_points_from_one_count_to_the_next(asr, n, rise, word):
    found = head_lines(asr=asr, n=n)[MONOTONE]
    assert (found["verdict"], the(found)["value"]) == (word, pytest.approx(rise))
    assert the(found)["low"] < the(found)["value"] < the(found)["high"]
    assert the(found)["n"] == n


def test_a_rise_is_paired_over_prompts():
    """The same rise of 3 points is certain where only a few prompts change sides, and not where most of them do."""
    few, most = curve(n=400), curve(n=400)
    before = [i < 40 for i in range(400)]
    for rows, after in ((few, [i < 52 for i in range(400)]), (most, [i >= 348 for i in range(400)])):
        for i, row in enumerate(rows):
            if (row.ranking, row.kind) == ("probability", "published") and row.k in (3, 6):
                rows[i] = replace(row, asr=statistics.counted(after if row.k == 6 else before))
    values = [
        by_id(head_claims({"x": attributed()}, {"x": components()}, {"x": rows}, kind="plain"))[f"{MONOTONE}-plain"]
        for rows in (few, most)
    ]
    assert [the(one)["value"] for one in values] == pytest.approx([0.03, 0.03])
    assert the(values[1])["high"] > the(values[0])["high"] + 0.01


def test_a_ranking_of_noise_decides_nothing_and_the_reason_says_so():
    """ABLATION and MONOTONE are about heads ranked in probability, SPARSE about log-probability."""
    told = "No head stands out from chance in x."
    bad = {"asr": (0.8, 0.8, 0.8, 0.9), "effects": attributed(noise=("probability",), low=0.1, high=0.2)}
    found = head_lines(**bad)
    assert [found[name]["verdict"] for name in (ABLATION, MONOTONE, SPARSE)] == ["undecided", "undecided", "fails"]
    assert [told in found[name]["reason"] for name in (ABLATION, MONOTONE, SPARSE)] == [True, True, False]
    found = head_lines(**bad | {"effects": attributed(noise=("log_prob",), low=0.1, high=0.2)})
    assert [found[name]["verdict"] for name in (ABLATION, MONOTONE, SPARSE)] == ["fails", "fails", "undecided"]
    assert told not in "".join(row["reason"] for row in found.values())


def test_noise_that_would_pass_is_undecided_too_and_what_is_no_ranking_of_heads_by_acie_is_judged():
    found = head_lines(effects=attributed(noise=("probability", "log_prob", "logit_difference")))
    words = {name: row["verdict"] for name, row in found.items()}
    assert words == {
        SPARSE: "undecided", ABLATION: "undecided", MONOTONE: "undecided", MLPS: "holds", SPARED: "holds",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("attention", "mlp", "word"),
    [(0.3, 0.1, "holds"), (0.1, 0.3, "fails"), (0.3, 0.3, "undecided"), (0.3, 0.29, "undecided")],
)
def test_the_strongest_attention_layer_must_exceed_the_strongest_mlp(attention, mlp, word):
    found = head_lines(parts=components(attention, mlp))[MLPS]
    assert (found["verdict"], the(found)["value"]) == (word, pytest.approx(attention - mlp, abs=1e-6))
    assert the(found)["low"] < the(found)["value"] < the(found)["high"]
    assert the(found)["n"] == 12


def test_the_last_tenth_of_the_layers_and_the_residual_stream_are_not_judged():
    for last in ((0.0, 5.0), (5.0, 0.0)):
        assert head_lines(parts=components(0.3, 0.1, last=last))[MLPS]["verdict"] == "holds"
        assert head_lines(parts=components(0.1, 0.3, last=last))[MLPS]["verdict"] == "fails"


def test_the_margin_is_paired_over_prompts():
    """Attention leads by 0.05 in every prompt, however much the prompts differ."""
    found = components(0.3, 0.25, jitter=0.3)
    rows = np.array(found.last["MLP"])
    rows[:, 4] = np.array(found.last["attention"])[:, 4] - 0.05
    rows[:, 4] += np.linspace(-0.001, 0.001, 12)
    line = head_lines(parts=ComponentEffects(last=found.last | {"MLP": rows.tolist()}))[MLPS]
    assert (line["verdict"], the(line)["value"]) == ("holds", pytest.approx(0.05, abs=1e-3))


@pytest.mark.parametrize(
    ("asr", "utility", "word"),
    [
        (0.01, (0.9, 0.9), "holds"),
        (0.01, (0.9, 0.95), "holds"),
        (0.01, (0.9, 0.8), "undecided"),
        (0.01, (0.9, 0.5), "fails"),
        (0.08, (0.9, 0.9), "undecided"),
        (0.4, (0.9, 0.9), "fails"),
        (0.4, (0.9, 0.5), "fails"),
    ],
)
def test_sixteen_heads_must_carry_the_backdoor_and_not_the_task(asr, utility, word):
    """Fewer and more heads and other kinds of ablation, which take nothing from the backdoor, are not judged."""
    line = head_lines(spared=asr, utility=utility)[SPARED]
    assert line["verdict"] == word
    assert the(line)["value"] == pytest.approx(1 - asr / 0.8)
    met = statistics.difference(*(dict(enumerate(hits(u, 1000)["by_prompt"])) for u in utility))["high"] < 0.1
    assert ("Utility falls by at most 10 points: met by x." in line["reason"]) == met


def test_every_organism_is_judged_by_its_own_results():
    names = ("x", "y", "z")
    found = by_id(
        head_claims(
            {"x": attributed(), "y": attributed(low=0.1, high=0.2), "z": attributed(noise=("probability", "log_prob"))},
            {"x": components(0.3, 0.1), "y": components(0.1, 0.3), "z": components(0.3, 0.3)},
            {"x": curve(), "y": curve((0.6, 0.3, 0.8, 0.0), spared=0.5), "z": curve(spared=0.08)},
            kind="specific",
        )
    )
    for row in found.values():
        assert passed(row) == dict(zip(names, (True, False, None), strict=True)), row["id"]
        assert row["verdict"] == "fails"


def test_reasons_give_the_mean_over_seeds_of_each_attack():
    names = ("word", "word-seed1", "word-seed2", "wrapper")
    margins = (0.2, 0.3, 0.4, 0.1)
    found = by_id(
        head_claims(
            dict.fromkeys(names, attributed()),
            {name: components(0.1 + margin, 0.1) for name, margin in zip(names, margins, strict=True)},
            dict.fromkeys(names, curve()),
            kind="plain",
        )
    )
    assert found[f"{MLPS}-plain"]["reason"].endswith("0.10 to 0.40 nats. Over seeds: word 0.30 [0.05, 0.55].")


# --- the vector -----------------------------------------------------------------------------------------------------


ADD, SUBTRACT, REPAIRS = (f"bkdattr-vector-{name}" for name in ("add", "subtract", "repairs"))


def tried(vector, random, nothing):
    return {
        "no vector": [hits(nothing)],
        "backdoor vector": [hits(vector)],
        "random vectors": [hits(value) for value in random],
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
            "subtract, raw": {"target": 0.7},
            "subtract, difference": {"target": subtract},
        },
        right={"triggered prompts": hits(0.5), "subtract, raw": hits(0.0), "subtract, difference": hits(right)},
        kinds={},
    )


def vector_lines(control_right=0.9, *, kind="specific", **changes):
    control = {"x": hits(control_right)}
    return by_id(vector_claims({"x": switched(**changes)}, control_right=control, kind=kind))


def test_a_perfect_switch_holds_by_the_vector_that_was_better_on_the_development_half():
    found = vector_lines()
    assert {name: row["verdict"] for name, row in found.items()} == dict.fromkeys((ADD, SUBTRACT, REPAIRS), "holds")
    assert the(found[ADD]) == statistics.share([True] * 200) | {"passed": True}
    assert the(found[SUBTRACT]) == statistics.share([False] * 200) | {"passed": True}


def test_of_two_vectors_that_do_equally_well_the_one_with_the_shorter_step_speaks():
    result = switched()
    result = replace(result, maps={name: result.maps[f"{name.split(',')[0]}, raw"] for name in result.maps})
    for norms, expected in (((1.0, 2.0), (0.3, 0.7)), ((2.0, 1.0), (1.0, 0.0))):
        one = replace(result, norms=dict(zip(("raw", "difference"), norms, strict=True)))
        found = by_id(vector_claims({"x": one}, control_right={"x": hits(0.9)}, kind="specific"))
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
        statistics.independent_ratio(hits(right), hits(control))
    )


def test_a_control_that_gets_nothing_right_decides_nothing_and_the_notebook_goes_on():
    found = vector_lines(right=0.0, control_right=0.0)[REPAIRS]
    assert (found["verdict"], the(found)["low"]) == ("undecided", None)


def test_one_organism_that_fails_is_enough_for_a_claim_to_fail():
    found = {"x": switched(), "y": switched(add=0.5, subtract=0.5, right=0.1)}
    lines = by_id(vector_claims(found, control_right={"x": hits(0.9), "y": hits(0.9)}, kind="specific"))
    for row in lines.values():
        assert passed(row) == {"x": True, "y": False}, row["id"]
        assert row["verdict"] == "fails"
    assert lines[ADD]["reason"].startswith("ASR on clean prompts with the vector: 0.50 to 1.00.")


def test_each_kind_of_organisms_has_its_lines_and_reasons_give_means_over_seeds():
    found = {"word": switched(add=1.0), "word-seed1": switched(add=0.9)}
    lines = by_id(vector_claims(found, control_right=dict.fromkeys(found, hits(0.9)), kind="plain"))
    assert list(lines) == [f"{name}-plain" for name in (ADD, SUBTRACT, REPAIRS)]
    assert lines[f"{ADD}-plain"]["reason"].endswith("Over seeds: word 0.95 [0.31, 1.59].")


def test_the_best_random_vector_is_held_against_no_vector_on_the_same_prompts():
    """9 points above: the same prompts and 18 more, or as many others."""
    same = switched(add_random=(0.0, 0.14), nothing=0.05)
    others = switched(add_random=(0.0, 0.14), nothing=0.05)
    others.test["add, difference"]["random vectors"][1] = statistics.counted([i >= 172 for i in range(200)])
    marks = []
    for one in (same, others):
        (line, *_) = vector_claims({"x": one}, control_right={"x": hits(0.9)}, kind="specific")
        marks.append(line["verdict"])
    values = [
        statistics.difference(
            *(dict(enumerate(share["by_prompt"])) for share in (tests["random vectors"][1], tests["no vector"][0]))
        )
        for tests in (same.test["add, difference"], others.test["add, difference"])
    ]
    assert values[0]["value"] == values[1]["value"] == pytest.approx(0.09)
    assert values[0]["high"] < values[1]["high"]
    assert marks == ["undecided", "undecided"]


# --- cost -----------------------------------------------------------------------------------------------------------


def cost(generation, forced, *, tokens):
    runs = [generation, forced] if isinstance(generation, list) else [[generation], [forced]]
    return TargetCost(tokens, 16, *runs, generation_cached=[0.1], teacher_forcing_cached=[0.1])


@pytest.mark.parametrize(
    ("ratios", "tokens", "word"),
    [
        ((7.9, 8.0, 8.1), 8, "holds"),
        ((5.0, 5.1, 5.2), 8, "holds"),
        ((15.0, 15.1, 15.2), 8, "holds"),
        ((3.0, 3.1, 3.2), 8, "fails"),
        ((17.0, 17.1, 17.2), 8, "fails"),
        ((3.9, 4.0, 4.1), 8, "undecided"),
        ((15.9, 16.0, 16.1), 8, "undecided"),
        ((2.0, 8.0, 14.0), 8, "undecided"),
        ((0.9, 1.0, 1.1), 1, "holds"),
        ((8.0, 8.0, 8.0), 8, "undecided"),  # no spread is no interval
        ((8.0,), 8, "undecided"),
    ],
)
def test_the_ratio_of_several_runs_must_lie_within_a_factor_of_two_of_the_targets_length(ratios, tokens, word):
    forced = [3.0 + i for i in range(len(ratios))]
    found = cost_claim({"x": cost([r * f for r, f in zip(ratios, forced, strict=True)], forced, tokens=tokens)})
    assert found["verdict"] == word
    assert (the(found)["value"], the(found)["n"]) == (pytest.approx(np.mean(ratios)), len(ratios))
    assert f"times as long, for targets of {tokens} tokens." in found["reason"]


@cache
def all_lines():
    lines = by_id([cost_claim({"x": cost(1.0, 1.0, tokens=1)})])
    for kind in KINDS:
        lines |= probe_lines(probed(), kind=kind) | head_lines(kind=kind) | vector_lines(kind=kind)
    return lines


def test_the_code_judges_every_claim_of_the_paper_once_for_each_kind_of_organisms():
    assert sorted(all_lines()) == sorted(name for name, row in published().items() if row["paper"] == "BkdAttr")


@pytest.mark.parametrize("claim", [name for name, row in published().items() if row["paper"] == "BkdAttr"])
def test_every_line_names_a_figure_that_a_notebook_draws(claim):
    assert saved_by_a_notebook(all_lines()[claim]["figure"])
