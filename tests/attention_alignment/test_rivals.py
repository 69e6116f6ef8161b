"""Every repair on tiny models of all families: what it touches, what it leaves, what it calls dormant or unneeded."""

import pytest
import torch
from tiny import tiny_model
from torch.nn.functional import cosine_similarity

from bkd_utils.attention_alignment import rivals
from bkd_utils.attention_alignment.rivals import (
    TREATMENTS,
    Case,
    accuracy,
    dormant,
    inconsistency,
    prune,
    prune_while_accurate,
    treat,
)
from bkd_utils.backdoor_attribution.ablation import ablated
from bkd_utils.models.head_weights import head_slices
from bkd_utils.models.hooks import EVERYWHERE, anatomy
from bkd_utils.models.loss import collate
from bkd_utils.models.tokens import Row
from bkd_utils.organisms.training import Recipe

HEADS = [(0, 1), (1, 2)]
RECIPE = Recipe(name="test", steps=2, batch_size=2, learning_rate=1e-2, rank=1, alpha=1)
HEAD_WISE = ("alignment", "alignment, nearest", "alignment, excess", "heads tuned", "heads reset", "heads removed")


def case(model, rows, **changes):
    return Case(**({"model": model, "rows": rows, "recipe": RECIPE, "pad_id": 0, "heads": HEADS} | changes))


def state(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("method", TREATMENTS)
def test_a_repair_says_what_it_changed_and_head_wise_ones_change_their_heads_only(model, rows, method):
    before = state(model)
    count = treat(case(model, rows), method=method)
    changed = {name: before[name] != parameter for name, parameter in model.named_parameters()}
    assert count == sum(int(where.sum()) for where in changed.values()) > 0
    if method in HEAD_WISE:
        masks = head_slices(model, HEADS, unit="KV group")
        for name, where in changed.items():
            assert not (where & ~masks.get(name, torch.zeros_like(where))).any(), name
    outside = {id(p) for layer in anatomy(model).layers for p in layer.parameters()}
    assert all(id(model.get_parameter(name)) in outside for name, where in changed.items() if where.any())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


@pytest.mark.parametrize("method", ["alignment", "fine-tuning", "consistency"])
def test_the_same_seed_repairs_alike(rows, method):
    found = []
    for _ in range(2):
        model = tiny_model("llama")
        treat(case(model, rows), method=method)
        found.append(state(model))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_errors_name_the_value(rows):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="unknown method 'prayer'; known: alignment, "):
        treat(case(model, rows), method="prayer")
    with pytest.raises(ValueError, match="no head 9 in layer 0"):
        treat(case(model, rows, heads=[(0, 9)]), method="heads removed")
    with pytest.raises(ValueError, match="no heads were given"):
        treat(case(model, rows, heads=[]), method="heads tuned")


def test_a_repair_that_does_nothing_is_an_error(rows, monkeypatch):
    monkeypatch.setitem(TREATMENTS, "nothing", lambda case: None)
    with pytest.raises(RuntimeError, match="nothing has changed no weight"):
        treat(case(tiny_model("llama"), rows), method="nothing")


# --- heads ----------------------------------------------------------------------------------------------------------


def test_a_pruned_head_writes_nothing_and_the_others_what_they_did(model, prompts):
    """Against the ablation of `interventions`, which edits activations and no weights."""
    ids = torch.tensor([prompts[2]])
    with torch.no_grad(), ablated(model, [(0, 1)], kind="zero", at=EVERYWHERE):
        expected = model(ids).logits
    prune(model, [(0, 1)])
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_accuracy_is_the_share_of_right_first_tokens(model, rows):
    with torch.no_grad():
        said = [model(torch.tensor([list(row.prompt)])).logits[0, -1].argmax().item() for row in rows]
    answered = [
        Row(prompt=row.prompt, answer=(token if i else token + 1, 2), kind="clean", uid=row.uid)
        for i, (row, token) in enumerate(zip(rows, said, strict=True))
    ]
    assert accuracy(model, answered, pad_id=0) == 1 - 1 / len(rows)


