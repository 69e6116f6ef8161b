"""Which weights are a head's, that nothing else moves, what the alignment losses do; tiny models of all families."""

import math

import pytest
import torch
from tiny import tiny_model

from bkd_utils.alignment import (
    ALIGNMENTS,
    Pull,
    groups,
    head_slices,
    less_excess,
    reset,
    touched,
    toward_mean,
    toward_nearest,
    tune,
)
from bkd_utils.interventions import head_outputs
from bkd_utils.prompt_cache import anatomy
from bkd_utils.training import Recipe

HEADS = [(0, 1), (1, 2)]
RECIPE = Recipe(name="test", steps=3, batch_size=2, learning_rate=1e-2, rank=1, alpha=1)


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


# --- slices ---------------------------------------------------------------------------------------------------------


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


# --- tuning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ALIGNMENTS)
@pytest.mark.parametrize("unit", ["query head", "KV group"])
def test_only_the_marked_entries_move(model, rows, alignment, unit):
    before, masks = state(model), head_slices(model, HEADS, unit=unit)
    history = tune(model, rows, masks=masks, recipe=RECIPE, pad_id=0, suspicious=HEADS, alignment=alignment, beta=1.0)
    assert len(history) == RECIPE.steps
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["alignment"]) for row in history)
    for name, parameter in model.named_parameters():
        outside = ~masks[name] if name in masks else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[outside], before[name][outside]), name
    counts = touched(before, model)
    assert set(counts) == set(masks)
    assert all(0 < count <= int(masks[name].sum()) for name, count in counts.items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_same_seed_gives_the_same_weights_and_another_does_not(rows):
    found = []
    for seed in (0, 0, 1):
        model = tiny_model("llama")
        tune(model, rows, masks=head_slices(model, HEADS), recipe=RECIPE, pad_id=0, seed=seed)
        found.append(state(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], found[2][name]) for name in found[0])


def test_loss_falls_on_what_is_trained(rows):
    model = tiny_model("llama")
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters() if "proj" in name}
    recipe = Recipe(name="test", steps=40, batch_size=4, learning_rate=1e-2, rank=1, alpha=1)
    history = tune(model, rows, masks=masks, recipe=recipe, pad_id=0)
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_reset_draws_the_marked_weights_anew(model):
    before, masks = state(model), head_slices(model, HEADS, unit="KV group")
    reset(model, masks, seed=0)
    assert set(touched(before, model)) <= set(masks)
    for name, mask in masks.items():
        parameter = model.get_parameter(name)
        assert torch.equal(parameter[~mask], before[name][~mask])
        if parameter.ndim > 1:
            assert 0.5 < (parameter[mask].std() / before[name].std()).item() < 2


def test_alignment_brings_suspicious_heads_toward_the_safe_mean(rows):
    model = tiny_model("llama")
    recipe = Recipe(name="test", steps=30, batch_size=4, learning_rate=1e-2, rank=1, alpha=1)
    masks = head_slices(model, HEADS, unit="KV group")
    history = tune(model, rows, masks=masks, recipe=recipe, pad_id=0, suspicious=HEADS, alignment="mean", beta=100.0)
    assert history[-1]["alignment"] < 0.7 * history[0]["alignment"]


# --- losses ---------------------------------------------------------------------------------------------------------


def pull(maps, suspicious, real=None):
    maps = maps / maps.sum(-1, keepdim=True)
    n_heads = maps.shape[1]
    safe = {0: [head for head in range(n_heads) if head not in suspicious]}
    real = torch.ones(maps.shape[0], maps.shape[2], dtype=torch.bool) if real is None else real
    return Pull([maps], real, {0: suspicious}, safe)


