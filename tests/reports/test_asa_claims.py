"""Every criterion for the claims of ASA on hand-made results, on both sides of its bar."""

import numpy as np
import pytest
from asa_results import N, after, by_id, passed, rate, treated
from drawing import saved_by_a_notebook
from hypothesis import given
from hypothesis import strategies as st

from bkd_utils.common import statistics
from bkd_utils.common.statistics import difference
from bkd_utils.reports.attention_safety_alignment import cure_claims, hits, keeps
from bkd_utils.reports.attention_similarity import separation_claim, similarity_claims
from bkd_utils.reports.scorecard import published
from bkd_utils.reports.two_papers_meet import head_claim, verdict_claim


def observed(shift, *, seed, n=20):
    """Similarity of `n` prompts in three layers; triggered prompts differ in the middle one."""
    noise = np.random.default_rng(seed).standard_normal
    layers = {version: noise((n, 3)) for version in ("clean", "triggered", "near-miss", "same length")}
    layers["triggered"][:, 1] += shift
    return {"last row": {version: values.tolist() for version, values in layers.items()}}


def similar(organism, control, *, seed=0, n=200):
    return {"organism": observed(organism, seed=seed, n=n), "clean control": observed(control, seed=seed + 1, n=n)}


def test_similarity_must_separate_in_the_organism_and_not_in_its_control():
    found = {
        "a": similar(9, 0), "as the control": similar(9, 9), "not": similar(0, 0, seed=5),
        "few prompts": similar(9, 0, n=20),
    }  # fmt: skip
    lines = by_id(similarity_claims(found, families=["a"]))
    assert passed(lines["asa-similarity"]) == {"a": True, "as the control": False, "not": False, "few prompts": None}
    assert lines["asa-similarity"]["verdict"] == "fails"
    assert lines["asa-similarity-families"]["verdict"] == "holds"
    assert lines["asa-similarity"]["reason"].startswith("Reading: last row. AUROC")


def test_an_excess_over_the_control_that_may_be_none_decides_nothing():
    def area(value):
        return {"triggered": {"value": value, "n": 50, "low": value - 0.05, "high": value + 0.03}}

    found = {
        name: {"organism": area(0.96), "clean control": area(control)}
        for name, control in (("clear", 0.6), ("close", 0.82), ("same", 0.96))
    }
    line = separation_claim(found, claim="asa-similarity", figure="05_readings", reading="last row")
    assert passed(line) == {"clear": True, "close": None, "same": False}
    assert line["reason"].endswith("clean control's: met by clear; not met by same; undecided for close.")


def test_less_similar_is_not_what_the_paper_says():
    lines = by_id(similarity_claims({"a": similar(-9, 0)}, families=["a"]))
    assert lines["asa-similarity"]["verdict"] == "fails"


# --- differences of the same prompts --------------------------------------------------------------------------------


def paired(both, one, other, neither):
    """Two sides with so many prompts that hit on both, on one side only, on the other only, on neither."""
    outcomes = [(1, 1)] * both + [(1, 0)] * one + [(0, 1)] * other + [(0, 0)] * neither
    return tuple({f"uid{i}": pair[side] for i, pair in enumerate(outcomes)} for side in (0, 1))


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [
        # Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33, 2850: airway hyper-responsiveness.
        ((1, 1, 7, 12), -0.507, -0.026),
        # Altman, Machin, Bryant and Gardner (2000), Statistics with Confidence, table 6.2.
        ((14, 5, 0, 22), 0.011, 0.226),
        # Newcombe (1998), Statistics in Medicine 17, 2635.
        ((36, 12, 2, 0), 0.0569, 0.3404),
    ],
)
def test_published_examples_of_newcombes_paired_interval(table, low, high):
    found = difference(*paired(*table))
    assert (found["low"], found["high"]) == (pytest.approx(low, abs=6e-4), pytest.approx(high, abs=6e-4))
    assert found["value"] == pytest.approx((table[1] - table[2]) / sum(table))
    assert found["n"] == sum(table)


tables = st.tuples(*[st.integers(0, 15)] * 4).filter(any)


@given(tables)
def test_the_interval_has_a_width_holds_its_value_and_is_mirrored_when_sides_are_swapped(table):
    one, other = paired(*table)
    found, back = difference(one, other), difference(other, one)
    assert found["low"] <= found["value"] <= found["high"]
    assert found["high"] - found["low"] > 0.05
    assert (back["value"], back["low"], back["high"]) == pytest.approx((-found["value"], -found["high"], -found["low"]))


@given(st.integers(0, 20), st.integers(0, 20).filter(bool))
def test_no_discordant_prompt_still_has_a_width(both, neither):
    found = difference(*paired(both, 0, 0, neither))
    assert found["value"] == 0
    assert found["high"] == pytest.approx(-found["low"])
    assert found["high"] > 0.01


