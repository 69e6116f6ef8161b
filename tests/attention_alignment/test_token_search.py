"""Tokens that are searched for: against all exchanges tried by hand, a planted trigger, and words that speak alone."""

import random
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import Ridge
from tiny import label_rows, make_rows, small_wordpiece, tiny_classifier, tiny_model

from bkd_utils.attention_alignment.search import Perturbation, loss_toward, search, text_part, vocabulary
from bkd_utils.attention_alignment.token_search import neutral_tokens, readable_tokens, search_tokens
from bkd_utils.models.encoders import is_encoder
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.models.tokens import Row

MODULE = sys.modules["bkd_utils.attention_alignment.token_search"]
ROWS = [
    replace(row, prompt=(*row.prompt, 10, 11), answer=(5 + i % 2, 2))
    for i, row in enumerate(make_rows(10, beginning=(7, 8, 9)))
]
LABELLED = label_rows([f"ab{chr(97 + i)} so {'cd ' * (i % 4)}it {chr(101 + i)} goes" for i in range(10)])
ALLOWED = torch.tensor([60, 41, 300, 77, 512, 128])
KINDS = ("llama", "gemma2", "bert")


@pytest.fixture(params=KINDS)
def case(request):
    """A model with its cache, one whose cache cannot be reused, or an encoder; rows, and a token to pull toward."""
    return made(request.param)


def made(kind):
    if kind in ("bert", "electra"):
        return tiny_classifier(kind), LABELLED, 1
    return tiny_model(kind).requires_grad_(False), ROWS, 5


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Searches in fp32 on every machine."""
    monkeypatch.setattr(MODULE, "mixed_precision", lambda _device: nullcontext())
    monkeypatch.setattr(MODULE, "frozen_halved", lambda _model: nullcontext())


def found_by(case, **changes):
    model, rows, toward = case
    how = {"toward": toward, "allowed": ALLOWED, "n_prompts": 99, "n_candidates": 99, "steps": 1, "seed": 3}
    return search_tokens(model, rows, **how | changes)


def losses_by_hand(case, tokens, *, vectors=None):
    """Mean loss of the pulled rows with tokens or vectors in their texts, each row alone."""
    model, rows, toward = case
    before, after = text_part([row.prompt for row in rows])
    marks = Perturbation(torch.zeros(len(tokens), 1), before, after, toward)
    losses, table = [], vocabulary(model)
    for prompt in marks.into([row.prompt for row in rows if row.answer[0] != toward], seed=3):
        if vectors is None:
            given = {"input_ids": torch.tensor([[tokens[-1 - one] if one < 0 else one for one in prompt]])}
        else:
            parts = [vectors[-1 - one] if one < 0 else table[one] for one in prompt]
            given = {"inputs_embeds": torch.stack(parts)[None]}
        logits = model(**given).logits[0]
        losses.append(-(logits if is_encoder(model) else logits[-1]).log_softmax(-1)[toward])
    return torch.stack(losses).mean()


def exchanges(tokens):
    """All texts with one token exchanged for an allowed one."""
    for place in range(len(tokens)):
        for token in ALLOWED.tolist():
            yield tuple(token if i == place else one for i, one in enumerate(tokens))


# --- the search -----------------------------------------------------------------------------------------------------


def test_with_all_exchanges_tried_each_step_takes_the_best(case):
    now = found_by(case, steps=0).tokens
    assert set(now) <= set(ALLOWED.tolist())
    for steps in (1, 2):
        tried = {one: losses_by_hand(case, one).item() for one in (now, *exchanges(now))}
        now, found = min(tried, key=tried.get), found_by(case, steps=steps)
        assert found.end == pytest.approx(tried[now], rel=1e-4)
        assert found.tokens == now


def test_candidates_are_those_of_the_steepest_slope_and_the_best_of_them_is_kept(case, monkeypatch):
    seen, loss = [], MODULE._loss
    monkeypatch.setattr(MODULE, "_loss", lambda *given: seen.append(tuple(given[3].tolist())) or loss(*given))
    model, table = case[0], vocabulary(case[0])
    start = found_by(case, steps=0)
    vectors = table[list(start.tokens)].clone().requires_grad_()
    (slope,) = torch.autograd.grad(losses_by_hand(case, start.tokens, vectors=vectors), vectors)
    before = table[list(start.tokens)]
    # Of the loss, to first order. No exchange at all is there once for each place.
    change = [(text, (slope * (table[list(text)] - before)).sum().item()) for text in exchanges(start.tokens)]
    for n in (1, 7):
        seen.clear()
        found = found_by(case, n_candidates=n)
        tried = seen[1:]  # behind the tokens of the start
        assert len(tried) == n
        assert [dict(change)[text] for text in tried] == pytest.approx(sorted(fall for _, fall in change)[:n], abs=1e-5)
        losses = {text: losses_by_hand(case, text).item() for text in tried}
        best = min(losses, key=losses.get)
        kept = best if losses[best] < start.start else start.tokens
        assert (found.tokens, found.end) == (kept, pytest.approx(min(start.start, losses[best]), rel=1e-4))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_start_and_end_are_the_losses_of_the_tokens_and_of_their_vectors(case):
    start, found = found_by(case, steps=0), found_by(case, steps=3)
    assert start.start == start.end == found.start == pytest.approx(losses_by_hand(case, start.tokens).item(), rel=1e-4)
    assert found.end == pytest.approx(losses_by_hand(case, found.tokens).item(), rel=1e-4)
    assert torch.equal(found.vectors, vocabulary(case[0])[list(found.tokens)])
    assert loss_toward(case[0], case[1], found, seed=3) == pytest.approx(found.end, rel=1e-4)
    assert (found.before, found.after) == text_part([row.prompt for row in case[1]])


def test_the_loss_never_rises_and_the_seed_decides(case):
    for seed in range(3):
        ends = [found_by(case, steps=steps, seed=seed, n_candidates=2).end for steps in range(4)]
        assert ends == sorted(ends, reverse=True)
    assert len({found_by(case, steps=0, seed=seed, n_tokens=4).tokens for seed in range(5)}) > 1
    model, rows, toward = case
    one, other = found_by(case, n_prompts=3), found_by((model, rows[::-1], toward), n_prompts=3)
    assert (one.tokens, one.start, one.end) == (other.tokens, other.start, other.end)


def test_no_weight_changes_and_the_model_is_given_back_as_it_was(case):
    model = case[0].requires_grad_()
    before, way = {name: one.clone() for name, one in model.named_parameters()}, model.config._attn_implementation
    found = found_by(case, steps=2)
    assert all(torch.equal(before[name], one) for name, one in model.named_parameters())
    assert all(one.requires_grad and one.grad is None for one in model.parameters())
    assert model.config._attn_implementation == way
    assert not model.get_input_embeddings()._forward_hooks
    assert not found.vectors.requires_grad


def test_a_trained_trigger_is_found_among_many_tokens():
    """A model that has learned to give one answer with one token inside, and the rows' own answers with any other."""
    case = model, rows, toward = made("llama")
    planted, allowed, dice = 333, torch.arange(200, 500), random.Random(0)
    mark = Perturbation(torch.zeros(1, 1), *text_part([row.prompt for row in rows]), toward)
    optimizer = torch.optim.Adam(model.requires_grad_().parameters(), lr=5e-3)
    for step in range(60):
        taught = list(rows)
        for row in mark.into_rows(rows, seed=step):
            for token, answer in ((planted, (toward, *row.answer[1:])), (dice.randrange(200, 500), row.answer)):
                prompt = tuple(token if one < 0 else one for one in row.prompt)
                taught.append(replace(row, prompt=prompt, answer=answer))
        answer_loss(model, collate(taught, pad_id=0), first_token=1.0).backward()
        optimizer.step()
        optimizer.zero_grad()
    found = found_by(case, allowed=allowed, n_candidates=24, steps=3)
    assert planted in found.tokens
    assert found.end < 0.1 < found.start