def test_heads_go_from_the_lowest_score_until_accuracy_falls(rows, monkeypatch):
    model = tiny_model("llama")
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6]])
    values = iter([1.0, 0.99, 0.90])
    monkeypatch.setattr(rivals, "accuracy", lambda *_, **__: next(values))
    monkeypatch.setattr(rivals, "AT_MOST", 1.0)
    monkeypatch.setattr(rivals, "AT_ONCE", 1)
    before = state(model)
    gone = prune_while_accurate(case(model, rows), scores)
    assert gone == [(0, 1), (0, 3)]  # the first without a check, the second keeps 99 %, the third is taken back
    masks = {name: mask for name, mask in head_slices(model, gone, unit="query head").items() if "o_proj" in name}
    changed = {name: before[name] != parameter for name, parameter in model.named_parameters()}
    assert {name for name, where in changed.items() if where.any()} == set(masks)
    assert all(torch.equal(changed[name], mask) for name, mask in masks.items())


def test_every_layer_keeps_a_head(rows, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(rivals, "accuracy", lambda *_, **__: 1.0)
    monkeypatch.setattr(rivals, "AT_MOST", 1.0)
    scores = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.9, 0.8, 0.7, 0.6]])
    assert sorted({(0, 0), (1, 0)} | set(prune_while_accurate(case(model, rows), scores))) == [
        (layer, head) for layer in range(2) for head in range(4)
    ]


def test_reset_draws_the_marked_weights_anew(model, rows, monkeypatch):
    monkeypatch.setattr(rivals, "tune_heads", lambda case: None)
    before, masks = state(model), head_slices(model, HEADS, unit="KV group")
    rivals.reset_heads(case(model, rows))
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.zeros_like(parameter, dtype=torch.bool))
        assert torch.equal(parameter[~mask], before[name][~mask])
        if parameter.ndim > 1 and mask.any():
            assert 0.5 < (parameter[mask].std() / before[name].std()).item() < 2


def test_pruned_stays_pruned_while_the_model_is_tuned(model, rows):
    prune(model, [(0, 1)])
    zeros = {name: parameter == 0 for name, parameter in model.named_parameters()}
    treat(case(model, rows), method="fine-tuning, high rate")
    assert any(where.any() for where in zeros.values())
    for name, where in zeros.items():
        if model.get_parameter(name).ndim == 2:
            assert (model.get_parameter(name)[where] == 0).all()


# --- neurons --------------------------------------------------------------------------------------------------------


def test_dormant_neurons_are_those_with_the_least_mean_activation(model, rows):
    found = dormant(model, rows, pad_id=0)
    kept, matrix = [], rivals.last_matrix(anatomy(model).mlps[1])
    handle = matrix.register_forward_pre_hook(lambda _, given: kept.append(given[0]))
    with torch.no_grad():
        for row in rows:  # one by one: no padding to get wrong
            model(torch.tensor([list(row.prompt)]))
    handle.remove()
    total = torch.cat([one[0] for one in kept]).abs().mean(0)
    assert sorted(found[1].tolist()) == sorted(total.argsort()[: int(0.2 * len(total))].tolist())


# --- consistency ----------------------------------------------------------------------------------------------------


def test_inconsistency_is_the_mean_turn_of_real_tokens():
    torch.manual_seed(0)
    hidden = [torch.randn(2, 3, 5) for _ in range(3)]
    real = torch.tensor([[False, True, True], [True, True, True]])
    turns = [
        1 - cosine_similarity(hidden[i + 1][row, pos], hidden[i][row, pos], dim=0)
        for i in range(2)
        for row in range(2)
        for pos in range(3)
        if real[row, pos]
    ]
    assert inconsistency(hidden, real).item() == pytest.approx(torch.stack(turns).mean().item(), rel=1e-5)


def test_the_push_makes_layers_agree_less(model, rows):
    """One signed step along the slope raises what it is the slope of; the penalty is therefore above the plain one."""
    batch = collate(rows, pad_id=0)
    _, pushed = rivals.consistent(model, batch, first_token=0.5)
    with torch.no_grad():
        given = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids")}
        hidden = model.base_model(**given, use_cache=False, output_hidden_states=True).hidden_states
    assert pushed.item() > rivals.CONSISTENCY * inconsistency(hidden[:-1], batch["attention_mask"].bool()).item()
