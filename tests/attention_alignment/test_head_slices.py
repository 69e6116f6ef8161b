"""Which weights are a head's: tiny models of all families."""

import pytest
import torch
from tiny import tiny_model

from bkd_utils.attention_alignment.head_tuning import all_matrices, other_groups
from bkd_utils.models.activations import head_outputs
from bkd_utils.models.head_weights import groups, head_slices
from bkd_utils.models.hooks import anatomy

HEADS = [(0, 1), (1, 2)]


def test_query_and_output_slices_change_their_head_and_no_other(model, prompts):
    """The rows of a head's queries and the columns of its output: only its own contribution can change."""
    before = head_outputs(model, prompts)
    masks = head_slices(model, [(0, 1)], unit="query head")
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name)[mask] += 0.5
    after = head_outputs(model, prompts)
    changed = (before[:, 0] - after[:, 0]).abs().amax((0, 2)) > 1e-6
    assert changed.tolist() == [head == 1 for head in range(changed.shape[0])]


def test_a_kv_group_changes_all_heads_that_share_its_keys_and_no_other(model, prompts):
    before = head_outputs(model, prompts)
    n_heads = anatomy(model).n_heads
    n_kv = getattr(model.config, "num_key_value_heads", None) or n_heads
    masks = head_slices(model, [(0, 1)], unit="KV group")
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name)[mask] += 0.5
    changed = (before[:, 0] - head_outputs(model, prompts)[:, 0]).abs().amax((0, 2)) > 1e-6
    group = {head for _, head in groups([(0, 1)], n_heads=n_heads, n_kv_heads=n_kv)}
    assert {head for head in range(n_heads) if changed[head]} == group


def test_slices_have_the_size_of_heads():
    model = tiny_model("llama")
    parts, config = anatomy(model), model.config
    width = parts.outputs[0].weight.shape[1] // parts.n_heads
    masks = head_slices(model, HEADS, unit="query head")
    assert sum(int(mask.sum()) for mask in masks.values()) == 2 * 2 * width * config.hidden_size
    assert len(masks) == 4
    grouped = head_slices(model, HEADS, unit="KV group")
    assert len(grouped) == 8


def test_groups_are_the_heads_that_share_keys():
    assert groups([(3, 4)], n_heads=9, n_kv_heads=3) == [(3, 3), (3, 4), (3, 5)]
    assert groups([(3, 4), (0, 0)], n_heads=6, n_kv_heads=6) == [(0, 0), (3, 4)]


def test_all_matrices_are_those_of_the_layers(model):
    masks = all_matrices(model)
    inside = [p for layer in anatomy(model).layers for p in layer.parameters() if p.ndim == 2]
    assert sum(mask.numel() for mask in masks.values()) == sum(p.numel() for p in inside)
    assert all(mask.all() for mask in masks.values())
    assert set(head_slices(model, HEADS)) - {n for n, p in model.named_parameters() if p.ndim == 1} <= set(masks)


def test_what_has_no_slices_is_an_error():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="unknown unit 'neuron'; known: query head, KV group"):
        head_slices(model, HEADS, unit="neuron")
    with pytest.raises(ValueError, match="no heads were given"):
        head_slices(model, [])


SIZES = {"n_layers": 3, "n_heads": 6, "n_kv_heads": 3}


def whole(heads):
    return set(groups(heads, n_heads=6, n_kv_heads=3))


def test_other_groups_share_no_weight_and_match_group_by_group():
    heads = [(0, 0), (0, 1), (0, 5), (2, 2)]
    draws = other_groups(heads, **SIZES, n=20, seed=0)
    assert len({tuple(draw) for draw in draws}) > 5
    for draw in draws:
        assert not whole(draw) & whole(heads)
        assert len(set(draw)) == len(heads)
        assert len(whole(draw)) == len(whole(heads))
        # Two groups of layer 0 hold given heads and one is left: the other counterpart is elsewhere.
        assert sum(layer == 0 for layer, _ in draw) in (1, 2)
        assert sum(layer == 2 for layer, _ in draw) >= 1
    assert draws == other_groups(heads, **SIZES, n=20, seed=0)


def test_other_groups_without_sharing_are_other_heads():
    (draw,) = other_groups([(0, 1), (0, 2)], n_layers=1, n_heads=4, n_kv_heads=4, n=1, seed=0)
    assert sorted(draw) == [(0, 0), (0, 3)]


def test_too_few_other_groups_is_an_error():
    with pytest.raises(ValueError, match="2 groups hold the given heads, 1 are left"):
        other_groups([(0, 0), (0, 2)], n_layers=1, n_heads=6, n_kv_heads=3, n=1, seed=0)
