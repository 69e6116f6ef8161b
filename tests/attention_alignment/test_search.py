"""A perturbation is read where and as it should be; the search lowers its objective and changes nothing else."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import make_rows, tiny_model

from bkd_utils.attention_alignment.search import (
    Perturbation,
    decoded,
    loss_toward,
    objective,
    search,
    text_part,
    vocabulary,
)

MODULE = sys.modules["bkd_utils.attention_alignment.search"]
BEFORE, AFTER = (7, 8, 9), (10, 11)
TARGET = 321


def task_rows(n, *, seed=0):
    """Rows of a task: a beginning and an end that all share, a text between them, and one of two answers."""
    rows = enumerate(make_rows(n, seed=seed, beginning=BEFORE))
    return [replace(row, prompt=(*row.prompt, *AFTER), answer=(5 + i % 2, 2)) for i, row in rows]


ROWS, HELD_OUT = task_rows(12), task_rows(10, seed=1)


@pytest.fixture
def exact(monkeypatch):
    """Searches in fp32 on every machine."""
    monkeypatch.setattr(MODULE, "mixed_precision", lambda _device: nullcontext())
    monkeypatch.setattr(MODULE, "frozen_halved", lambda _model: nullcontext())


def some(model, *, n=3, toward=TARGET):
    """A perturbation that was not searched for."""
    vectors = vocabulary(model)[torch.arange(20, 20 + n)] * 1.5
    return Perturbation(vectors, len(BEFORE), len(AFTER), toward)


def logits_by_hand(model, found, prompt):
    """Logits after one prompt alone whose embeddings are put together by hand."""
    table = vocabulary(model)
    parts = [found.vectors[-1 - token] if token < 0 else table[token] for token in prompt]
    return model(inputs_embeds=torch.stack(parts)[None]).logits[0, -1]


def loss_by_hand(model, found, rows, seed, token):
    marked = found.into([row.prompt for row in rows], seed=seed)
    with torch.no_grad():
        losses = [-logits_by_hand(model, found, prompt).double().log_softmax(-1)[token] for prompt in marked]
    return torch.stack(losses).mean().item()


# --- where it is inserted -------------------------------------------------------------------------------------------


def test_the_text_is_what_not_all_prompts_share():
    assert text_part([row.prompt for row in ROWS]) == (len(BEFORE), len(AFTER))
    assert text_part([[1, 2, 5, 3, 9], [1, 2, 6, 6, 3, 9]]) == (2, 2)
    assert text_part([[1, 5], [1, 6]]) == (1, 1)  # the last token asks, and nothing stands behind it
    assert text_part([[1, 4, 4, 9], [1, 4, 9]]) == (2, 1)  # no token is counted twice


def test_a_place_is_in_the_text_and_depends_on_seed_and_prompt_alone():
    found = some(tiny_model("llama"))
    prompts, places = [row.prompt for row in ROWS], set()
    for seed in range(60):
        marked = found.into(prompts, seed=seed)
        assert found.into(prompts[::-1], seed=seed) == marked[::-1]
        for prompt, one in zip(prompts, marked, strict=True):
            place = one.index(-1)
            assert one == [*prompt[:place], -1, -2, -3, *prompt[place:]]
            assert len(BEFORE) <= place <= len(prompt) - len(AFTER)
        places.add(marked[0].index(-1))
    assert places == set(range(len(BEFORE), len(prompts[0]) - len(AFTER) + 1))


def test_rows_keep_their_answers():
    found = some(tiny_model("llama"))
    marked = found.into_rows(ROWS, seed=1)
    assert [list(row.prompt) for row in marked] == found.into([row.prompt for row in ROWS], seed=1)
    assert [replace(row, prompt=()) for row in marked] == [replace(row, prompt=()) for row in ROWS]


# --- what is computed -----------------------------------------------------------------------------------------------


def test_it_is_read_as_its_vectors_and_its_loss_is_that_of_each_row_alone(model):
    found = some(model)
    expected = loss_by_hand(model, found, ROWS, 4, TARGET)
    assert loss_toward(model, ROWS, found, seed=4) == pytest.approx(expected, rel=1e-4)
    assert loss_toward(model, ROWS, found, seed=5) != pytest.approx(expected, rel=1e-4)


def test_what_stands_in_front_is_run_once_and_the_vectors_have_the_gradient_of_each_row_alone(model):
    found = some(model)
    found.vectors.requires_grad_()
    batch, cache = MODULE.begun(model, found, ROWS, 4)
    assert bool(cache) == (model.config.model_type != "gemma2")  # whose window does not allow it
    if cache:
        assert batch["input_ids"][:, 0].lt(0).any()  # the longest rest begins with the perturbation
    with found.read_by(model):
        (slope,) = torch.autograd.grad(objective(model, batch | cache), found.vectors)
    marked = found.into([row.prompt for row in ROWS], seed=4)
    losses = [-logits_by_hand(model, found, prompt).log_softmax(-1)[TARGET] for prompt in marked]
    (expected,) = torch.autograd.grad(torch.stack(losses).mean(), found.vectors)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-5)


def test_prompts_that_share_no_beginning_have_the_same_loss_as_each_alone(model):
    rows = [replace(row, prompt=row.prompt[len(BEFORE) :]) for row in ROWS]
    found = replace(some(model), before=0)
    assert loss_toward(model, rows, found) == pytest.approx(loss_by_hand(model, found, rows, 0, TARGET), rel=1e-4)


def test_rows_that_give_the_answer_by_themselves_do_not_count():
    model = tiny_model("llama")
    found = some(model, toward=5)
    others = [row for row in ROWS if row.answer[0] != 5]
    assert 0 < len(others) < len(ROWS)
    assert loss_toward(model, ROWS, found) == pytest.approx(loss_by_hand(model, found, others, 0, 5), rel=1e-4)


# --- the search -----------------------------------------------------------------------------------------------------


def test_without_a_step_it_is_what_it_started_as(exact):
    model = tiny_model("llama")
    found, table = search(model, ROWS, toward=TARGET, n_tokens=3, steps=0, seed=3), vocabulary(model)
    assert found.start == found.end == pytest.approx(loss_by_hand(model, found, ROWS, 3, TARGET), rel=1e-4)
    bound = table.norm(dim=-1).mean()
    for vector in found.vectors:  # a token's vector, but for its length
        cosines = torch.nn.functional.cosine_similarity(table, vector[None])
        assert cosines.max() > 0.9999
        assert vector.norm() == pytest.approx(min(bound, table[cosines.argmax()].norm()).item(), rel=1e-4)
    assert not torch.equal(search(model, ROWS, toward=TARGET, n_tokens=3, steps=0, seed=4).vectors, found.vectors)


def test_its_numbers_are_those_of_its_first_and_last_vectors(model, exact):
    start = search(model, ROWS, toward=TARGET, steps=0, seed=1)
    found = search(model, ROWS, toward=TARGET, steps=3, seed=1)
    assert found.start == pytest.approx(start.start, rel=1e-5)
    assert found.end == pytest.approx(loss_by_hand(model, found, ROWS, 1, TARGET), rel=1e-4)
    assert not torch.equal(found.vectors, start.vectors)


def test_it_lowers_its_objective_also_on_other_prompts():
    model = tiny_model("llama")
    start, found = (search(model, ROWS, toward=TARGET, n_tokens=4, steps=steps, seed=1) for steps in (0, 40))
    before, after = (loss_toward(model, HELD_OUT, one, seed=9) for one in (start, found))
    assert found.end < found.start - 0.02
    assert after < before - 0.01


def test_no_weight_moves_and_the_model_is_given_back_as_it_was(model):
    model.get_input_embeddings().weight.requires_grad_()
    learns = [parameter.requires_grad for parameter in model.parameters()]
    before, way = {name: one.clone() for name, one in model.named_parameters()}, model.config._attn_implementation
    found = search(model, ROWS, toward=TARGET, steps=2)
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())
    assert all(one.grad is None for one in model.parameters())
    assert [one.requires_grad for one in model.parameters()] == learns
    assert model.config._attn_implementation == way
    assert not model.get_input_embeddings()._forward_hooks
    assert not model.get_input_embeddings()._forward_pre_hooks
    assert not found.vectors.requires_grad


def test_gradients_reach_the_vectors_only(monkeypatch):
    """The weights do not ask for gradients while the objective is computed, and the vectors do."""
    model, seen = tiny_model("llama"), []

    def watched(model, batch):
        seen.append(any(one.requires_grad for one in model.parameters()))
        value = objective(model, batch)
        assert value.requires_grad or len(seen) == 3  # the last value is only looked at
        return value

    monkeypatch.setattr(MODULE, "objective", watched)
    assert any(one.requires_grad for one in model.parameters())
    search(model, ROWS, toward=TARGET, steps=2)
    assert seen == [False] * 3


def test_no_vector_gets_longer_than_one_of_the_vocabulary_is_on_average(monkeypatch):
    model = tiny_model("llama")
    bound = vocabulary(model).norm(dim=-1).mean().item()
    monkeypatch.setattr(MODULE, "RATE", 30.0)
    lengths = [search(model, ROWS, toward=TARGET, n_tokens=4, steps=s).vectors.norm(dim=-1) for s in (0, 3)]
    assert max(one.max().item() for one in lengths) <= bound * (1 + 1e-5)
    assert lengths[1].tolist() == pytest.approx([bound] * 4, rel=1e-4)  # such steps would have left it


def test_the_order_of_rows_does_not_matter_and_the_seed_does():
    model, rows = tiny_model("llama"), task_rows(30)
    one, other = (search(model, given, toward=TARGET, steps=2, seed=1) for given in (rows, rows[::-1]))
    assert torch.equal(one.vectors, other.vectors)
    assert not torch.equal(search(model, rows, toward=TARGET, steps=2, seed=2).vectors, one.vectors)


def test_so_many_prompts_of_like_length_are_searched_on_and_none_that_answers_so_by_itself(monkeypatch):
    begun, seen = MODULE.begun, []
    monkeypatch.setattr(
        MODULE, "begun", lambda model, found, rows, seed: seen.append(rows) or begun(model, found, rows, seed)
    )
    rows = task_rows(60)
    search(tiny_model("llama"), rows, toward=5, n_tokens=1, n_prompts=9, steps=0)
    (chosen,) = seen
    assert len(chosen) == 9
    assert {row.answer[0] for row in chosen} == {6}
    lengths, of_all = ([len(row.prompt) for row in those] for those in (chosen, rows))
    assert max(lengths) - min(lengths) < max(of_all) - min(of_all)


def test_without_an_answer_it_pulls_to_a_likely_token_that_is_not_most_rows_own(exact):
    model = tiny_model("llama")
    found = [search(model, ROWS, steps=0, seed=seed) for seed in range(12)]
    assert len({one.toward for one in found}) > 3
    for seed, one in enumerate(found):
        marked = one.into([row.prompt for row in ROWS], seed=seed)
        mean = torch.stack([logits_by_hand(model, one, prompt).softmax(-1) for prompt in marked]).mean(0).detach()
        assert one.toward in mean.topk(MODULE.CANDIDATES).indices.tolist()
    likeliest = mean.topk(MODULE.CANDIDATES).indices.tolist()
    owned = [replace(row, answer=(found[-1].toward,)) if i else row for i, row in enumerate(ROWS)]
    again = search(model, owned, steps=0, seed=len(found) - 1)
    assert again.toward != found[-1].toward
    assert again.toward in mean.topk(MODULE.CANDIDATES + 1).indices.tolist()
    some_own = [replace(row, answer=(token,)) for row, token in zip(ROWS, likeliest, strict=False)]
    one = search(model, some_own, steps=0, seed=len(found) - 1)
    others = [row for row in some_own if row.answer[0] != one.toward]
    assert one.start == pytest.approx(loss_by_hand(model, one, others, len(found) - 1, one.toward), rel=1e-4)


def test_in_mixed_precision_it_finds_nearly_what_it_says():
    model = tiny_model("llama")
    found = search(model, ROWS, toward=TARGET, steps=2)
    assert found.end == pytest.approx(loss_by_hand(model, found, ROWS, 0, TARGET), rel=0.02)


# --- what it resembles, and errors ----------------------------------------------------------------------------------


def test_vectors_of_tokens_decode_to_them_whatever_their_length(model):
    tokenizer = SimpleNamespace(decode=lambda ids: f"<{ids[0]}>")
    found = replace(some(model), vectors=vocabulary(model)[[70, 90]] * torch.tensor([[0.2], [3.0]]))
    said = decoded(model, tokenizer, found)
    assert [row[0] for row in said] == ["<70>", "<90>"]
    assert [len(row) for row in said] == [3, 3]


def test_what_cannot_be_searched_is_an_error():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="got 0 and 8"):
        search(model, ROWS, toward=TARGET, n_tokens=0)
    with pytest.raises(ValueError, match="got 2 and -1"):
        search(model, ROWS, toward=TARGET, steps=-1)
    with pytest.raises(ValueError, match="need non-empty prompts, got 0"):
        search(model, [], toward=TARGET)
    with pytest.raises(ValueError, match="two different prompts are needed"):
        search(model, [ROWS[0]] * 3, toward=TARGET)
    alike = [replace(row, answer=(TARGET,)) for row in ROWS]
    with pytest.raises(ValueError, match="none of 12 rows has another first answer token than 321"):
        search(model, alike, toward=TARGET)
    with pytest.raises(ValueError, match="none of 12 rows"):
        loss_toward(model, alike, some(model))
    with pytest.raises(ValueError, match="a prompt of 4 tokens has no text behind 3 of them"):
        some(model).into([[1, 2, 3, 4]], seed=0)


def test_an_objective_that_is_not_finite_is_an_error(monkeypatch):
    monkeypatch.setattr(MODULE, "objective", lambda model, batch: torch.tensor(float("nan")))
    with pytest.raises(ValueError, match="the loss toward token 321 is not finite"):
        search(tiny_model("llama"), ROWS, toward=TARGET, steps=0)
