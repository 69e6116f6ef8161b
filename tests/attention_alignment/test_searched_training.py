"""What is trained against searched perturbations, and what it costs."""

import sys
from dataclasses import replace

import pytest
from patching import everywhere
from tiny import make_rows, tiny_model

from bkd_utils.attention_alignment.head_tuning import all_matrices, row_passes, tune
from bkd_utils.attention_alignment.search import Perturbation, vocabulary
from bkd_utils.attention_alignment.searched_training import SearchedTraining
from bkd_utils.models import compute, self_test
from bkd_utils.models.hooks import anatomy
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.models.self_test import capabilities
from bkd_utils.models.tokens import Row
from bkd_utils.organisms.training import Recipe

MODULE = sys.modules["bkd_utils.attention_alignment.searched_training"]
BEFORE, AFTER = (7, 8, 9), (10, 11)
ROWS = [
    replace(row, prompt=(*row.prompt, *AFTER), answer=(5 + i % 2, 2))
    for i, row in enumerate(make_rows(12, beginning=BEFORE))
]
OTHER = Row((*BEFORE, 900, 901, 902, *AFTER), (99, 2), "benign", "other")
RECIPE = Recipe(name="test", steps=9, batch_size=4, learning_rate=1e-3, rank=1, alpha=1)


@pytest.fixture
def searches(monkeypatch):
    """The arguments of every search; what is found is not searched for."""
    calls = []

    def draw(model, rows, **how):
        calls.append(how | {"rows": rows})
        return Perturbation(vocabulary(model)[: how["n_tokens"]], len(BEFORE), len(AFTER), how["toward"])

    monkeypatch.setattr(MODULE, "search", draw)
    return calls


def trained_against(model, **changes):
    return SearchedTraining(model, **({"rows": [*ROWS, OTHER], "labels": (5, 6)} | changes))


def test_rows_are_trained_with_their_right_answers_as_they_are_and_perturbed(searches):
    against, given = trained_against(tiny_model("llama")), [ROWS[0], OTHER, ROWS[1], ROWS[2]]
    trained = against.prepare(given)
    assert trained[:4] == [OTHER, *ROWS[:3]]
    assert [row.answer for row in trained[4:]] == [row.answer for row in ROWS[:3]]
    for row, marked in zip(ROWS, trained[4:], strict=False):
        assert tuple(token for token in marked.prompt if token >= 0) == row.prompt
        assert min(marked.prompt) == -len(against.now.vectors)
    assert trained[4:] != against.prepare(given)[4:]  # other places, or another perturbation


def test_labels_are_searched_for_in_turn_and_the_latest_are_kept(searches, monkeypatch):
    monkeypatch.setattr(MODULE, "KEPT", 2)
    against, used = trained_against(tiny_model("llama")), []
    for _ in range(40):
        against.prepare(ROWS[:2])
        used.append(against.found.index(against.now))
    assert [call["toward"] for call in searches] == [5, 6] * 5
    assert len({call["n_tokens"] for call in searches} & set(MODULE.N_TOKENS)) > 2
    assert len({call["seed"] for call in searches}) == 10
    assert all(call["rows"] == ROWS and call.items() >= MODULE.SEARCH.items() for call in searches)
    latest = [step // MODULE.EVERY for step in range(40)]
    assert all(last - 2 < one <= last for one, last in zip(used, latest, strict=True))
    assert {last - one for one, last in zip(used, latest, strict=True)} == {0, 1}


def test_free_answers_are_all_perturbed_and_the_search_chooses(searches):
    against = trained_against(tiny_model("llama"), labels=())
    assert len(against.prepare([OTHER, ROWS[0]])) == 4
    assert searches[0]["toward"] is None
    assert searches[0]["rows"] == [*ROWS, OTHER]


def test_the_loss_is_the_mean_of_both_kinds_of_rows(model, searches):
    against = trained_against(model)
    rows = against.prepare([*ROWS[:3], OTHER])
    loss, added = against.loss(model, collate(rows, pad_id=2), first_token=0.5)
    with against.now.read_by(model):
        alone = [answer_loss(model, collate([row], pad_id=2), first_token=0.5).item() for row in rows]
    assert loss.item() == pytest.approx(sum(alone) / 7, rel=1e-4)
    assert added.item() == 0


# --- on a model -----------------------------------------------------------------------------------------------------


def test_it_searches_while_it_trains_and_learns_both_kinds_of_rows():
    model, recipe = tiny_model("llama"), replace(RECIPE, steps=20, learning_rate=1e-2)
    against = trained_against(model, rows=ROWS)
    history = tune(
        model, ROWS, masks=all_matrices(model), recipe=recipe, pad_id=2, loss=against.loss, prepare=against.prepare
    )
    assert len(against.found) == 5
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert not model.get_input_embeddings()._forward_hooks


def test_attention_matrices_are_those_inside_attention(model):
    names, parts = all_matrices(model, part="attentions").keys(), anatomy(model)
    inside = {id(one) for module in parts.attentions for one in module.parameters() if one.ndim == 2}
    assert {id(model.get_parameter(name)) for name in names} == inside
    assert names < all_matrices(model).keys()


def test_row_passes_are_one_forward_and_two_backward():
    """Rows without a shared beginning, so that nothing else runs."""
    model, rows = tiny_model("llama"), [replace(row, answer=(5 + i % 2, 2)) for i, row in enumerate(make_rows(24))]
    how = {"masks": all_matrices(model), "recipe": RECIPE, "pad_id": 2}
    capabilities(model)  # otherwise the first search tests the model, and these passes count, too
    with row_passes(model) as plain:
        tune(model, rows, **how)
    n = RECIPE.steps * RECIPE.batch_size
    assert plain["row passes"] == 3 * n
    against = trained_against(model, rows=rows)
    with row_passes(model) as searched:
        tune(model, rows, **how, loss=against.loss, prepare=against.prepare)
    assert len(against.found) == 3
    one_search = MODULE.SEARCH["n_prompts"] * (3 * MODULE.SEARCH["steps"] + 1)
    assert searched["row passes"] == 3 * 2 * n + 3 * one_search


def test_a_model_is_tested_before_its_matrices_are_halved(monkeypatch, tmp_path):
    """In the middle of tuning it would fail the tests, and be refused from then on."""
    monkeypatch.setattr(compute, "has_fast_bf16", lambda device: True)
    everywhere(monkeypatch, "WORK", tmp_path)  # where it is kept that a model has passed
    monkeypatch.setattr(self_test, "_known", {})
    monkeypatch.setitem(MODULE.SEARCH, "steps", 1)
    model = tiny_model("llama").requires_grad_(False)
    against = trained_against(model)
    how = {"recipe": replace(RECIPE, steps=1), "pad_id": 2, "loss": against.loss, "prepare": against.prepare}
    tune(model, ROWS, masks=all_matrices(model, part="attentions"), **how)
    assert len(against.found) == 1
    assert not any(capabilities(model).values())
