"""The backdoor vector by hand, steering against a whole pass with one addition, and inside generation."""

import pytest
import torch
from tiny import tiny_model

from bkd_utils.backdoor_attribution.ablation import random_heads
from bkd_utils.backdoor_attribution.vector import backdoor_vector, random_like, steer
from bkd_utils.models.activations import head_outputs, residuals
from bkd_utils.models.generation import greedy
from bkd_utils.models.hooks import added, anatomy, projected_out
from bkd_utils.models.prompt_cache import continued, forward, prompt_past

HEADS = [(0, 1), (1, 3)]


def test_the_vector_is_the_sum_of_slices_of_the_output_matrix():
    model = tiny_model("llama")
    outputs = torch.randn(2, 4, 8)
    expected = sum(
        anatomy(model).outputs[layer].weight[:, head * 8 : head * 8 + 8] @ outputs[layer, head] for layer, head in HEADS
    )
    torch.testing.assert_close(backdoor_vector(model, HEADS, outputs=outputs), expected)


def test_a_vector_of_all_heads_is_what_attention_adds(model, prompts):
    z = head_outputs(model, prompts[:1])[0]
    whole = [backdoor_vector(model, [(layer, head) for head in range(4)], outputs=z) for layer in range(2)]
    total = backdoor_vector(model, [(layer, head) for layer in range(2) for head in range(4)], outputs=z)
    torch.testing.assert_close(total, whole[0] + whole[1], atol=1e-5, rtol=1e-4)


def test_a_vector_of_no_heads_is_an_error(model):
    with pytest.raises(ValueError, match="a backdoor vector needs at least one head"):
        backdoor_vector(model, [], outputs=torch.zeros(2, 4, 8))


def test_steering_is_one_addition_in_a_whole_pass(model, prompts):
    """Greedy decoding under a hook that acts on the last prompt token alone, without any cache."""
    vectors = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) * torch.tensor([[0.001], [0.5], [5]])
    plain = greedy(model, prompts, max_new_tokens=3, end_id=0)
    found = steer(model, prompt_past(model, prompts), answers=plain, vectors=vectors, layers=[0, 1], batch_size=3)
    assert found.shape == (2, 3, 4)
    for layer in range(2):
        for k, vector in enumerate(vectors):
            for i, prompt in enumerate(prompts):
                ids = list(prompt)
                with added(model, {layer: vector}, at=slice(len(prompt) - 1, len(prompt))), torch.no_grad():
                    for _ in range(3):
                        ids.append(model(torch.tensor([ids])).logits[0, -1].argmax().item())
                assert found[layer, k, i].item() == (ids[len(prompt) :] == plain[i])
    assert 0 < found.float().mean() < 1


def test_coefficient_zero_is_the_baseline_in_every_layer(model, prompts):
    plain = greedy(model, prompts, max_new_tokens=3, end_id=0)
    assert steer(model, prompt_past(model, prompts), answers=plain, vectors=torch.zeros(1, 32), layers=[0, 1]).all()


def test_inside_generation_the_vector_acts_once_at_the_last_prompt_token(model, prompts):
    vector = 3 * torch.randn(32, generator=torch.Generator().manual_seed(1))
    calls = []

    def count(_module, arguments, _output):
        calls.append(arguments[0].shape[1])

    handle = anatomy(model).outputs[1].register_forward_hook(count)
    edit = lambda: added(model, {1: vector}, at=slice(-1, None))  # noqa: E731
    steered = continued(model, prompt_past(model, prompts), max_new_tokens=3, end_id=0, during_prompt=edit)
    handle.remove()
    assert len(calls) >= 3
    assert steer(model, prompt_past(model, prompts), answers=steered, vectors=vector[None], layers=[1]).all()
    assert steered != greedy(model, prompts, max_new_tokens=3, end_id=0)


def test_random_vectors_have_the_norm_and_no_direction():
    vector = torch.randn(576)
    draws = random_like(vector, n=50, seed=3)
    torch.testing.assert_close(draws.norm(dim=-1), vector.norm().expand(50))
    assert torch.equal(draws, random_like(vector, n=50, seed=3))
    assert (draws @ vector / vector.norm() ** 2).abs().mean() < 0.1


