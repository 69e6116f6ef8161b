"""The rule that decides, the lines of the scorecard, and the tables that show them."""

import json

import numpy as np
import pytest

from bkd_utils.common import files
from bkd_utils.common.files import UserError
from bkd_utils.models import folders
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.identity import model_identity
from bkd_utils.reports import pages, scorecard
from bkd_utils.reports.scorecard import (
    KEYS,
    PROVENANCE,
    at_least,
    at_most,
    both,
    either,
    entry,
    numbers,
    published,
    record,
    table,
    verdict,
)

PROBE, COST = "bkdattr-probe", "bkdattr-cost"
BAR = 0.9


@pytest.fixture(autouse=True)
def into(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_FIGURES", str(tmp_path / "figures"))
    monkeypatch.setattr(scorecard, "model_identity", files.sha256_text)
    return tmp_path / "figures" / "scorecard.json"


def number(value, n=20):
    return {"value": value, "n": n, "low": value - 0.1, "high": value + 0.1}


def line(claim=PROBE, *, passed=(("a", True), ("b", False)), **changes):
    passed = dict(passed)
    values = {name: number(i / 10) for i, name in enumerate(passed)}
    return entry(claim, numbers=values, passed=passed, **{"reason": "Because.", "figure": "02_probe"} | changes)


def row(*args, **changes):
    return line(*args, **changes) | {"model": "a model", "identity": files.sha256_text("a model")}


# --- the published table --------------------------------------------------------------------------------------------


def test_every_published_claim_says_all_that_it_must():
    for name, about in published().items():
        assert set(about) - {"reading", "earlier"} == KEYS
        assert all(isinstance(value, str) and value.strip() for value in about.values()), name


def test_most_of_what_we_know_of_the_papers_is_second_hand_and_the_file_says_so():
    """The reference notes: of both papers little more than the abstract was read."""
    known = {name: about["provenance"] for name, about in published().items()}
    assert "read" not in known.values()
    others = {name: how for name, how in known.items() if name.startswith("bkdattr") and how != "second hand"}
    assert others == {
        "bkdattr-ablation": "abstract",
        "bkdattr-ablation-plain": "abstract",
        "bkdattr-heads-spare-task": "ours",
        "bkdattr-heads-spare-task-plain": "ours",
    }


def test_a_claim_that_is_judged_apart_is_there_once_for_each_kind_of_organisms():
    known = published()
    apart = [name for name in known if name.endswith("-plain")]
    assert len(apart) == 11
    for name in apart:
        one, other = known[name.removesuffix("-plain")], known[name]
        assert (one["reading"], other["reading"]) == ("specific organisms", "plain organisms")
        assert one | {"reading": ""} == other | {"reading": ""}
        assert "apart" not in one | other
    order = list(known)
    assert all(order.index(name) == order.index(name.removesuffix("-plain")) + 1 for name in apart)
    assert f"{COST}-plain" not in known
    assert [scorecard.apart(PROBE, kind) for kind in ("specific", "plain")] == [PROBE, f"{PROBE}-plain"]


def test_only_what_is_marked_is_judged_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(scorecard, "DATA", tmp_path)
    (tmp_path / "published.toml").write_text(
        f"[papers.P]\n{PAPER}\n[one]\n{toml()}\n[two]\n{toml(apart='odd')}\n[three]\n{toml(earlier='x')}\n"
    )
    assert list(published()) == ["one", "two", "two-odd", "three"]
    assert published()["two-odd"]["reading"] == "odd organisms"
    assert "reading" not in published()["one"]
    assert published()["three"]["earlier"] == "x"


def test_papers_say_how_they_were_published_and_whose_words_a_claim_is():
    papers = scorecard.papers()
    assert list(papers) == ["BkdAttr", "ASA", "Searched"]
    readings = {"BkdAttr": "", "ASA": "our reading", "Searched": "searched, on MiniLM encoders"}
    assert {name: about["reading"] for name, about in papers.items()} == readings
    assert "three independent lists; the official page has not been seen" in papers["BkdAttr"]["status"]


def test_a_claim_may_have_a_reading_of_its_own():
    readings = {name: line(name)["reading"] for name in ("asa-cure", "encoder-cure", "searched-cure", PROBE)}
    assert list(readings.values()) == [
        "our reading",
        "our reading, fair trial on MiniLM encoders",
        "searched, on MiniLM encoders",
        "specific organisms",
    ]
    assert scorecard.named(line("encoder-cure")).startswith(
        "our reading, fair trial on MiniLM encoders: Aligning suspicious"
    )


PAPER = "\n".join(f'{key} = "x"' for key in scorecard.PAPER_KEYS)
WHOLE = dict.fromkeys(KEYS, "x") | {"paper": "P", "provenance": "read"}


def toml(**changes):
    return "\n".join(f'{key} = "{value}"' for key, value in (WHOLE | changes).items())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "bad: keys must be claim, criterion, measure, paper"),
        ('paper = "P"', "bad: keys must be claim"),
        (toml(opinion="x"), "bad: keys must be claim"),
        (toml(provenance="hearsay"), "bad: provenance 'hearsay' is none of read, second hand, abstract, ours"),
        (toml(paper="Q"), "bad: paper 'Q' is none of P"),
    ],
)
def test_a_published_claim_that_lacks_a_key_or_has_an_unknown_one_is_an_error(tmp_path, monkeypatch, bad, message):
    monkeypatch.setattr(scorecard, "DATA", tmp_path)
    (tmp_path / "published.toml").write_text(f"[papers.P]\n{PAPER}\n[good]\n{toml()}\n")
    assert set(published()) == {"good"}
    (tmp_path / "published.toml").write_text(f"[papers.P]\n{PAPER}\n[good]\n{toml()}\n[bad]\n{bad}\n")
    with pytest.raises(UserError, match=f"published.toml, {message}"):
        published()