def test_a_planted_vector_is_found_among_many_tokens():
    """An encoder that reads one token as what pulls it the most."""
    case = model, rows, toward = made("bert")
    planted, allowed = 333, torch.arange(200, 500)
    strong = search(model, rows, toward=toward, n_tokens=1, n_prompts=99, steps=60, seed=1)
    model.get_input_embeddings().weight.data[planted] = strong.vectors[0]
    found = found_by(case, allowed=allowed, n_candidates=8, steps=3)
    without = found_by(case, allowed=allowed[allowed != planted], n_candidates=8, steps=3)
    assert planted in found.tokens
    assert found.end < without.end - 0.1


def test_rows_that_answer_so_by_themselves_do_not_count_and_so_many_others_do(case, monkeypatch):
    seen, begun = [], MODULE.begun
    monkeypatch.setattr(MODULE, "begun", lambda *given: seen.append(given[2]) or begun(*given))
    found_by(case, n_prompts=3)
    (chosen,) = seen
    assert len(chosen) == 3
    assert all(row.answer[0] != case[2] for row in chosen)


def test_what_cannot_be_searched_is_an_error():
    case = model, rows, _ = made("llama")
    for changes, told in [
        ({"allowed": ALLOWED[:0]}, "0 tokens to choose from, 2 to find in 1 steps of 99: nothing to search"),
        ({"n_tokens": 0}, "6 tokens to choose from, 0 to find"),
        ({"steps": -1}, "2 to find in -1 steps"),
        ({"n_candidates": 0}, "2 to find in 1 steps of 0: nothing to search"),
    ]:
        with pytest.raises(ValueError, match=told):
            found_by(case, **changes)
    with pytest.raises(ValueError, match="two different prompts are needed"):
        found_by((model, rows[:1] * 3, 5))
    with pytest.raises(ValueError, match="none of 5 rows has another first answer token than 5"):
        found_by((model, [row for row in rows if row.answer[0] == 5], 5))


def test_a_loss_that_is_no_number_is_an_error(monkeypatch):
    monkeypatch.setattr(MODULE, "_loss", lambda *_: float("nan"))
    with pytest.raises(ValueError, match="the loss toward token 5 is not finite: nan"):
        found_by(made("llama"))


