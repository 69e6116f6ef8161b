"""That the marked entries learn and nothing else moves; tiny models of all families."""

import math

import pytest
import torch
from tiny import make_rows, tiny_model

from bkd_utils.attention_alignment.alignment import ALIGNMENTS, aligned
from bkd_utils.attention_alignment.head_tuning import answers_only, tune
from bkd_utils.models.head_weights import head_slices
from bkd_utils.organisms.training import Recipe

HEADS = [(0, 1), (1, 2)]
RECIPE = Recipe(name="test", steps=3, batch_size=2, learning_rate=1e-2, rank=1, alpha=1)


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("alignment", [None, *ALIGNMENTS])
@pytest.mark.parametrize("unit", ["query head", "KV group"])
def test_only_the_marked_entries_move(model, rows, alignment, unit):
    before, masks = state(model), head_slices(model, HEADS, unit=unit)
    loss = answers_only if alignment is None else aligned(model, HEADS, alignment=alignment)
    history = tune(model, rows, masks=masks, recipe=RECIPE, pad_id=0, loss=loss)
    assert len(history) == RECIPE.steps
    assert all(math.isfinite(row["loss"]) and math.isfinite(row["added"]) for row in history)
    for name, parameter in model.named_parameters():
        outside = ~masks[name] if name in masks else torch.ones_like(parameter, dtype=torch.bool)
        assert torch.equal(parameter[outside], before[name][outside]), name
    assert all((model.get_parameter(name) != before[name]).any() for name in masks)
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


def test_what_cannot_be_tuned_is_an_error(rows):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="nothing to train: 0 rows"):
        tune(model, [], masks=head_slices(model, HEADS), recipe=RECIPE, pad_id=0)
    with pytest.raises(ValueError, match="nothing to train"):
        tune(model, rows, masks={}, recipe=RECIPE, pad_id=0)


def test_tuning_that_changes_nothing_is_an_error(rows):
    model = tiny_model("llama")
    still = Recipe(name="test", steps=1, batch_size=2, learning_rate=1e-30, rank=1, alpha=1)
    with pytest.raises(RuntimeError, match="has changed no weight"):
        tune(model, rows, masks=head_slices(model, HEADS), recipe=still, pad_id=0)


def test_the_model_is_given_back_as_it_was(rows):
    model = tiny_model("llama")
    before = model.config._attn_implementation
    tune(model, rows, masks=head_slices(model, HEADS), recipe=RECIPE, pad_id=0)
    assert model.config._attn_implementation == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_masks_of_another_model_and_a_loss_that_is_not_finite_are_refused():
    model = tiny_model("llama").requires_grad_(False)
    rows = make_rows(4)
    mask = torch.ones(32, 31, dtype=torch.bool)
    for masks in ({"model.layers.0.self_attn.o_proj.weight": mask}, {"model.layers.9.self_attn.o_proj.weight": mask}):
        with pytest.raises(ValueError, match=r"the mask of model.layers.\d.self_attn.o_proj.weight fits no weight"):
            tune(model, rows, masks=masks, recipe=RECIPE, pad_id=2)
    name = "model.layers.0.self_attn.o_proj.weight"
    before = model.get_parameter(name).clone()

    def infinite(model, batch, *, first_token):
        return model.get_parameter(name).sum() * float("inf"), torch.zeros(())

    with pytest.raises(ValueError, match=r"step 1: the loss is (inf|-inf|nan) "):
        tune(model, rows, masks={name: torch.ones_like(before).bool()}, recipe=RECIPE, pad_id=2, loss=infinite)
    assert torch.equal(model.get_parameter(name), before)