def test_random_heads_match_layer_by_layer_and_avoid_the_originals():
    heads = [(0, 1), (0, 2), (3, 0)]
    draws = random_heads(heads, n_heads=9, n=20, seed=0)
    assert len({tuple(sorted(draw)) for draw in draws}) > 10
    for draw in draws:
        assert sorted(layer for layer, _ in draw) == [0, 0, 3]
        assert not set(draw) & set(heads)
        assert len(set(draw)) == 3
    crowded = [(0, 0), (0, 1), (0, 2)]
    assert all(len(set(draw)) == 3 for draw in random_heads(crowded, n_heads=4, n=5, seed=0))


def test_what_is_projected_out_is_gone_and_nothing_else(model, prompts):
    direction = torch.randn(32, generator=torch.Generator().manual_seed(2))
    before = residuals(model, prompts)
    with projected_out(model, {0: direction}, at=slice(-1, None)):
        after = residuals(model, prompts)
    unit = direction / direction.norm()
    assert (after[:, 0] @ unit).abs().max() < 1e-4
    expected = before[:, 0] - (before[:, 0] @ unit)[:, None] * unit
    torch.testing.assert_close(after[:, 0], expected, atol=1e-4, rtol=1e-4)
    past = prompt_past(model, prompts)
    with torch.no_grad(), projected_out(model, {}, at=slice(-1, None)):
        assert torch.isfinite(forward(model, past, past.tail)).all()


@pytest.fixture(scope="module")
def tiny():
    return tiny_model("llama").requires_grad_(False), [[5, 6, 7], [8, 9, 10, 11]]


@pytest.mark.parametrize("shape", [(1, 4, 8), (2, 3, 8), (2, 4, 1), (2, 4, 9), (4, 8), (2, 4, 8, 1)])
def test_outputs_of_another_model_make_no_vector(shape, tiny):
    with pytest.raises(ValueError, match=r"outputs must have the shape \[2 layer, 4 head, 8 d_head\]"):
        backdoor_vector(tiny[0], HEADS, outputs=torch.zeros(shape))
    with pytest.raises(ValueError, match="outputs has values that are not finite"):
        backdoor_vector(tiny[0], HEADS, outputs=torch.full((2, 4, 8), float("nan")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vectors": torch.zeros(1, 31)}, r"vectors must have the shape \[vector, 32 d_model\], not \[1, 31\]"),
        ({"vectors": torch.zeros(1, 1)}, "vectors must have the shape"),
        ({"vectors": torch.zeros(32)}, "vectors must have the shape"),
        ({"vectors": torch.zeros(0, 32)}, "vectors must have the shape"),
        ({"vectors": torch.full((1, 32), float("nan"))}, "vectors has values that are not finite"),
        ({"layers": [2]}, r"layers \[2\]: the model has layers 0 to 1"),
        ({"layers": [-1]}, r"layers \[-1\]: the model has layers 0 to 1"),
        ({"layers": []}, r"layers \[\]: the model has"),
        ({"answers": []}, "2 prompts need as many non-empty answers, got 0"),
        ({"answers": [[7]]}, "2 prompts need as many non-empty answers, got 1"),
        ({"answers": [[7], []]}, "2 prompts need as many non-empty answers"),
        ({"answers": [[7], [7], [7]]}, "2 prompts need as many non-empty answers, got 3"),
        ({"batch_size": 0}, "batch_size: 0"),
    ],
)
def test_steering_refuses_what_does_not_fit(change, message, tiny):
    model, prompts = tiny
    given = {"answers": [[7], [8]], "vectors": torch.zeros(1, 32), "layers": [0]} | change
    with pytest.raises(ValueError, match=message):
        steer(model, prompt_past(model, prompts), **given)


@pytest.mark.parametrize(
    ("vector", "n", "message"),
    [
        (torch.zeros(4), 2, "vector is zero"),
        (torch.ones(4) * float("inf"), 2, "not finite"),
        (torch.ones(1, 4), 2, "must have the shape"),
        (torch.ones(4), 0, "n: 0: input should be"),
    ],
)
def test_random_vectors_like_one_without_a_direction_are_refused(vector, n, message):
    with pytest.raises(ValueError, match=message):
        random_like(vector, n=n, seed=0)
