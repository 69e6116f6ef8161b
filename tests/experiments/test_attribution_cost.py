"""Seconds of several runs, one by one."""

from bkd_utils.experiments import attribution_cost
from bkd_utils.experiments.attribution_cost import seconds


def test_the_function_runs_once_to_warm_up_and_then_as_often_as_asked():
    calls = []
    found = seconds(lambda: calls.append(1), repeats=2)
    assert len(calls) == 3
    assert len(found) == 2
    assert min(found) >= 0


def test_each_run_has_its_own_seconds_and_that_of_the_first_one_is_not_kept(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(attribution_cost.time, "perf_counter", lambda: clock[0])
    durations = iter([100.0, 3.0, 1.0, 2.0])

    def run():
        clock[0] += next(durations)

    assert seconds(run, repeats=3) == [3.0, 1.0, 2.0]
