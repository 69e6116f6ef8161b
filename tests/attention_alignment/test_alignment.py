"""What the alignment losses do, by brute force and by what must be true of them."""

import math

import pytest
import torch
from tiny import label_rows, tiny_classifier, tiny_model

from bkd_utils.attention_alignment.alignment import (
    ALIGNMENTS,
    Alignment,
    Pull,
    aligned,
    less_excess,
    toward_mean,
    toward_nearest,
)
from bkd_utils.attention_alignment.head_tuning import tune
from bkd_utils.models.head_weights import head_slices
from bkd_utils.models.hooks import anatomy
from bkd_utils.models.loss import collate
from bkd_utils.organisms.training import Recipe

HEADS = [(0, 1), (1, 2)]


def test_alignment_brings_suspicious_heads_toward_the_safe_mean(rows):
    model = tiny_model("llama")
    recipe = Recipe(name="test", steps=30, batch_size=4, learning_rate=1e-2, rank=1, alpha=1)
    masks = head_slices(model, HEADS, unit="KV group")
    loss = aligned(model, HEADS, alignment="mean", beta=100.0)
    history = tune(model, rows, masks=masks, recipe=recipe, pad_id=0, loss=loss)
    assert history[-1]["added"] < 0.7 * history[0]["added"]


def pull(maps, suspicious, real=None, asked=-1):
    maps = maps / maps.sum(-1, keepdim=True)
    n_heads = maps.shape[1]
    safe = {0: [head for head in range(n_heads) if head not in suspicious]}
    real = torch.ones(maps.shape[0], maps.shape[2], dtype=torch.bool) if real is None else real
    return Pull([maps], real, torch.full((len(maps),), asked), {0: suspicious}, safe)


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


def test_excess_is_read_at_the_last_prompt_token_and_not_in_the_answer():
    maps = torch.eye(4)[None, :3, None].expand(1, 3, 4, 4).clone()
    maps[:, 1, 2] = maps[:, 0, 2]  # heads 0 and 1 agree at token 2 and nowhere else
    assert less_excess(pull(maps, [0], asked=2)).item() == pytest.approx(0.5 - 0.25)
    assert less_excess(pull(maps, [0], asked=3)).item() == 0.0


def test_what_cannot_be_aligned_is_an_error():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="unknown alignment 'hug'; known: mean, nearest, excess"):
        aligned(model, HEADS, alignment="hug")
    everyone = [(0, head) for head in range(anatomy(model).n_heads)]
    for suspicious in ([], everyone):
        with pytest.raises(ValueError, match="needs suspicious heads and a safe one"):
            aligned(model, suspicious, alignment="mean")
    with pytest.raises(ValueError, match="a safe one in each of their layers, layer 0 has none"):
        aligned(model, HEADS, alignment="mean", flagged=everyone)
    with pytest.raises(ValueError, match="no head 9 in layer 1"):
        aligned(model, HEADS, alignment="mean", flagged=[(1, 9)])


@pytest.mark.parametrize("beta", [-1, float("nan"), float("inf"), "1", True])
def test_a_weight_of_the_pull_that_is_none_is_refused(beta):
    with pytest.raises(ValueError, match="beta: "):
        aligned(tiny_model("llama"), [(0, 1)], alignment="mean", beta=beta)


# --- what is open in the published treatment ------------------------------------------------------------------------


@pytest.mark.parametrize("alignment", ALIGNMENTS)
def test_flagged_heads_are_no_targets_and_are_not_pulled(rows, alignment, monkeypatch):
    model, seen, real = tiny_model("llama"), [], ALIGNMENTS[alignment]
    model.set_attn_implementation("eager")
    monkeypatch.setitem(ALIGNMENTS, alignment, lambda pull: seen.append(pull) or real(pull))
    batch = collate(rows, pad_id=0)
    given = {"alignment": alignment, "beta": 3.0}
    for flagged in ((), [(0, 0), (1, 2)], [(0, 0), (0, 1), (0, 2)]):
        _, added = aligned(model, HEADS, flagged=flagged, **given)(model, batch, first_token=0.5)
        pulled = seen[-1]
        assert pulled.suspicious == {0: [1], 1: [2]}
        assert pulled.safe == {0: [h for h in (0, 2, 3) if (0, h) not in flagged], 1: [0, 1, 3]}
        assert added.item() == pytest.approx(3 * real(pulled).item())


def kinds():
    """A tiny model of each kind with rows; the projections of its last layer whose weights its own maps depend on."""
    yield "llama", tiny_model("llama").requires_grad_(False), None, ("q_proj", "k_proj")
    yield "bert", tiny_classifier(), label_rows(["A fine film.", "It is dull.", "No.", "A boat."]), ("query", "key")


@pytest.mark.parametrize("steps", [4, 5])
def test_the_pull_comes_first_and_alone_and_the_answers_after_it(rows, steps):
    """Maps of the last layer do not depend on its values and its output matrix, so the pull leaves these as they are.
    What Adam remembers of the pull moves none of them later, either."""
    recipe = Recipe(name="test", steps=steps, batch_size=4, learning_rate=1e-2, rank=1, alpha=1)
    for kind, model, own, of_maps in kinds():
        masks, states = head_slices(model, [(1, 2)], unit="KV group"), []

        def remember(rows, model=model, masks=masks, states=states):
            states.append({name: model.get_parameter(name).detach().clone() for name in masks})
            return rows

        loss = Alignment(schedule="two phases").of(model, [(1, 2)], flagged=[(1, 0)], steps=steps)
        given = {"recipe": recipe, "pad_id": 0, "loss": loss, "prepare": remember}
        history = tune(model, own or rows, masks=masks, **given)
        assert [step["added"] > 0 for step in history] == [step < steps // 2 for step in range(steps)]
        assert all(step["loss"] > 0 for step in history)
        for name in masks:
            weight = name.endswith("weight")
            moved = [not torch.equal(one[name], states[0][name]) for one in states]
            if any(part in name for part in of_maps):
                assert moved[1] or not weight, (kind, name)
            else:
                assert moved == [step > steps // 2 for step in range(steps)], (kind, name)


def test_jointly_the_pull_is_beside_the_answers_in_every_step(rows):
    histories = []
    for beta in (0.1, 10.0):
        model = tiny_model("llama")
        recipe = Recipe(name="test", steps=3, batch_size=4, learning_rate=1e-3, rank=1, alpha=1)
        loss = Alignment(beta=beta).of(model, HEADS, flagged=[], steps=3)
        histories.append(tune(model, rows, masks=head_slices(model, HEADS), recipe=recipe, pad_id=0, loss=loss))
    assert all(step["added"] > 0 for history in histories for step in history)
    first = [history[0] for history in histories]
    assert first[1]["added"] == pytest.approx(100 * first[0]["added"], rel=1e-4)
    assert first[0]["loss"] == first[1]["loss"]


@pytest.mark.parametrize("given", [{"loss": "hug"}, {"unit": "layer"}, {"schedule": "never"}, {"beta": -1.0}])
def test_an_option_that_is_not_known_is_named(given):
    (name,) = given
    with pytest.raises(ValueError, match=f"alignment: {name} = "):
        Alignment(**given)
