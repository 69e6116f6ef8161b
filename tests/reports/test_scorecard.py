"""Verdicts: words, lines of the scorecard, and every criterion on hand-made results on both sides of its bound."""

import json

import numpy as np
import pytest

from bkd_utils.common import files
from bkd_utils.common.files import UserError
from bkd_utils.reports import scorecard
from bkd_utils.reports.scorecard import KEYS, entry, numbers, published, record, table, verdict

PROBE, COST = "bkdattr-probe", "bkdattr-cost"


@pytest.fixture(autouse=True)
def into(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_FIGURES", str(tmp_path / "figures"))
    return tmp_path / "figures" / "scorecard.json"


def number(value, n=20):
    return {"value": value, "n": n, "low": value - 0.1, "high": value + 0.1}


def line(claim=PROBE, *, passed=(("a", True), ("b", False)), **changes):
    passed = dict(passed)
    values = {name: number(i / 10) for i, name in enumerate(passed)}
    return entry(claim, numbers=values, passed=passed, **{"reason": "Because.", "figure": "02_probe"} | changes)


def by_id(entries):
    return {row["id"]: row for row in entries}


# --- the published table --------------------------------------------------------------------------------------------


def test_every_published_claim_says_all_that_it_must():
    for name, row in published().items():
        assert set(row) == KEYS
        assert all(isinstance(value, str) and value.strip() for value in row.values()), name
        assert row["sure"].partition(";")[0] in ("read", "second hand", "code")


@pytest.mark.parametrize("broken", ["", 'paper = "p"', "\n".join(f'{key} = "x"' for key in [*KEYS, "opinion"])])
def test_a_published_claim_that_lacks_a_key_or_has_another_is_an_error(tmp_path, monkeypatch, broken):
    whole = "\n".join(f'{key} = "x"' for key in KEYS)
    monkeypatch.setattr(scorecard, "DATA", tmp_path)
    (tmp_path / "published.toml").write_text(f"[good]\n{whole}\n")
    assert set(published()) == {"good"}
    (tmp_path / "published.toml").write_text(f"[good]\n{whole}\n[bad]\n{broken}\n")
    with pytest.raises(UserError, match=r"published.toml, bad: keys must be claim, criterion, measure, paper"):
        published()


# --- verdicts and lines ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("passed", "word"),
    [
        ([True], "holds"),
        ([True, True, True], "holds"),
        ([True, False], "holds in part"),
        ([False, False, True], "holds in part"),
        ([False], "does not hold"),
        ([False, False], "does not hold"),
    ],
)
def test_the_verdict_is_one_of_three_words(passed, word):
    assert verdict({str(i): ok for i, ok in enumerate(passed)}) == word


def test_a_verdict_over_nothing_is_an_error():
    with pytest.raises(ValueError, match="a verdict over no organisms"):
        verdict({})


def test_a_line_over_no_organisms_is_the_same_error():
    with pytest.raises(ValueError, match="a verdict over no organisms"):
        line(passed=[])


@pytest.mark.parametrize(
    ("passed", "weakest", "shown"),
    [
        ([("a", True), ("b", False), ("c", False)], None, "b"),
        ([("a", True), ("b", True)], None, "a"),
        ([("a", False), ("b", True)], None, "a"),
        ([("a", True), ("b", False), ("c", True)], "c", "c"),
    ],
)
def test_a_line_shows_the_first_organism_that_fails_unless_told_otherwise(passed, weakest, shown):
    made = line(passed=passed, weakest=weakest)
    assert made["organism"] == shown
    assert made["ours"] == number([name for name, _ in passed].index(shown) / 10)


def test_a_line_says_what_was_published_and_what_every_organism_did():
    made, known = line(), published()[PROBE]
    assert {key: made[key] for key in ("paper", "claim", "published", "criterion")} == {
        key: known[key] for key in ("paper", "claim", "published", "criterion")
    }
    assert made["by_organism"] == {"a": number(0.0) | {"passed": True}, "b": number(0.1) | {"passed": False}}
    assert (made["id"], made["verdict"], made["reason"], made["figure"]) == (
        PROBE,
        "holds in part",
        "Because.",
        "02_probe",
    )


def test_numpy_outcomes_can_be_written(into):
    record([line(passed=[("a", np.bool_(True)), ("b", np.float64(2) > 1)])])
    assert json.loads(into.read_text())[0]["by_organism"]["b"]["passed"] is True


def test_an_unknown_claim_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown claim 'perpetual-motion'; known: bkdattr-probe, "):
        line("perpetual-motion")


# --- the scorecard --------------------------------------------------------------------------------------------------


def test_the_scorecard_lies_beside_the_figures(into):
    assert record([line()]) == into
    assert json.loads(into.read_text()) == [line()]