def test_divergence_is_the_brute_force_sum():
    torch.manual_seed(0)
    maps = torch.rand(2, 3, 4, 4).tril() + torch.eye(4) * 1e-3
    given = pull(maps, [1])
    total = 0.0
    for row in range(2):
        for query in range(4):
            target = (given.maps[0][row, 0, query] + given.maps[0][row, 2, query]) / 2
            own = given.maps[0][row, 1, query]
            total += sum(t * math.log(t / o) for t, o in zip(target.tolist(), own.tolist(), strict=True) if t > 0)
    assert toward_mean(given).item() == pytest.approx(total / 8, rel=1e-3)


def test_heads_that_are_where_they_should_be_feel_no_pull():
    maps = torch.rand(2, 1, 5, 5).tril().expand(2, 4, 5, 5) + 1e-3 * torch.eye(5)
    assert toward_mean(pull(maps, [0, 3])).item() == pytest.approx(0, abs=1e-5)
    assert toward_nearest(pull(maps, [0, 3])).item() == pytest.approx(0, abs=1e-5)
    assert less_excess(pull(maps, [0, 3])).item() == pytest.approx(0, abs=1e-5)


def test_the_nearest_is_nearer_than_the_mean():
    torch.manual_seed(0)
    maps = torch.rand(1, 4, 5, 5).tril() + 1e-3 * torch.eye(5)
    maps[:, 0] = maps[:, 2]
    assert toward_nearest(pull(maps, [0])).item() == pytest.approx(0, abs=1e-5)
    assert toward_mean(pull(maps, [0])).item() > 0.01


@pytest.mark.parametrize("loss", [toward_mean, toward_nearest])
def test_padding_has_no_say(loss):
    torch.manual_seed(0)
    maps = torch.rand(1, 3, 4, 4).tril() + 1e-3 * torch.eye(4)
    real = torch.tensor([[False, False, True, True]])
    expected = loss(pull(maps, [1], real)).item()
    for _ in range(20):
        other = maps.clone()
        other[:, :, :2] = torch.rand(1, 3, 2, 4) ** 8
        assert loss(pull(other, [1], real)).item() == pytest.approx(expected)


def test_excess_is_what_exceeds_the_safe_heads():
    apart = torch.eye(4)[None, :3, None].expand(1, 3, 4, 4).clone()
    apart[:, 1] = apart[:, 0]  # heads 0 and 1 agree, head 2 does not
    assert less_excess(pull(apart, [0])).item() == pytest.approx(0.5 - 0.25)
    assert less_excess(pull(apart, [2])).item() == 0.0


# --- errors ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_tuned_is_an_error(rows):
    model = tiny_model("llama")
    masks = head_slices(model, HEADS)
    with pytest.raises(ValueError, match="unknown unit 'neuron'; known: query head, KV group"):
        head_slices(model, HEADS, unit="neuron")
    with pytest.raises(ValueError, match="slices of no heads"):
        head_slices(model, [])
    with pytest.raises(ValueError, match="unknown alignment 'hug'"):
        tune(model, rows, masks=masks, recipe=RECIPE, pad_id=0, alignment="hug")
    with pytest.raises(ValueError, match="nothing to train: 0 rows"):
        tune(model, [], masks=masks, recipe=RECIPE, pad_id=0)
    with pytest.raises(ValueError, match="nothing to train"):
        tune(model, rows, masks={}, recipe=RECIPE, pad_id=0)
    everyone = [(0, head) for head in range(anatomy(model).n_heads)]
    for suspicious in ([], everyone):
        with pytest.raises(ValueError, match="needs suspicious heads and a safe one"):
            tune(model, rows, masks=masks, recipe=RECIPE, pad_id=0, suspicious=suspicious, alignment="mean")


def test_tuning_that_changes_nothing_is_an_error(rows):
    model = tiny_model("llama")
    still = Recipe(name="test", steps=1, batch_size=2, learning_rate=1e-30, rank=1, alpha=1)
    with pytest.raises(RuntimeError, match="has changed no weight"):
        tune(model, rows, masks=head_slices(model, HEADS), recipe=still, pad_id=0)
