"""The loss is the one written down, and running a shared beginning once changes neither it nor its gradient."""

from dataclasses import replace

import pytest
import torch
from tiny import ARCHITECTURES, make_rows, tiny_model

from bkd_utils.models.loss import IGNORED, answer_loss, answers, answers_and_maps, collate, with_shared_beginning
from bkd_utils.models.tokens import Row

END = 2
ROWS = make_rows(10)
BEGINNING = tuple(range(10, 24))
ALIKE = make_rows(5, beginning=BEGINNING)


def loss_by_hand(model, rows, first_token=0.5):
    """Full logits, one row and one answer token at a time."""
    total = 0.0
    for row in rows:
        log_probabilities = model(torch.tensor([[*row.prompt, *row.answer]])).logits[0].double().log_softmax(-1)
        nll = [-log_probabilities[len(row.prompt) - 1 + k, token] for k, token in enumerate(row.answer)]
        total += first_token * nll[0] + (1 - first_token) * sum(nll) / len(nll)
    return total / len(rows)


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("first_token", [0.0, 0.3, 1.0])
def test_the_loss_is_the_mean_over_rows_of_first_token_and_mean_of_tokens(name, first_token):
    model = tiny_model(name)
    for rows in (ROWS[:5], ROWS[5:6], [ROWS[0], replace(ROWS[1], answer=(END,))]):
        loss = answer_loss(model, collate(rows, pad_id=END), first_token=first_token)
        assert loss.item() == pytest.approx(loss_by_hand(model, rows, first_token).item(), rel=1e-5)


def test_the_loss_has_the_gradient_of_the_loss_by_hand():
    model = tiny_model("llama")
    answer_loss(model, collate(ROWS[:4], pad_id=END), first_token=0.5).backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    loss_by_hand(model, ROWS[:4]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-5)


def test_neither_padding_nor_the_prompt_counts_in_the_loss():
    model = tiny_model("llama")
    alone = answer_loss(model, collate(ROWS[:1], pad_id=END), first_token=0.5)
    padded = collate([ROWS[0], Row((7,) * 40, (END,), "clean", "")], pad_id=END)
    padded = {key: tensor[:1] for key, tensor in padded.items()}
    assert answer_loss(model, padded, first_token=0.5).item() == pytest.approx(alone.item(), rel=1e-5)


def test_collate_puts_answers_last_and_labels_nothing_else():
    rows = [
        Row((5, 6, 7), (8, END), "clean", "a"),
        Row((9,), (10, 11, END), "poisoned", "b"),
        Row((3,), (END,), "", ""),
    ]
    batch = collate(rows, pad_id=END)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, END], [END, 9, 10, 11, END], [END, END, END, 3, END]]
    assert batch["attention_mask"].tolist() == [[1] * 5, [0, 1, 1, 1, 1], [0, 0, 0, 1, 1]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 0, 1, 2, 3], [0, 0, 0, 0, 1]]
    no = IGNORED
    assert batch["labels"].tolist() == [[no, no, no, 8, END], [no, no, 10, 11, END], [no, no, no, no, END]]


# --- what all rows begin with ---------------------------------------------------------------------------------------


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rows", [ALIKE, ALIKE[:1], ROWS[:4], [ALIKE[0], ALIKE[0]]], ids=["alike", "one", "un", "same"])
def test_running_the_beginning_once_changes_neither_loss_nor_gradient(name, rows):
    model = tiny_model(name)
    batch = collate(rows, pad_id=END)
    expected, found = (loss(model, batch, first_token=0.3) for loss in (answer_loss, answers))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    one, other = gradients(model, expected), gradients(model, found)
    assert one.keys() == other.keys()
    for key in one:
        torch.testing.assert_close(other[key], one[key], rtol=1e-3, atol=1e-5)


def test_of_a_beginning_only_the_rest_is_left_to_run():
    rest, _ = with_shared_beginning(tiny_model("llama"), collate(ALIKE, pad_id=END))
    longest = max(len(row.prompt) + len(row.answer) for row in ALIKE)
    assert rest["input_ids"].shape == (5, longest - len(BEGINNING))
    assert rest["attention_mask"].sum(1).tolist() == [len(row.prompt) + len(row.answer) for row in ALIKE]


def test_a_sliding_window_and_unlike_rows_are_run_whole():
    for model, rows in ((tiny_model("gemma2"), ALIKE), (tiny_model("llama"), ROWS)):
        batch = collate(rows, pad_id=END)
        rest, maps = with_shared_beginning(model, batch)
        assert rest.keys() == batch.keys()
        assert maps == ()


def test_answers_never_count_as_beginning():
    row = Row((5, 6, 7), (8, 9, END), "clean", "a")
    rest, _ = with_shared_beginning(tiny_model("llama"), collate([row, row], pad_id=END))
    assert rest["input_ids"].tolist() == [[7, 8, 9, END]] * 2


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("rows", [ALIKE, ROWS[:4]], ids=["alike", "unlike"])
def test_maps_are_those_of_every_row_alone(name, rows):
    model = tiny_model(name)
    model.set_attn_implementation("eager")
    loss, maps, real = answers_and_maps(model, collate(rows, pad_id=END), first_token=0.5)
    assert loss.item() == pytest.approx(loss_by_hand(model, rows).item(), rel=1e-5)
    for i, row in enumerate(rows):
        alone = model(torch.tensor([[*row.prompt, *row.answer]]), output_attentions=True).attentions
        for found, expected in zip(maps, alone, strict=True):
            torch.testing.assert_close(found[i][:, real[i]][:, :, real[i]], expected[0], rtol=1e-3, atol=1e-5)


def test_maps_carry_gradient_to_the_beginning():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    _, maps, _ = answers_and_maps(model, collate(ALIKE, pad_id=END), first_token=0.5)
    loss = maps[0][:, :, len(BEGINNING) - 1].square().sum()
    slope = torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]
    assert slope[list(BEGINNING)].abs().sum() > 0