def test_a_paper_without_a_status_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(scorecard, "DATA", tmp_path)
    (tmp_path / "published.toml").write_text('[papers.P]\ntitle = "x"\n')
    with pytest.raises(UserError, match=r"papers\.P: keys must be arxiv, known, reading, status, title"):
        scorecard.papers()


# --- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "least", "most"),
    [
        (0.91, 0.99, True, False),
        (0.9, 0.99, True, None),
        (0.8, 0.9, None, True),
        (0.89, 0.99, None, None),
        (0.5, 0.89, False, True),
        (0.95, 0.95, None, None),
        (None, None, None, None),
    ],
)
def test_a_criterion_is_decided_by_the_whole_interval(low, high, least, most):
    """The value is on the side of the bar that passes for `at_least`, and decides nothing."""
    found = {"value": 0.95, "n": 9, "low": low, "high": high}
    assert (at_least(found, BAR), at_most(found, BAR)) == (least, most)


@pytest.mark.parametrize("ask", [at_least, at_most])
def test_a_point_estimate_alone_decides_nothing(ask):
    for value in (0.0, 0.5, 1.0):
        assert ask({"value": value, "low": 0.2, "high": 0.8}, 0.5) is None


@pytest.mark.parametrize(
    ("outcomes", "all_of", "any_of"),
    [
        ((True, True), True, True),
        ((True, None), None, True),
        ((True, False), False, True),
        ((None, None), None, None),
        ((None, False), False, None),
        ((False, False), False, False),
    ],
)
def test_two_conditions_have_three_outcomes(outcomes, all_of, any_of):
    for given in (outcomes, outcomes[::-1]):
        assert (both(*given), either(*given)) == (all_of, any_of)


@pytest.mark.parametrize(
    ("passed", "word"),
    [
        ([True], "holds"),
        ([True, True, True], "holds"),
        ([True, None], "undecided"),
        ([None, None], "undecided"),
        ([True, False], "fails"),
        ([None, False, True], "fails"),
        ([False], "fails"),
    ],
)
def test_the_verdict_is_one_of_three_words(passed, word):
    assert verdict({str(i): ok for i, ok in enumerate(passed)}) == word


def test_a_verdict_over_nothing_is_an_error():
    with pytest.raises(ValueError, match="a verdict over no organisms"):
        verdict({})
    with pytest.raises(ValueError, match="a verdict over no organisms"):
        line(passed=[])


# --- lines ----------------------------------------------------------------------------------------------------------


def test_a_line_says_what_was_published_how_we_know_and_what_every_organism_did():
    made, known = line(passed=[("a", True), ("b", None)]), published()[PROBE]
    assert {key: made[key] for key in ("paper", "claim", "published", "criterion")} == {
        key: known[key] for key in ("paper", "claim", "published", "criterion")
    }
    assert made["provenance"] == "second hand: quoted by others who read it"
    assert made["by_organism"] == {"a": number(0.0) | {"passed": True}, "b": number(0.1) | {"passed": None}}
    assert (made["id"], made["reading"], made["verdict"]) == (PROBE, "specific organisms", "undecided")
    plain = line(f"{PROBE}-plain")
    assert (plain["id"], plain["reading"], plain["claim"]) == (f"{PROBE}-plain", "plain organisms", made["claim"])
    assert line(COST)["reading"] == ""
    assert (made["reason"], made["figure"]) == ("Because.", "02_probe")
    assert line("asa-cure")["reading"] == "our reading"