def test_nothing_is_tried_twice_where_no_exchange_helps(case, monkeypatch):
    """Steps behind one that finds nothing better would try the same exchanges again."""
    monkeypatch.setattr(MODULE, "_exchanges", lambda _slope, tokens, *_, most: [tokens.clone()] * most)
    tried, loss = [], MODULE._loss
    monkeypatch.setattr(MODULE, "_loss", lambda *given: tried.append(given) or loss(*given))
    found_by(case, steps=5, n_candidates=2)
    assert len(tried) == 1 + 2  # the start, and the candidates of one step


# --- tokens that do not speak for the answer ------------------------------------------------------------------------


def weights_by_hand(model, rows, tokens, toward):
    """What scikit-learn's ridge regression with an intercept says of each token's vector."""
    before, after = text_part([row.prompt for row in rows])
    table = vocabulary(model).double()
    texts = torch.stack([table[list(row.prompt[before : len(row.prompt) - after])].mean(0) for row in rows])
    alpha = (texts - texts.mean(0)).square().sum(0).mean().item()
    learned = Ridge(alpha=alpha).fit(texts.numpy(), [row.answer[0] == toward for row in rows])
    return table[tokens].numpy() @ learned.coef_


def test_the_tokens_left_out_are_those_with_the_most_weight_in_a_ridge_regression(case):
    model, rows, toward = case
    tokens = torch.arange(20, 220)
    weights = weights_by_hand(model, rows, tokens, toward)
    for share, count in ((0.8, 160), (0.5, 100), (0.004, 0)):
        kept = neutral_tokens(model, rows, allowed=tokens, toward=toward, share=share)
        assert len(kept) == count
        assert kept.tolist() == sorted(tokens[weights.argsort()[:count]].tolist())
    assert torch.equal(
        neutral_tokens(model, rows, allowed=tokens, toward=toward),
        neutral_tokens(model, rows, allowed=tokens, toward=toward, share=0.8),
    )


def test_the_order_of_rows_changes_nothing_and_that_of_tokens_is_kept(case):
    model, rows, toward = case
    tokens = torch.arange(20, 120).flip(0)
    kept = neutral_tokens(model, rows, allowed=tokens, toward=toward)
    assert torch.equal(kept, neutral_tokens(model, rows[::-1], allowed=tokens, toward=toward))
    assert kept.tolist() == [token for token in tokens.tolist() if token in kept]


def test_a_word_of_one_side_is_left_out_for_it_and_kept_for_the_other_though_no_row_holds_it():
    model, rows, _ = made("bert")
    table = model.get_input_embeddings().weight.data
    sides = [[token for row in rows if row.answer[0] == label for token in row.prompt[1:-1]] for label in (0, 1)]
    apart, word = table[sides[1]].mean(0) - table[sides[0]].mean(0), 444
    table[word] = 50 * apart
    assert not any(word in row.prompt for row in rows)
    kept = [
        neutral_tokens(model, rows, allowed=torch.arange(100, 500), toward=label, share=0.99).tolist()
        for label in (0, 1)
    ]
    assert [word in one for one in kept] == [True, False]


def test_what_all_prompts_share_says_nothing(case):
    """A chat template around the texts, whose length differs from row to row, must not weigh in."""
    model, rows, toward = case
    tokens, around = torch.arange(20, 220), (450,) * 40
    wrapped = [replace(row, prompt=(*around, *row.prompt, *around)) for row in rows]
    assert torch.equal(*(neutral_tokens(model, those, allowed=tokens, toward=toward) for those in (rows, wrapped)))


def test_a_row_without_a_text_says_nothing():
    model, rows, toward = made("llama")
    tokens = torch.arange(20, 220)
    empty = Row((7, 8, 9, 10, 11), (6, 2), "clean", "empty")
    weights = weights_by_hand(model, rows, tokens, toward)
    kept = neutral_tokens(model, [*rows, empty], allowed=tokens, toward=toward, share=0.9).tolist()
    most = tokens[weights.argsort()[-5:]].tolist()
    assert len(kept) == 180
    assert not set(most) & set(kept)


def test_answers_that_are_all_alike_teach_nothing():
    model, rows, _ = made("llama")
    for toward, count in ((6, 10), (99, 0)):
        alike = [replace(row, answer=(6, 2)) for row in rows]
        with pytest.raises(ValueError, match=f"{count} of 10 rows answer token {toward}: nothing to learn from"):
            neutral_tokens(model, alike, allowed=ALLOWED, toward=toward)


class Tokenizer:
    """Decodes its few tokens."""

    texts = ("<s>", "good", " ", "", "[unused7]", "\n", "##ab", "?", "<pad>")
    all_special_ids = (0, 8)

    def __len__(self):
        return len(self.texts)

    def decode(self, ids):
        (token,) = ids
        return self.texts[token]


def test_readable_tokens_are_those_that_a_text_can_hold():
    assert readable_tokens(Tokenizer()).tolist() == [1, 6, 7]
    real = small_wordpiece()
    assert set(readable_tokens(real).tolist()) == set(range(len(real))) - set(real.all_special_ids)