def test_lines_of_other_claims_are_kept_and_those_of_the_same_replaced(into):
    record([line(COST), line("bkdattr-ablation", reason="Old.")])
    record([line("bkdattr-ablation", reason="New."), line(PROBE)])
    written = json.loads(into.read_text())
    assert {row["id"]: row["reason"] for row in written} == {
        PROBE: "Because.",
        "bkdattr-ablation": "New.",
        COST: "Because.",
    }
    order = list(published())
    assert [row["id"] for row in written] == sorted((row["id"] for row in written), key=order.index)


def test_recording_twice_is_recording_once(into):
    lines = [line(claim) for claim in reversed(published())]
    record(lines)
    first = into.read_bytes()
    record(lines)
    assert into.read_bytes() == first
    assert [row["id"] for row in json.loads(first)] == list(published())


def test_a_number_that_is_none_leaves_the_old_scorecard(into):
    record([line()])
    first = into.read_bytes()
    bad = line() | {"ours": {"value": float("nan")}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        record([bad])
    assert into.read_bytes() == first


def test_a_damaged_scorecard_is_named(into):
    files.write_json(into, [])
    into.write_text("[{")
    with pytest.raises(ValueError, match=r"scorecard\.json is not valid JSON"):
        record([line()])


def test_tables_of_lines():
    shown = table([line(), line(COST, passed=[("a", True), ("c", True), ("d", True)], reason="Measured.")])
    first, second = shown.to_dict("records")
    assert shown.index.tolist() == [published()[claim]["claim"] for claim in (PROBE, COST)]
    assert first == {
        "published": published()[PROBE]["published"],
        "verdict": "holds in part",
        "organisms that pass": "1 of 2",
        "because": "Because.",
    }
    assert (second["verdict"], second["organisms that pass"], second["because"]) == ("holds", "3 of 3", "Measured.")
    shown = numbers([line(), line(COST)])
    assert shown.loc[PROBE].to_dict() == {"a": "0 [-0.1, 0.1]", "b": "0.1 [0, 0.2] ✗"}
    assert shown.index.tolist() == [PROBE, COST]


# --- the scorecard --------------------------------------------------------------------------------------------------


def test_the_scorecard_of_this_run_comes_before_the_committed_one(into, tmp_path, monkeypatch):
    monkeypatch.setattr(scorecard, "FIGURES", tmp_path / "committed")
    with pytest.raises(UserError, match="no scorecard yet"):
        scorecard.recorded()
    files.write_json(tmp_path / "committed" / "scorecard.json", [line(COST)])
    assert [row["id"] for row in scorecard.recorded()] == [COST]
    record([line(PROBE)])
    assert [row["id"] for row in scorecard.recorded()] == [PROBE]


def test_each_paper_has_its_table_with_number_interval_n_and_organism():
    lines = [line(PROBE), line("asa-cure", passed=[("word", False)])]
    shown = scorecard.scorecard(lines, paper="BkdAttr")
    assert list(shown.index) == [published()[PROBE]["claim"]]
    assert shown.iloc[0]["ours"] == "accuracy of the best layer: 0.1 [0, 0.2], n = 20 splits (b)"
    assert shown.iloc[0]["organisms that pass"] == "1 of 2"
    assert scorecard.scorecard(lines, paper="ASA").iloc[0]["verdict"] == "does not hold"
    assert scorecard.scorecard(lines[:1], paper="ASA").empty


def test_a_run_of_some_notebooks_keeps_the_lines_of_the_others(tmp_path):
    path = tmp_path / "scorecard.json"
    assert [row["id"] for row in scorecard.merged([line(COST)], path)] == [COST]
    files.write_json(path, [line(PROBE), line(COST), {"id": "no claim any more"}])
    new = line(COST, passed=[("a", False)])
    assert scorecard.merged([new], path) == [line(PROBE), new]


def test_an_interval_of_no_width_is_not_shown_as_one():
    exact = line(COST) | {"ours": {"value": 0.97412, "n": 4, "low": 0.97412, "high": 0.97412}, "organism": "a"}
    expected = "seconds of generation over seconds of teacher forcing: 0.974, n = 4 prompts (a)"
    assert scorecard.ours(exact) == expected
    assert "[" not in scorecard.markdown([exact]).splitlines()[2].partition(" | [holds")[0]


def test_what_is_missing_is_listed():
    assert set(scorecard.missing([line(PROBE)]).index) == set(published()) - {PROBE}
    assert scorecard.missing([{"id": name} for name in published()]).empty


def test_the_markdown_table_links_every_verdict_to_its_figure():
    text = scorecard.markdown([line(PROBE)])
    assert text.splitlines()[2].endswith("; 1 of 2 pass | [holds in part](figures/02_probe.png) |")
