"""Running from a cached past against running the whole prompt."""

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from bkd_utils.models.folders import ModelError
from bkd_utils.models.generation import greedy
from bkd_utils.models.hooks import anatomy, editing, reading
from bkd_utils.models.prompt_cache import continued, forward, prompt_past

ANSWER = [7, 11, 5]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module", params=[0, 1, 5], ids=lambda n: f"{n} tokens shared")
def prompts(request):
    generator = torch.Generator().manual_seed(0)
    beginning = [17] * request.param
    return [beginning + torch.randint(3, 400, (n,), generator=generator).tolist() for n in (6, 4, 7, 5)]


def whole(model, prompt, answer=ANSWER):
    with torch.no_grad():
        return model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1]


def test_logits_are_those_of_the_whole_prompt(model, prompts):
    past = prompt_past(model, prompts)
    answer = torch.tensor([ANSWER] * len(prompts))
    with torch.no_grad():
        logits = forward(model, past, past.rows(answer))
    assert logits.shape[1] == len(ANSWER)
    for row, prompt in zip(logits, prompts, strict=True):
        torch.testing.assert_close(row, whole(model, prompt), atol=1e-4, rtol=1e-4)


def test_rows_of_one_prompt_share_its_past(model, prompts):
    past = prompt_past(model, prompts)
    answers = torch.tensor([ANSWER, [9, 9, 9]])
    rows = torch.cat([past.tail.repeat_interleave(2, 0), answers[:, :-1].repeat(len(prompts), 1)], dim=1)
    with torch.no_grad():
        logits = forward(model, past, rows)
    for i, prompt in enumerate(prompts):
        for k, answer in enumerate(answers.tolist()):
            torch.testing.assert_close(logits[2 * i + k], whole(model, prompt, answer), atol=1e-4, rtol=1e-4)


def test_starting_at_a_layer_from_its_input_changes_nothing(model, prompts):
    past = prompt_past(model, prompts)
    answer = torch.tensor([ANSWER] * len(prompts))
    with torch.no_grad(), reading(anatomy(model).layers) as kept:
        logits = forward(model, past, past.rows(answer))
    with torch.no_grad():
        again = forward(model, past, past.rows(answer), layer=1, hidden=kept[1])
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)


def test_the_model_is_as_it_was_even_after_an_error(model, prompts):
    layers, attention = len(anatomy(model).layers), model.config._attn_implementation
    before = whole(model, prompts[0])

    def fail(_, tensor):
        raise RuntimeError("in the middle")

    past = prompt_past(model, prompts)
    with pytest.raises(RuntimeError, match="in the middle"), editing(anatomy(model).outputs, fail):
        forward(model, past, past.tail, layer=1)
    assert len(anatomy(model).layers) == layers
    assert model.config._attn_implementation == attention
    assert torch.equal(whole(model, prompts[0]), before)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_the_output_map_reads_the_heads_side_by_side(model, prompts):
    parts, past = anatomy(model), prompt_past(model, prompts)
    with torch.no_grad(), reading(parts.outputs) as kept:
        forward(model, past, past.tail)
    width = getattr(model.config, "head_dim", None) or model.config.hidden_size // 4
    assert all(kept[layer].shape == (len(prompts), 1, 4 * width) for layer in range(2))


def test_prompts_must_have_more_tokens_than_the_last_one(model):
    with pytest.raises(ValueError, match="need prompts of more than 1 token, got 2, the shortest of 1"):
        prompt_past(model, [[5, 6, 7, 8], [5]])
    with pytest.raises(ValueError, match="need prompts of more than 1 token, got 0"):
        prompt_past(model, [])


def test_rows_that_do_not_fit_the_prompts_are_an_error(model, prompts):
    past = prompt_past(model, prompts)
    with pytest.raises(ValueError, match="3 rows for 4 prompts"):
        forward(model, past, past.tail[:3])


def test_what_outgrows_a_sliding_window_is_refused():
    model = tiny_model("gemma2")
    with pytest.raises(ModelError, match="17 tokens do not fit the attention window of the model, 16"):
        prompt_past(model, [[5] * 17])
    past = prompt_past(model, [[5] * 14])
    with pytest.raises(ModelError, match="17 tokens do not fit the attention window of the model, 16"):
        forward(model, past, past.rows(torch.tensor([[7] * 4])))


def test_an_unknown_architecture_is_refused_by_its_type():
    model = tiny_model("gpt2")
    model.transformer.stack = model.transformer.h
    del model.transformer.h
    with pytest.raises(ModelError, match="'gpt2' has none of the layer names"):
        anatomy(model)


# --- going on from a past -------------------------------------------------------------------------------------------


def test_continued_is_greedy(model, prompts):
    expected = greedy(model, prompts, max_new_tokens=5, end_id=0)
    past = prompt_past(model, prompts)
    assert continued(model, past, max_new_tokens=5, end_id=0) == expected
    assert continued(model, past, max_new_tokens=5, end_id=0) == expected, "the past has been used up"


def test_a_part_of_a_past_is_the_past_of_a_part(model, prompts):
    part = prompt_past(model, prompts).part(slice(1, 3))
    assert len(part) == 2
    with torch.no_grad():
        found, expected = (forward(model, past, past.tail) for past in (part, prompt_past(model, prompts[1:3])))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