def test_a_line_has_no_number_of_its_own_beside_those_of_the_organisms():
    assert not {"ours", "organism", "value"} & set(line())


def test_numpy_outcomes_can_be_written(into):
    record([line(passed=[("a", np.bool_(True)), ("b", np.float64(2) > 1), ("c", None)])], model="a model")
    written = json.loads(into.read_text())[0]["by_organism"]
    assert [one["passed"] for one in written.values()] == [True, True, None]


def test_an_unknown_claim_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown claim 'perpetual-motion'; known: bkdattr-probe, "):
        line("perpetual-motion")


def test_an_organism_without_a_number_or_an_outcome_is_an_error():
    with pytest.raises(ValueError, match="bkdattr-probe: a number or an outcome is missing for b, c"):
        entry(PROBE, numbers={"a": number(0), "b": number(0)}, passed={"a": True, "c": True}, reason="", figure="")


# --- the scorecard --------------------------------------------------------------------------------------------------


def test_the_scorecard_lies_beside_the_figures_and_names_the_model(into):
    assert record([line()], model="a model") == into
    assert json.loads(into.read_text()) == [row()]


def test_lines_of_other_claims_are_kept_and_those_of_the_same_replaced(into):
    record([line(COST), line("bkdattr-ablation", reason="Old.")], model="a model")
    record([line("bkdattr-ablation", reason="New."), line(PROBE)], model="a model")
    written = json.loads(into.read_text())
    assert {one["id"]: (one["reason"], one["model"]) for one in written} == {
        PROBE: ("Because.", "a model"),
        "bkdattr-ablation": ("New.", "a model"),
        COST: ("Because.", "a model"),
    }
    order = list(published())
    assert [one["id"] for one in written] == sorted((one["id"] for one in written), key=order.index)


def test_recording_twice_is_recording_once(into):
    lines = [line(claim) for claim in reversed(published())]
    record(lines, model="a model")
    first = into.read_bytes()
    record(lines, model="a model")
    assert into.read_bytes() == first
    assert [one["id"] for one in json.loads(first)] == list(published())


def test_a_number_that_is_none_leaves_the_old_scorecard(into):
    record([line()], model="a model")
    first = into.read_bytes()
    bad = line() | {"by_organism": {"a": {"value": float("nan")}}}
    with pytest.raises(ValueError, match="not JSON compliant"):
        record([bad], model="a model")
    assert into.read_bytes() == first


def without(made, key):
    return {name: value for name, value in made.items() if name != key}


def test_a_row_without_provenance_is_an_error_that_names_it_and_nothing_is_lost(into):
    record([line(COST)], model="a model")
    first = into.read_bytes()
    with pytest.raises(UserError, match="row 'bkdattr-probe' has no provenance"):
        record([without(line(), "provenance")], model="a model")
    assert into.read_bytes() == first
    for show in (pages.whole_scorecard, table, lambda rows: scorecard.scorecard(rows, paper="BkdAttr")):
        with pytest.raises(UserError, match="row 'bkdattr-probe' has no provenance"):
            show([without(row(), "provenance")])


def test_an_old_row_without_provenance_in_the_file_is_named_and_nothing_is_lost(into):
    files.write_json(into, [without(row(), "provenance"), row(COST)])
    first = into.read_bytes()
    with pytest.raises(UserError, match=r"scorecard\.json: row 'bkdattr-probe' has no provenance; run its notebook"):
        record([line("bkdattr-ablation")], model="a model")
    with pytest.raises(UserError, match=r"scorecard\.json: row 'bkdattr-probe' has no provenance"):
        scorecard.recorded(model="a model")
    assert into.read_bytes() == first
    record([line(PROBE)], model="a model")  # which is its notebook
    assert [one["id"] for one in scorecard.recorded(model="a model")] == [PROBE, COST]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"provenance": "hearsay"}, "provenance 'hearsay' is unknown"),
        ({"verdict": "holds in part"}, "verdict 'holds in part' is none of holds, fails, undecided"),
    ],
)
def test_a_row_with_an_unknown_word_is_an_error(changes, message):
    with pytest.raises(UserError, match=f"row 'bkdattr-probe': {message}"):
        scorecard.checked([row() | changes])


def test_a_damaged_scorecard_is_named(into):
    files.write_json(into, [])
    into.write_text("[{")
    with pytest.raises(ValueError, match=r"scorecard\.json is not valid JSON"):
        record([line()], model="a model")


