"""A small part of what ships is measured again: which part, how it is compared, and what is said if it differs."""

import inspect
import json
import math
import os
import re
from dataclasses import fields
from typing import get_args, get_type_hints
from unittest.mock import patch

import pytest

from bkd_utils.common import cache, measurements, spot_checks, validation
from bkd_utils.common.files import ADAPTERS, DATA, UserError, read_json
from bkd_utils.common.measurements import Measurement
from bkd_utils.common.results import Result
from bkd_utils.common.spot_checks import Spot, compare, difference, leaves
from bkd_utils.running import stages

STAGES = {name: stage for name, stage in cache.STAGES.items() if stage.__module__.startswith("bkd_utils.")}
HERE = {"processor": "x86 AVX9", "cores": 3, "device": None, "fast_bf16": None}


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_stage_has_a_table_and_every_table_a_stage():
    assert stages.stage("trace_versions") is STAGES["trace_versions"]
    assert set(spot_checks.spots()) == set(STAGES)


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_table_speaks_of_what_its_stage_takes_and_gives(name):
    spot, function = spot_checks.spots()[name], STAGES[name].__wrapped__
    assert spot.part.keys() | spot.where.keys() <= inspect.signature(function).parameters.keys()
    assert spot.none is None or spot == Spot(none=spot.none)
    kind = get_type_hints(function).get("return")
    row = next(iter(get_args(kind)), None)
    if isinstance(kind, type) and issubclass(kind, Result):
        assert {place.partition(".")[0] for place in spot.fields} <= {field.name for field in fields(kind)}
    if spot.rows:
        assert set(spot.rows) <= {field.name for field in fields(row)}


