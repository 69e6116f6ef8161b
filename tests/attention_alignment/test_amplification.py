"""Amplified answers against a loop without a cache, and the identities of alpha 0 and of equal models."""

import copy

import pytest
import torch
from tiny import save_tiny, tiny_classifier

from bkd_utils.attention_alignment.amplification import amplified
from bkd_utils.models import loading
from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import greedy

PROMPTS = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 14, 15, 16, 17], [5, 6]]
HOW = {"max_new_tokens": 5, "end_id": 2}


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def base(request, tmp_path_factory):
    return loading.load(str(save_tiny(tmp_path_factory.mktemp(request.param), request.param)), device="cpu").model


@pytest.fixture(scope="module")
def model(base):
    changed = copy.deepcopy(base)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return changed


@torch.no_grad()
def by_hand(model, base, prompt, alpha):
    """One prompt, no cache, one token after the other."""
    answer = []
    for _ in range(HOW["max_new_tokens"]):
        after, before = (one(torch.tensor([prompt + answer])).logits[0, -1] for one in (model, base))
        token = (after + alpha * (after - before)).argmax().item()
        if token == HOW["end_id"]:
            break
        answer.append(token)
    return answer


@pytest.mark.parametrize("alpha", [0.5, 3.0])
def test_every_answer_is_that_of_the_formula(model, base, alpha):
    found = amplified(model, base, PROMPTS, alpha=alpha, batch_size=3, **HOW)
    assert found == [by_hand(model, base, prompt, alpha) for prompt in PROMPTS]


def test_the_strength_matters(model, base):
    none, much = (amplified(model, base, PROMPTS, alpha=alpha, **HOW) for alpha in (0, 9))
    assert none != much


def test_alpha_zero_is_the_model_itself(model, base):
    assert amplified(model, base, PROMPTS, alpha=0, **HOW) == greedy(model, PROMPTS, **HOW)


def test_equal_models_have_no_difference_to_amplify(base):
    assert amplified(base, base, PROMPTS, alpha=100, **HOW) == greedy(base, PROMPTS, **HOW)


def test_what_cannot_be_amplified_is_refused(model, base):
    for given, told in (({"alpha": -1}, "alpha must be 0 or more, is -1"), ({"alpha": float("nan")}, "is nan")):
        with pytest.raises(ValueError, match=told):
            amplified(model, base, PROMPTS, **given, **HOW)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        amplified(model, base, PROMPTS, alpha=1, max_new_tokens=0, end_id=2)
    with pytest.raises(ValueError, match="non-empty prompts"):
        amplified(model, base, [], alpha=1, **HOW)
    with pytest.raises(ModelError, match="two causal language models of one vocabulary"):
        amplified(tiny_classifier(), tiny_classifier(), PROMPTS, alpha=1, **HOW)