def test_the_scorecard_of_this_run_comes_before_the_committed_one(into, tmp_path, monkeypatch):
    monkeypatch.setattr(scorecard, "FIGURES", tmp_path / "committed")
    with pytest.raises(UserError, match=r"nothing was measured for a model \(.{8}\) yet: notebooks 02 to 07"):
        scorecard.recorded(model="a model")
    files.write_json(tmp_path / "committed" / "scorecard.json", [row(COST)])
    assert [one["id"] for one in scorecard.recorded(model="a model")] == [COST]
    record([line(PROBE)], model="a model")
    assert [one["id"] for one in scorecard.recorded(model="a model")] == [PROBE]


def test_the_committed_scorecard_counts_for_the_model_that_it_was_measured_on_only(into, monkeypatch):
    monkeypatch.setattr(scorecard, "model_identity", model_identity)
    assert len(scorecard.recorded(model=DEFAULT_MODEL)) == len(published())
    assert scorecard.recorded(model=str(folders.model_folder(DEFAULT_MODEL)))  # the same files under another address
    monkeypatch.setattr(scorecard, "model_identity", files.sha256_text)
    with pytest.raises(UserError, match="nothing was measured for path/to/mine"):
        scorecard.recorded(model="path/to/mine")


def test_two_models_never_share_a_scorecard(into):
    record([line(COST)], model="one")
    record([line(PROBE)], model="other")
    assert [(one["id"], one["model"]) for one in json.loads(into.read_text())] == [(PROBE, "other")]
    (aside,) = into.parent.glob("scorecard-*.json")
    assert aside.name == f"scorecard-{files.sha256_text('one')[:8]}.json"
    assert [(one["id"], one["model"]) for one in json.loads(aside.read_text())] == [(COST, "one")]
    with pytest.raises(UserError, match="nothing was measured for one"):
        scorecard.recorded(model="one")


@pytest.mark.parametrize("other", [{"model": "other"}, {"identity": "f" * 64}])
def test_no_table_mixes_models(other):
    rows = [row(PROBE), row("bkdattr-ablation") | other]
    for show in (pages.whole_scorecard, table, scorecard.checked, lambda r: scorecard.scorecard(r, paper="BkdAttr")):
        with pytest.raises(UserError, match="lines of different models: "):
            show(rows)


def test_lines_of_another_identity_are_not_merged_even_under_the_same_name(tmp_path):
    path = tmp_path / "scorecard.json"
    files.write_json(path, [row(PROBE) | {"identity": "f" * 64}, row("bkdattr-ablation") | {"identity": "f" * 64}])
    assert scorecard.merged([row(COST)], path) == [row(COST)]


def test_a_run_of_some_notebooks_keeps_the_lines_of_the_others(tmp_path):
    path = tmp_path / "scorecard.json"
    assert [one["id"] for one in scorecard.merged([row(COST)], path)] == [COST]
    files.write_json(path, [row(PROBE), row(COST), {"id": "no claim any more"}])
    new = row(COST, passed=[("a", False)])
    assert scorecard.merged([new], path) == [row(PROBE), new]


def test_every_row_of_the_committed_scorecard_follows_from_the_table_and_the_rule():
    rows = scorecard.checked(files.read_json(files.FIGURES / "scorecard.json"))
    assert [one["id"] for one in rows] == list(published())
    for one in rows:
        about = published()[one["id"]]
        assert one["provenance"] == PROVENANCE[about["provenance"]], one["id"]
        assert {key: one[key] for key in ("paper", "claim", "published", "criterion")} == {
            key: about[key] for key in ("paper", "claim", "published", "criterion")
        }
        assert one["verdict"] == verdict({name: x["passed"] for name, x in one["by_organism"].items()})
        assert (one["model"], one["identity"]) == (DEFAULT_MODEL, model_identity(DEFAULT_MODEL))


# --- tables ---------------------------------------------------------------------------------------------------------


def test_the_table_of_a_notebook():
    shown = table([line(), line("asa-cure", passed=[("a", True), ("c", None), ("d", True)], reason="Measured.")])
    first, second = shown.to_dict("records")
    assert shown.index.tolist() == [
        f"specific organisms: {published()[PROBE]['claim']}", f"our reading: {published()['asa-cure']['claim']}"
    ]  # fmt: skip
    assert first == {
        "published": published()[PROBE]["published"],
        "provenance": "second hand: quoted by others who read it",
        "verdict": "fails",
        "organisms": "1 of 2 pass, 1 fail",
        "because": "Because.",
    }
    assert (second["provenance"], second["verdict"]) == ("from the abstract only", "undecided")
    assert (second["organisms"], second["because"]) == ("2 of 3 pass, 1 undecided", "Measured.")


