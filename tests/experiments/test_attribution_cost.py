import pytest

from bkd_utils.experiments.attribution_cost import SHAPES, seconds, shape_cost


def test_the_function_runs_once_to_warm_up_and_then_as_often_as_asked():
    calls = []
    assert seconds(lambda: calls.append(1), repeats=2) >= 0
    assert len(calls) == 3


def test_an_unknown_shape_is_named():
    with pytest.raises(ValueError, match=r"unknown shape 'Llama-9'; known: SmolLM2-135M"):
        shape_cost(["Llama-9"])


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_whole(shape):
    width, n_layers, heads, kv_heads, _, _ = SHAPES[shape]
    assert width % heads == 0
    assert heads % kv_heads == 0
    assert n_layers > 2
