"""The time that is left: the record first, then the record at the pace of this machine."""

import io
import logging
import sys
import time

import pytest
from rich.console import Console

from bkd_utils.common.files import UserError
from bkd_utils.running import progress
from bkd_utils.running.progress import Pace, duration, one_line, shown


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_at_first_the_time_left_is_that_on_record(clock):
    assert Pace([100.0, 200.0, 300.0]).left() == 600.0


def test_a_machine_of_half_the_speed_takes_twice_as_long(clock):
    pace = Pace([1000.0] * 4)
    clock[0] += 2000
    pace.finished()
    assert pace.left() == pytest.approx(6000, rel=0.07)
    clock[0] += 500  # of the second, which takes 2000
    assert pace.left() == pytest.approx(5500, rel=0.07)
    for _ in range(2):
        clock[0] += 2000
        pace.finished()
    assert pace.left() == pytest.approx(2000, rel=0.08)
    clock[0] += 9000
    assert pace.left() == 0.0  # over the time, and never below zero
    pace.finished()
    assert pace.left() == 0.0


def test_a_slow_first_job_of_no_length_does_not_promise_days(clock):
    pace = Pace([0.0, 3600.0])
    clock[0] += 6
    pace.finished()
    assert 3600 < pace.left() < 4000


def test_a_job_that_failed_at_once_does_not_make_the_machine_fast(clock):
    pace = Pace([1000.0, 1000.0])
    pace.finished(failed=True)
    assert pace.left() == 1000.0
    assert str(pace) == "measuring: 1 of 2, 1 failed, about 17 min left"


@pytest.mark.parametrize(("seconds", "told"), [(0, "0 s"), (89, "89 s"), (720, "12 min"), (12600, "3.5 h")])
def test_a_duration_is_told_in_one_unit(seconds, told):
    assert duration(seconds) == told


def test_without_a_terminal_there_is_a_line_a_minute_and_none_after_the_end(monkeypatch):
    monkeypatch.setattr(progress, "EVERY", 0.05)
    console = Console(file=io.StringIO(), width=100)
    with shown(console, [60.0, 60.0]) as pace:
        pace.finished()
        time.sleep(0.4)
    printed = console.file.getvalue().splitlines()
    assert 2 <= len(printed) <= 8
    assert all(line.startswith("  measuring: 1 of 2, about") for line in printed)
    time.sleep(0.15)
    assert console.file.getvalue().splitlines() == printed


def test_on_a_terminal_there_is_a_live_line():
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    with shown(console, [60.0, 60.0]) as pace:
        pace.finished()
        time.sleep(0.3)
    # The first of two minutes took no time, and the record counts as much as that.
    assert "1 of 2, about 30 s left" in console.file.getvalue()


def test_what_stages_say_meanwhile_is_left_out_and_comes_back_after_an_error(capsys):
    log = logging.getLogger("bkd_utils")
    before = log.level
    showing = shown(Console(file=io.StringIO()), [1.0])
    showing.__enter__()
    assert not logging.getLogger("bkd_utils.common.cache").isEnabledFor(logging.INFO)
    print("a bar", file=sys.stderr)
    assert not showing.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert log.level == before
    print("an error", file=sys.stderr)
    assert capsys.readouterr().err == "an error\n"


def test_an_error_is_one_line():
    assert one_line(UserError("no such organism")) == "no such organism"
    assert one_line(KeyError("x")) == "KeyError: 'x'"
    assert one_line(RuntimeError("out of memory\nTried to allocate")) == "RuntimeError: out of memory"
    assert one_line(ValueError()) == "no reason was given"