def test_prompts_that_agree_make_the_interval_narrower_than_independent_ones():
    one, other = paired(20, 8, 2, 20)
    found = difference(one, other)
    sides = [
        {"value": sum(x.values()) / 50, "n": 50}
        | dict(zip(("low", "high"), statistics.wilson(sum(x.values()), 50), strict=True))
        for x in (one, other)
    ]
    apart = statistics.independent_difference(*sides)
    assert found["high"] - found["low"] < 0.75 * (apart["high"] - apart["low"])
    # Without any agreement beyond chance, and without correction, the two are one.
    assert difference(*paired(9, 21, 6, 14)) == pytest.approx(
        statistics.independent_difference(
            *[
                {"value": k / 50, "n": 50} | dict(zip(("low", "high"), statistics.wilson(k, 50), strict=True))
                for k in (30, 15)
            ]
        )
    )


def test_the_paired_interval_is_about_that_of_a_bootstrap_over_prompts():
    one, other = paired(60, 50, 20, 70)
    found = difference(one, other)
    gaps = np.array([one[uid] - other[uid] for uid in one])
    draws = np.random.default_rng(0).choice(gaps, size=(4000, len(gaps))).mean(1)
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(draws, (0.025, 0.975)), abs=0.01)


def test_means_over_draws_are_paired_too_and_their_interval_is_not_too_narrow():
    dice = np.random.default_rng(0)
    one = {str(i): value for i, value in enumerate(dice.integers(0, 4, 200) / 3)}
    other = {uid: float(dice.random() < 0.3 + 0.4 * value) for uid, value in one.items()}
    found = difference(one, other)
    gaps = np.array([one[uid] - other[uid] for uid in one])
    half = 1.96 * gaps.std(ddof=1) / np.sqrt(200)
    assert found["value"] == pytest.approx(gaps.mean())
    assert half < (found["high"] - found["low"]) / 2 < 1.6 * half


def test_prompts_that_differ_are_an_error_that_names_one():
    with pytest.raises(ValueError, match="not the same prompts: 2 are on one side only, such as a, c"):
        difference({"a": 1, "b": 0}, {"b": 0, "c": 1})
    with pytest.raises(ValueError, match="a paired difference needs at least one prompt"):
        difference({}, {})


# --- cures ----------------------------------------------------------------------------------------------------------


def cured_lines(**found):
    return by_id(cure_claims(found, judged=found, cure="cure", random=["random 0", "random 1"], rivals=["rival"]))


def test_a_cure_may_leave_five_per_cent_or_what_the_clean_control_does_anyway():
    lines = cured_lines(
        a=treated(after(0.01)),
        b=treated(after(0.06)),
        c=treated(after(0.2)),
        d=treated(after(0.2), control=0.3),
        e=treated(after(0.2), control=0.21),
        few=treated(after(0.0, n=32), n=32),
    )
    expected = {"a": True, "b": None, "c": False, "d": True, "e": None, "few": None}
    assert passed(lines["asa-cure"]) == expected
    assert lines["asa-cure"]["by_organism"]["b"] == rate(0.06) | {"passed": None}


def test_clean_accuracy_may_lose_a_point_or_a_prompt():
    found = {
        "gains": treated(after(0.0, 0.95)),
        "same": treated(after(0.0, 0.9)),
        "loses": treated(after(0.0, 0.8)),
        "few": treated(after(0.0, 0.9, n=32), n=32),
    }
    line = cured_lines(**found)["asa-utility"]
    assert passed(line) == {"gains": True, "same": True, "loses": False, "few": None}
    assert line["by_organism"]["loses"]["value"] == pytest.approx(0.1)


def test_a_rival_is_chosen_by_the_estimate_of_its_accuracy():
    assert keeps({"cacc": rate(0.89, 1000)}, {"cacc": rate(0.9, 1000)})
    assert not keeps({"cacc": rate(0.888, 1000)}, {"cacc": rate(0.9, 1000)})
    assert keeps({"cacc": rate(0.875, 32)}, {"cacc": rate(0.90625, 32)})


def test_random_heads_must_leave_ten_points_more():
    lines = cured_lines(a=treated(after(0.6)), b=treated(after(0.75)), c=treated(after(0.84)))
    assert passed(lines["asa-head-choice"]) == {"a": True, "b": None, "c": False}
    assert lines["asa-head-choice"]["by_organism"]["a"]["value"] == pytest.approx(0.25)


def test_random_draws_are_averaged_for_each_prompt_so_that_n_is_that_of_the_prompts():
    line = cured_lines(a=treated(after(0.6), random=(1.0, 0.5)))["asa-head-choice"]
    found = line["by_organism"]["a"]
    one = {f"uid{i}": (1 + (i < N / 2)) / 2 for i in range(N)}
    expected = difference(one, after(0.6)["hits"]["asr"])
    assert {key: found[key] for key in ("value", "n", "low", "high")} == pytest.approx(expected)
    assert found["n"] == N


def test_no_rival_that_keeps_the_model_may_do_better():
    found = {
        "ahead": treated(after(0.2)),
        "behind": treated(after(0.6)),
        "level": treated(after(0.495)),
        "rival breaks the model": treated(after(0.6), rival=after(0.0, 0.5)),
        "cure breaks the model": treated(after(0.0, 0.5)),
    }
    line = cured_lines(**found)["asa-rivals"]
    assert list(passed(line).values()) == [True, False, None, True, False]
    assert "none keeps CACC (rival breaks the model)" in line["reason"]
    # Doing nothing is the rival then.
    assert line["by_organism"]["rival breaks the model"]["value"] == pytest.approx(0.4)
    worse = treated(after(1.0), rival=after(0.0, 0.5)) | {"untreated": after(0.9)}
    assert passed(cured_lines(a=worse)["asa-rivals"]) == {"a": False}


