from bkd_utils.experiments.attribution_cost import seconds


def test_the_function_runs_once_to_warm_up_and_then_as_often_as_asked():
    calls = []
    assert seconds(lambda: calls.append(1), repeats=2) >= 0
    assert len(calls) == 3