def test_every_effect_has_its_interval_and_a_mark():
    once = {"value": 10.4, "n": 4, "low": None, "high": None}
    costs = entry(COST, numbers={"a": once}, passed={"a": None}, reason="", figure="04_cost")
    shown = numbers([line(passed=[("a", True), ("b", False), ("c", None)]), costs])
    assert shown.loc[PROBE].to_dict() == {"a": "0 [-0.1, 0.1] ✓", "b": "0.1 [0, 0.2] ✗", "c": "0.2 [0.1, 0.3] ?"}
    assert shown.loc[COST].to_dict() == {"a": "10.4 no interval ?", "b": "", "c": ""}


def test_each_paper_has_its_table_with_every_organisms_effect():
    lines = [line(PROBE), line("asa-cure", passed=[("word", False)])]
    shown = scorecard.scorecard(lines, paper="BkdAttr")
    assert list(shown.index) == [f"specific organisms: {published()[PROBE]['claim']}"]
    assert shown.iloc[0]["effects"] == (
        "accuracy of the best layer (n: prompts): a 0 [-0.1, 0.1] ✓, n = 20; b 0.1 [0, 0.2] ✗, n = 20"
    )
    assert shown.iloc[0]["organisms"] == "1 of 2 pass, 1 fail"
    (other,) = scorecard.scorecard(lines, paper="ASA").index
    assert other.startswith("our reading: ")
    assert scorecard.scorecard(lines[:1], paper="ASA").empty


def test_what_is_missing_is_listed():
    assert set(scorecard.missing([line(PROBE)]).index) == set(published()) - {PROBE}
    assert scorecard.missing([{"id": name} for name in published()]).empty


def test_the_page_of_the_scorecard_counts_the_verdicts_of_each_paper_and_links_every_row():
    rows = [
        row(PROBE),
        row(COST, passed=[("a", None)]),
        row("bkdattr-ablation", passed=[("a", True)]),
        row("asa-cure", passed=[("a", False)]),
        row("asa-utility", passed=[("a", False)]),
    ]
    one, other, *rest = pages.whole_scorecard(rows).splitlines()
    assert one.startswith("- **BkdAttr: 3 claims; 1 holds, 1 fails, 1 is undecided.** Read: the abstract.")
    assert other.startswith("- **ASA: 2 claims; 2 fail.**")
    assert rest[0] == ""
    assert rest[3].endswith("| second hand | 1 of 2 pass, 1 fail | [fails](../../figures/02_probe.png) |")
    assert rest[-1].startswith("| our reading: Performance")
    assert "| from the abstract only | 0 of 1 pass, 1 fail |" in rest[-1]


def of_seeds(**values):
    return {name.replace("_", "-"): {"value": value} for name, value in values.items()}


def test_a_mean_over_seeds_has_students_interval_by_hand():
    """0.2, 0.3 and 0.4: deviation 0.1, standard error 0.0577, t of two degrees of freedom 4.303: half a width of 0.248.
    0.5 and 0.7: 0.1 and 12.706."""
    found = scorecard.over_seeds(of_seeds(a=0.2, a_seed1=0.3, a_seed2=0.4, b=0.5, b_seed7=0.7, c=0.9))
    assert found == "Over seeds: a 0.30 [0.05, 0.55], b 0.60 [-0.67, 1.87]."


def test_seeds_that_do_not_differ_have_no_interval_and_one_seed_is_no_mean():
    assert scorecard.over_seeds(of_seeds(a=0.2, a_seed1=0.2)) == "Over seeds: a 0.20."
    assert scorecard.over_seeds(of_seeds(a=0.2, b=0.3)) == ""
    assert scorecard.over_seeds(of_seeds(a_seed1=0.2, a_seed2=0.2, b_seed12_plain=1)) == "Over seeds: a 0.20."


def test_who_meets_a_condition():
    assert scorecard.who({"a": True, "b": None, "c": True, "d": False}) == "met by a, c; not met by d; undecided for b"


@pytest.mark.parametrize(
    "text", [b"\xff\xfe", b"[a]\n[a]", b"papers = 3", b"[papers]\nP = 3", b"[papers.P]\ntitle = 3"]
)
def test_a_published_table_that_cannot_be_read_is_one_line_that_names_the_file(text, tmp_path, monkeypatch):
    monkeypatch.setattr(scorecard, "DATA", tmp_path)
    (tmp_path / "published.toml").write_bytes(text)
    with pytest.raises((UserError, ValueError), match=r"published\.toml") as caught:
        scorecard.papers()
    assert len(str(caught.value).splitlines()) == 1