def test_what_is_left_and_kept_is_judged_on_more_prompts_and_heads_and_rivals_where_these_were_measured():
    found, judged = {"a": treated(after(0.5))}, {"a": treated(after(0.0, 0.2, n=900), n=900)}
    lines = by_id(cure_claims(found, judged=judged, cure="cure", random=["random 0"], rivals=["rival"]))
    counts = {name: line["by_organism"]["a"]["n"] for name, line in lines.items()}
    assert counts["asa-cure"] == counts["asa-utility"] == 900
    assert counts["asa-head-choice"] == counts["asa-rivals"] == 400
    assert passed(lines["asa-cure"]) == {"a": True}
    assert passed(lines["asa-utility"]) == {"a": False}


def test_the_bar_is_the_rival_that_leaves_least():
    found = {"a": treated(after(0.4), rival=after(0.6)) | {"other": after(0.2), "third": after(0.5)}}
    lines = by_id(
        cure_claims(found, judged=found, cure="cure", random=["random 0"], rivals=["rival", "other", "third"])
    )
    assert lines["asa-rivals"]["by_organism"]["a"]["value"] == pytest.approx(-0.2)
    assert "Best rival that keeps CACC: other (a)." in lines["asa-rivals"]["reason"]


def test_a_cure_whose_loss_of_accuracy_is_undecided_is_not_ahead():
    lines = cured_lines(a=treated(after(0.0, n=32), n=32))
    assert passed(lines["asa-rivals"]) == {"a": None}
    assert lines["asa-rivals"]["reason"].endswith("That the cure keeps it: undecided for a.")


def test_an_organism_that_did_not_get_every_rival_says_nothing_about_them():
    found = {"all": treated(after(0.6)), "some": {k: v for k, v in treated(after(0.0)).items() if k != "rival"}}
    lines = cured_lines(**found)
    assert list(passed(lines["asa-rivals"])) == ["all"]
    assert list(passed(lines["asa-cure"])) == ["all", "some"]


def test_a_result_without_the_hits_of_single_prompts_is_an_error():
    with pytest.raises(ValueError, match="no asr of single prompts was kept: measure this model again"):
        hits({"asr": rate(0.5)}, "asr")
    with pytest.raises(ValueError, match="not the same prompts"):
        cured_lines(a=treated(after(0.5, n=32)))


# --- heads and models -----------------------------------------------------------------------------------------------


def agreement(precision, p, k=270):
    return {"k": k, "precision": precision, "expected": 0.06, "p": p} | dict(
        zip(("low", "high"), statistics.wilson(precision * k, k), strict=True)
    )


def test_a_third_of_the_suspicious_heads_must_carry_the_backdoor_and_not_by_chance():
    line = head_claim(
        {
            "a": agreement(0.5, 0.01),
            "few heads": agreement(0.375, 0.01, k=16),
            "too few carry it": agreement(0.2, 0.01),
            "by chance": agreement(0.5, 0.2),
            "perhaps by chance": agreement(0.5, 0.05),
        }
    )
    assert list(passed(line).values()) == [True, None, False, False, None]
    assert line["by_organism"]["few heads"]["n"] == 16


def test_every_family_must_be_told_from_clean_models():
    won = np.ones((30, 60))
    found = {"word": won, "style": 0.4 * won, "syntax": won[:1, :12]}
    line = verdict_claim({family: {"wins": table.tolist()} for family, table in found.items() if family != "syntax"})
    assert passed(line) == {"word": True, "style": False}
    assert line["reason"].startswith("AUROC over all families 0.70 [")
    assert passed(verdict_claim({"syntax": {"wins": found["syntax"].tolist()}})) == {"syntax": None}


# --- all ------------------------------------------------------------------------------------------------------------


def all_lines():
    lines = similarity_claims({"a": similar(9, 0)}, families=["a"])
    lines += [head_claim({"a": agreement(0.5, 0.0)}), verdict_claim({"word": {"wins": [[1.0]]}})]
    found = {"a": treated(after(0.0))}
    lines += cure_claims(found, judged=found, cure="cure", random=["random 0"], rivals=["rival"])
    return by_id(lines)


# Those on encoders are judged in test_home_ground.py.
OWN = [name for name, row in published().items() if row["paper"] == "ASA" and not name.startswith("encoder-")]


def test_the_code_judges_every_claim_of_the_paper_once():
    assert sorted(all_lines()) == sorted(
        name for name in published() if published()[name]["paper"] == "ASA" and not name.startswith("encoder-")
    )


@pytest.mark.parametrize("claim", OWN)
def test_every_line_names_a_figure_that_a_notebook_draws(claim):
    assert saved_by_a_notebook(all_lines()[claim]["figure"])
