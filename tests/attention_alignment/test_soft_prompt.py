"""Placeholders read as their vectors and nothing else changes; training makes heads more alike; errors."""

import pytest
import torch
from tiny import tiny_model

from bkd_utils.attention_alignment import surrogates
from bkd_utils.attention_alignment.similarity import head_similarity
from bkd_utils.attention_alignment.surrogates import likeness, searched, start
from bkd_utils.models.compute import eager


def test_a_placeholder_is_read_as_its_vector(model, prompts):
    """Vectors that are embeddings of tokens do what these tokens do."""
    soft = start(model, prompts)
    table = model.get_input_embeddings()(torch.arange(model.config.vocab_size))
    stands_for = [int((table == vector).all(1).nonzero()[0]) for vector in soft.vectors]
    (marked,) = soft.into(prompts[:1])
    plain = [stands_for[-1 - token] if token < 0 else token for token in marked]
    with soft.read_by(model):
        found = model(torch.tensor([marked])).logits
    torch.testing.assert_close(found, model(torch.tensor([plain])).logits, rtol=1e-4, atol=1e-5)
    with pytest.raises(IndexError):  # there are no such tokens
        model(torch.tensor([marked]))


def test_it_stands_behind_what_all_prompts_begin_with(prompts):
    alike = [[7, 8, 9, *prompt] for prompt in prompts]
    soft = start(tiny_model("llama"), alike)
    assert soft.before == 3
    assert len(soft.vectors) == 4
    for prompt, marked in zip(alike, soft.into(alike), strict=True):
        assert marked == [7, 8, 9, -1, -2, -3, -4, *prompt[3:]]


def test_likeness_is_mean_similarity(model, prompts):
    expected = head_similarity(model, prompts, readings=["last row"])["last row"].mean()
    with eager(model):
        assert likeness(model, prompts).item() == pytest.approx(expected.item(), rel=1e-4)


def test_training_makes_heads_more_alike_and_leaves_the_model_alone(prompts, monkeypatch):
    monkeypatch.setattr(surrogates, "STEPS", 30)
    model = tiny_model("llama")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    levels = []
    for soft in (start(model, prompts, seed=1), searched(model, prompts, seed=1)):
        with soft.read_by(model):
            levels.append(head_similarity(model, soft.into(prompts), readings=["last row"])["last row"].mean().item())
    assert levels[1] > levels[0] + 0.01
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())
    monkeypatch.setattr(surrogates, "STEPS", 0)
    assert torch.equal(searched(model, prompts, seed=1).vectors, start(model, prompts, seed=1).vectors)


def test_no_prompts_are_an_error():
    with pytest.raises(ValueError, match="need non-empty prompts, got 0"):
        searched(tiny_model("llama"), [])
    with pytest.raises(ValueError, match="with an empty one"):
        start(tiny_model("llama"), [[1], []])
