"""A sample of what ships is measured anew, and what lies too far apart is named."""

import io

import pytest
from patching import everywhere
from rich.console import Console

from bkd_utils.common import cache, measurements
from bkd_utils.common.files import UserError
from bkd_utils.common.spot_checks import Spot
from bkd_utils.running import resampling, stages

VALUE = 0.5


@cache.stage
def toy_share(n: int) -> dict:
    return {"shares": [VALUE + i / 8 for i in range(n)], "who": "a"}


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """Three measurements that ship, and a work folder of its own."""
    monkeypatch.setattr(resampling, "WORK", tmp_path / "work")
    everywhere(monkeypatch, "spots", lambda: {"toy_share": Spot(tolerance=0.01)})
    folder = tmp_path / "shipped"
    for n in (2, 3, 4):
        stages.measure("toy_share", {"n": n}, folder=folder)
    monkeypatch.setenv("BKD_SHIPPED", str(folder))
    return folder


def again(share=1.0, seed=0):
    stream = io.StringIO()
    console = Console(file=stream, width=160)
    done = resampling.measure_again(share=share, seed=seed, device="auto", console=console)
    return done, stream.getvalue()


def printed(done):
    stream = io.StringIO()
    return resampling.report(done, Console(file=stream, width=160)), stream.getvalue()


def test_a_share_of_each_stage_is_drawn_and_at_least_one(tmp_path):
    paths = [tmp_path / stage / f"{i:02}.json" for stage, n in (("a", 20), ("b", 2)) for i in range(n)]
    drawn = resampling.sample(paths, share=0.2, seed=1)
    assert [sum(path.parent.name == stage for path in drawn) for stage in "ab"] == [4, 1]
    assert resampling.sample(paths[::-1], share=0.2, seed=1) == drawn
    assert resampling.sample(paths, share=0.2, seed=2) != drawn
    assert resampling.sample(paths, share=1, seed=0) == paths
    assert resampling.sample(paths, share=0, seed=0) == []


def test_what_is_equal_is_counted_and_agrees(shipped):
    done, said = again()
    assert "3 measured, 0 there already, 0 failed" in said
    faults, text = printed(done)
    assert faults == 0
    assert "3 measurements agree, 0 do not" in text
    (row,) = [line for line in text.splitlines() if "toy_share" in line]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["toy_share", "3", "12", "12", "0", "0", ""]


@pytest.mark.parametrize(("value", "faults"), [(0.505, 0), (0.52, 3)])
def test_only_what_lies_beyond_the_tolerance_is_a_fault(shipped, monkeypatch, value, faults):
    monkeypatch.setitem(globals(), "VALUE", value)
    found, text = printed(again()[0])
    assert found == faults
    assert f"{value - 0.5:.2g}" in text
    assert text.count("was measured here (") == faults


def test_a_second_call_measures_nothing_again(shipped):
    again()
    before = {path: path.stat().st_mtime_ns for path in measurements.paths(resampling.WORK / "verified")}
    assert len(before) == 3
    again()
    assert {path: path.stat().st_mtime_ns for path in measurements.paths(resampling.WORK / "verified")} == before


def test_what_the_names_stand_for_must_be_the_same(shipped, monkeypatch):
    monkeypatch.setattr(cache.STAGES["toy_share"], "resolved", lambda _: {"inputs": {"base": "other"}})
    with pytest.raises(UserError, match=r"toy_share/.*: other models, attacks or tables are here"):
        again()


def test_what_cannot_be_measured_is_an_error_after_all(shipped, monkeypatch):
    monkeypatch.setitem(globals(), "VALUE", None)
    with pytest.raises(UserError, match=r"^3 of 3 measurements could not be made anew$"):
        again()