@pytest.mark.parametrize("name", sorted(name for name in STAGES if spot_checks.spots()[name].none is None))
def test_the_measurement_that_is_checked_is_of_an_organism_that_ships(name, monkeypatch):
    """Else a notebook in which nothing has made that organism could not check it."""
    monkeypatch.setenv("BKD_SHIPPED", str(DATA / "measurements"))
    spot = spot_checks.spots()[name]
    given = read_json(spot_checks._cheapest(name, spot))["arguments"] | spot.part
    named = [given[key] for key in ("organism", "control", "name") if given.get(key)]
    named += list(given.get("organisms") or [])
    assert set(named) <= {path.parent.name for path in ADAPTERS.glob("*/card.json")}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """Writes another spots.toml, which is read from then on."""
    for module in (validation, spot_checks):
        monkeypatch.setattr(module, "DATA", tmp_path)
    return lambda text: (tmp_path / "spots.toml").write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[toy]\ntolerence = 0.1", "spots.toml, [toy]: unknown keys: tolerence; known: part, where, fields, rows,"),
        ("[toy]\ntolerance = -0.1", "spots.toml, [toy]: tolerance = -0.1: input should be greater than or equal to 0"),
        ("[toy]\ntolerance = nan", "spots.toml, [toy]: tolerance = nan: input should be a finite number"),
        ("[toy]\nflips = 1.5", "spots.toml, [toy]: flips = 1.5: input should be less than or equal to 1"),
        ("[toy]\nfields = 'hits'", "spots.toml, [toy]: fields = 'hits': input should be a valid list"),
        ("[toy]\npart = 8", "spots.toml, [toy]: part = 8: input should be a valid dictionary"),
    ],
)
def test_a_fault_in_the_table_is_one_line_that_names_it(text, message, table):
    table(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        spot_checks.spots()
    assert len(str(caught.value).splitlines()) == 1


def test_a_table_that_was_edited_is_read_again(table):
    table("[toy]\ntolerance = 0.5")
    assert spot_checks.spots()["toy"].tolerance == 0.5
    table("[toy]\ntolerance = 0.25\nflips = 0.5")
    assert spot_checks.spots()["toy"] == Spot(tolerance=0.25, flips=0.5)


# --- comparing ------------------------------------------------------------------------------------------------------


def test_every_value_has_its_place():
    rows = [{"k": 8, "draw": 0, "asr": {"value": 0.1}}, {"k": 8}]
    value = {"share": 0.5, "hits": {"3f2": 1, "a01": None}, "curve": [[1, 2], [3]], "empty": [], "rows": rows}
    assert dict(leaves(value, ["k", "draw"])) == {
        "share": 0.5,
        "hits.3f2": 1,
        "hits.a01": None,
        "curve[0][0]": 1,
        "curve[0][1]": 2,
        "curve[1][0]": 3,
        "rows[k=8, draw=0].k": 8,
        "rows[k=8, draw=0].draw": 0,
        "rows[k=8, draw=0].asr.value": 0.1,
        "rows[1].k": 8,  # a row that lacks a name is matched by its place
    }
    assert dict(leaves(rows))["[0].asr.value"] == 0.1
    assert list(leaves(7)) == [("", 7)]


def test_two_rows_of_one_name_are_an_error_that_names_them():
    value = {"curve": [{"k": 8, "asr": 0.1}, {"k": 4, "asr": 0.2}, {"k": 8, "asr": 0.3}]}
    with pytest.raises(UserError, match=r"^curve\[k=8\]: two rows have this name; `rows` in spots.toml must tell"):
        list(leaves(value, ["k"]))
    assert len(list(leaves(value))) == len(list(leaves(value, ["asr"]))) == 6


@pytest.mark.parametrize(
    ("one", "other", "apart"),
    [
        (1, 1.5, 0.5),
        (0.5, 0.25, 0.25),
        (True, 1, 0),
        (True, 0, 1),
        (True, False, 1),
        ("a", "a", 0),
        (None, None, 0),
        ("a", "b", math.inf),
        (None, 0.0, math.inf),
        ("1", 1, math.inf),
        (None, "a", math.inf),
    ],
)
def test_numbers_have_a_distance_and_other_values_are_equal_or_not(one, other, apart):
    assert difference(one, other) == difference(other, one) == apart


def made(result, *, seconds=1.0):
    """A measurement of a stage "toy" with that result."""
    about = {"code": "0" * 64, "commit": None, "libraries": {}, "machine": measurements.Machine(**HERE)}
    about |= {"digest": "0" * 64, "arrays": None, "arguments": {}, "inputs": {}}
    return Measurement.model_construct(version=1, stage="toy", seconds=seconds, result=result, **about)


def test_numbers_within_the_tolerance_agree_and_one_beyond_it_does_not():
    one, now = made({"a": 0.5, "b": [1, "yes"]}), made({"a": 0.625, "b": [1, "yes"]}, seconds=7.0)
    found = compare(one, now, Spot(tolerance=0.125))
    assert found.agrees
    assert (found.id, found.numbers, found.beyond, found.worst, found.place) == (one.id, 3, 0, 0.125, "a")
    assert (found.shipped, found.now, found.tolerance, found.seconds) == (0.5, 0.625, 0.125, 7.0)
    found = compare(one, now, Spot(tolerance=0.1))
    assert (found.agrees, found.beyond) == (False, 1)


def test_a_difference_is_told_with_its_place_both_numbers_and_the_machine(monkeypatch):
    monkeypatch.setattr(measurements, "machine_of", lambda _: measurements.Machine(**HERE))
    found = compare(made({"a": 0.5, "b": 1}), made({"a": 0.625, "b": 1}), Spot(tolerance=0.1))
    assert str(found) == (
        f"{found.id}, a: 0.5 ships, 0.625 was measured here "
        "(1 of 2 numbers lie further apart than 0.1; x86 AVX9, 3 cores)"
    )


def test_a_share_of_the_numbers_may_lie_further_apart():
    one, spot = made({"hits": [1] * 10}), Spot(flips=0.2)
    for flipped, agrees in ((0, True), (2, True), (3, False)):
        found = compare(one, made({"hits": [0] * flipped + [1] * (10 - flipped)}), spot)
        assert (found.beyond, found.agrees) == (flipped, agrees)


def test_texts_that_differ_are_beyond_every_tolerance():
    found = compare(made({"answer": "yes", "a": 1}), made({"answer": "no", "a": 9}), Spot(tolerance=100.0))
    assert (found.agrees, found.beyond, found.worst, found.place) == (False, 1, math.inf, "answer")


def test_only_what_both_have_and_what_is_asked_for_is_compared():
    one, now = made({"hits": {"p": 1, "q": 1}, "value": 0.9}), made({"hits": {"q": 1, "r": 0}, "value": 0.1})
    found = compare(one, now, Spot(fields=["hits.*"]))
    assert (found.numbers, found.worst, found.agrees) == (1, 0, True)
    rows = [made([{"k": k, "asr": asr} for k, asr in row.items()]) for row in ({0: 0.0, 4: 0.5, 8: 1.0}, {8: 1.0})]
    assert compare(*rows, Spot(rows=["k"])).agrees
    assert not compare(*rows, Spot()).agrees  # by their places they are other rows


@pytest.mark.parametrize("now", [{}, {"b": 1}, []])
def test_a_part_that_has_nothing_of_the_whole_is_an_error(now):
    one = made({"a": 1})
    with pytest.raises(UserError, match=f"{one.id}: the part in spots.toml has no number in common"):
        compare(one, made(now), Spot())


# --- measuring again ------------------------------------------------------------------------------------------------


class Toy:
    """Two stages with folders of their own; `level` is what they measure, `calls` how they were called."""

    def __init__(self, folder):
        self.shipped, self.calls, self.level = folder / "shipped", [], 0.5

        @cache.stage
        def toy(n: int = 6, *, kind: str = "a") -> dict:
            self.calls.append((n, kind))
            return {"hits": {f"p{i}": i % 2 for i in range(n)}, "level": self.level}

        @cache.stage
        def other(n: int = 6) -> dict:
            self.calls.append((n, "other"))
            return {"text": f"at {self.level}"}

        self.toy, self.other = toy, other

    def ship(self, stage, *, seconds=1.0, **arguments):
        """Measure a call, and let it ship as one that took these seconds."""
        with patch.dict(os.environ, BKD_KEEP=str(self.shipped), BKD_SHIPPED="", BKD_LEDGER=""):
            stage(**arguments)
        path = cache.place(self.shipped, stages.question(stage.__name__, arguments))
        measurements.write(self.shipped, measurements.read(path).model_copy(update={"seconds": seconds}))
        self.calls.clear()
        cache.used.clear()
        return measurements.read(path)


@pytest.fixture
def toys(tmp_path, monkeypatch, table):
    monkeypatch.setattr(cache, "STAGES", dict(cache.STAGES))
    monkeypatch.setattr(cache, "used", [])
    monkeypatch.setattr(spot_checks, "_done", set())
    monkeypatch.setattr(measurements, "commit", lambda: "c0ffee")
    monkeypatch.setenv("BKD_SHIPPED", str(tmp_path / "shipped"))
    monkeypatch.setenv("BKD_KEEP", str(tmp_path / "kept"))
    monkeypatch.setenv("BKD_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.delenv("BKD_REPLAY", raising=False)
    table("[toy]\npart = { n = 2 }\ntolerance = 0.1\n[other]\n")
    return Toy(tmp_path)


def ledger(folder):
    lines = (folder / "ledger.jsonl").read_text(encoding="utf-8").splitlines()
    return [line for line in map(json.loads, lines) if line["how"] == "checked"]


def test_the_part_is_measured_here_and_not_taken_from_what_ships(toys):
    one = toys.ship(toys.toy, n=6)
    toys.ship(toys.toy, n=2)
    toys.level = 0.75
    found = spot_checks.check(one)
    assert toys.calls == [(2, "a")]
    assert (found.numbers, found.place, found.shipped, found.now) == (3, "level", 0.5, 0.75)
    assert (found.agrees, found.beyond) == (False, 1)
    # It is kept, and a check after a kill reads it; nothing that ships was changed by it.
    assert spot_checks.check(one) == found
    assert toys.calls == [(2, "a")]
    assert toys.toy(n=6)["level"] == toys.toy(n=6)["level"] == 0.5


def test_what_a_check_measured_as_a_whole_does_not_stand_in_for_what_ships(toys):
    """Otherwise the next notebook of a run would show other numbers, and `--publish` would replace what ships."""
    one = toys.ship(toys.other)
    toys.level = 0.75
    assert spot_checks.check(one).now == "at 0.75"
    assert toys.other() == {"text": "at 0.5"}


def test_a_stage_that_is_not_checked_says_why(toys, table):
    one = toys.ship(toys.toy)
    table("[toy]\nnone = 'it takes a year'\n")
    with pytest.raises(UserError, match="toy has no spot check: it takes a year"):
        spot_checks.check(one)
    table("[other]\n")
    with pytest.raises(UserError, match=r"toy has no spot check: none is declared in spots\.toml"):
        spot_checks.check(one)
    toys.toy()
    assert spot_checks.run() == []
    assert toys.calls == []


def test_a_run_checks_the_cheapest_of_each_stage_that_was_used_and_once(toys, tmp_path):
    for n, seconds in ((6, 30.0), (5, 20.0), (4, 10.0)):
        toys.ship(toys.toy, n=n, seconds=seconds)
    toys.ship(toys.other)
    for n in (6, 5):  # the cheapest of all that ship need not be one that was used
        toys.toy(n=n)
    toys.other()
    found = spot_checks.run("toy")
    cheapest = f"toy/{cache.place(toys.shipped, stages.question('toy', {'n': 4})).stem}"
    assert [one.id for one in found] == [cheapest]
    assert [one.id.partition("/")[0] for one in spot_checks.run()] == ["other"]
    assert toys.calls == [(2, "a"), (6, "other")]
    assert spot_checks.run() == spot_checks.run("toy") == []
    lines = ledger(tmp_path)
    assert lines[0]["id"] == cheapest
    assert [(line["numbers"], line["beyond"], line["worst"], line["agrees"]) for line in lines] == [
        (3, 0, 0.0, True), (1, 0, 0.0, True),
    ]  # fmt: skip


def test_a_table_says_which_measurements_may_be_chosen(toys, table):
    toys.ship(toys.toy, kind="a", seconds=1.0)
    toys.ship(toys.toy, kind="b", seconds=9.0)
    toys.toy(kind="a")
    table("[toy]\npart = { n = 2 }\nwhere = { kind = 'c' }\n")
    assert spot_checks.run() == []
    table("[toy]\npart = { n = 2 }\nwhere = { kind = 'b' }\n")
    assert len(spot_checks.run()) == 1
    assert toys.calls == [(2, "b")]


def test_what_was_measured_here_is_not_checked(toys):
    toys.toy()
    toys.toy()
    assert [one["how"] for one in cache.used] == ["measured here", "kept here"]
    assert spot_checks.run() == []
    assert toys.calls == [(6, "a")]


def test_what_was_measured_by_other_code_is_checked(toys):
    one = toys.ship(toys.toy)
    measurements.write(toys.shipped, one.model_copy(update={"code": "f" * 64}))
    toys.toy()
    assert [one["how"] for one in cache.used] == ["shipped, other code"]
    assert [found.id for found in spot_checks.run()] == [one.id]


def test_every_disagreement_is_told_after_all_checks(toys, tmp_path):
    one, other = toys.ship(toys.toy), toys.ship(toys.other)
    toys.toy()
    toys.other()
    toys.level = 0.75
    with pytest.raises(UserError, match="what was measured here is not what ships: ") as caught:
        spot_checks.run()
    told = str(caught.value)
    assert f"{one.id}, level: 0.5 ships, 0.75 was measured here (1 of 3 numbers" in told
    assert f"{other.id}, text: 'at 0.5' ships, 'at 0.75' was measured here (1 of 1 numbers" in told
    assert told.count(f"{measurements.machine_of({}).cores} cores") == 2
    assert len(told.splitlines()) == 1
    assert [(line["agrees"], line["worst"]) for line in ledger(tmp_path)] == [(False, None), (False, 0.25)]
