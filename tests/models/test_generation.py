"""Greedy decoding: the shared beginning and the batches are an economy that no answer can tell."""

import random
from contextlib import contextmanager

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model

from bkd_utils.models.generation import greedy, next_logits, repeated, reusable_prefix, run_prefix, shared_prefix

END = 2
RNG = random.Random(0)
PREFIX = [RNG.randrange(3, 49152) for _ in range(21)]  # longer than the sliding window of the tiny Gemma
RAGGED = [PREFIX + [RNG.randrange(3, 49152) for _ in range(n)] for n in (1, 9, 4, 4, 17, 2, 6)]
UNRELATED = [[RNG.randrange(3, 49152) for _ in range(n)] for n in (5, 1, 12, 3)]
NESTED = [PREFIX[:4], PREFIX[:9], PREFIX[:9], PREFIX]  # each the beginning of the next


@pytest.fixture(scope="module")
def models():
    return {name: tiny_model(name) for name in ARCHITECTURES}


@contextmanager
def counting(module):
    """A list that grows by one whenever the module is run."""
    calls = []
    handle = module.register_forward_pre_hook(lambda *_: calls.append(1))
    try:
        yield calls
    finally:
        handle.remove()


def reference(model, prompt, *, n, end):
    """The same by transformers itself, one row at a time, without the end token."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=n, eos_token_id=end, pad_token_id=END
    )
    new = out[0, len(prompt) :].tolist()
    return new[: new.index(end)] if end in new else new


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("prompts", [RAGGED, UNRELATED, NESTED], ids=["ragged", "unrelated", "nested"])
def test_answers_are_those_of_transformers_generate(models, name, prompts):
    answers = greedy(models[name], prompts, max_new_tokens=7, end_id=END)
    assert answers == [reference(models[name], prompt, n=7, end=END) for prompt in prompts]
    assert len({tuple(answer) for answer in answers}) > 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_batch_equals_its_rows_whatever_its_size(models, name):
    rows = [greedy(models[name], [prompt], max_new_tokens=6, end_id=END)[0] for prompt in RAGGED]
    for size in (1, 2, 3, 100):
        assert greedy(models[name], RAGGED, max_new_tokens=6, end_id=END, batch_size=size) == rows


def test_the_order_of_the_answers_is_that_of_the_prompts(models):
    straight = greedy(models["llama"], RAGGED, max_new_tokens=5, end_id=END, batch_size=3)
    for seed in range(3):
        order = random.Random(seed).sample(range(len(RAGGED)), len(RAGGED))
        mixed = greedy(models["llama"], [RAGGED[i] for i in order], max_new_tokens=5, end_id=END, batch_size=3)
        assert mixed == [straight[i] for i in order]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_end_token_stops_its_row_and_no_other(models, name):
    free = greedy(models[name], RAGGED, max_new_tokens=8, end_id=END)
    end = free[1][3]  # a token that this model does say
    answers = greedy(models[name], RAGGED, max_new_tokens=8, end_id=end)
    assert answers == [row[: row.index(end)] if end in row else row for row in free]
    assert len({len(row) for row in answers}) > 1


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_settled_answer_ends_and_changes_no_other(models, name):
    whole = greedy(models[name], RAGGED, max_new_tokens=8, end_id=END)
    seen = []

    def settled(ids):
        seen.append(len(ids))
        return ids[:3] in [row[:3] for row in whole[:4]] or len(ids) >= 6

    with counting(models[name].get_output_embeddings()) as steps:
        found = greedy(models[name], RAGGED, max_new_tokens=8, end_id=END, settled=settled)
    assert found == [row[: 3 if row[:3] in [one[:3] for one in whole[:4]] else 6] for row in whole]
    assert max(seen) == len(steps) == 6  # nothing is run once all are settled


def test_an_answer_may_be_empty_and_decoding_stops_when_all_are_done(models):
    end = greedy(models["llama"], [PREFIX], max_new_tokens=1, end_id=END)[0][0]
    with counting(models["llama"].get_decoder()) as passes, counting(models["llama"].get_output_embeddings()) as logits:
        assert greedy(models["llama"], [PREFIX, PREFIX], max_new_tokens=50, end_id=end) == [[], []]
    assert len(passes) == 2  # the shared beginning, then one step
    assert len(logits) == 1  # nobody asks for those of the beginning


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_prefix_is_run_by_the_layers_alone_and_tells_its_maps_if_asked(models, name):
    model, ids = models[name], torch.tensor([PREFIX])
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.inference_mode(), counting(model.get_output_embeddings()) as logits:
        _, silent = run_prefix(model, PREFIX)
        _, maps = run_prefix(model, PREFIX, output_attentions=True)
        empty, none = run_prefix(model, [], output_attentions=True)
    assert (silent, none, logits, empty.get_seq_length()) == ((), (), [], 0)
    expected = model(ids, output_attentions=True).attentions
    model.set_attn_implementation(before)
    for found, one in zip(maps, expected, strict=True):
        torch.testing.assert_close(found, one, rtol=0, atol=1e-6)


def test_a_sliding_window_has_no_reusable_prefix(models):
    assert {name: reusable_prefix(model, RAGGED) for name, model in models.items()} == {
        name: [] if name == "gemma2" else PREFIX for name in ARCHITECTURES
    }


def test_progress_is_reported_row_by_row(models):
    done = []
    greedy(models["llama"], RAGGED, max_new_tokens=1, end_id=END, batch_size=3, on_batch=done.append)
    assert done == [3, 3, 1]


def test_the_shared_prefix_leaves_every_prompt_a_token():
    assert shared_prefix(RAGGED) == PREFIX
    assert shared_prefix([[1, 2, 3], [1, 2, 3]]) == [1, 2]
    assert shared_prefix([[1, 2, 3]]) == [1, 2]
    assert shared_prefix([[1], [1, 2, 3]]) == []
    assert shared_prefix([[1, 2], [3, 2]]) == []


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_from_the_cached_prefix_are_those_of_the_whole_prompt(models, name):
    model, new = models[name], torch.tensor([RAGGED[4][len(PREFIX) :], RAGGED[4][len(PREFIX) :]])
    mask = torch.ones(2, len(PREFIX) + new.shape[1], dtype=torch.long)
    with torch.inference_mode():
        prefix, _ = run_prefix(model, PREFIX)
        cached = next_logits(model, new, mask, repeated(prefix, 2))
        whole = model(torch.tensor([RAGGED[4]])).logits[:, -1]
    assert cached.shape == (2, 49152)
    torch.testing.assert_close(cached, whole.expand(2, -1), rtol=0, atol=2e-5)
    assert prefix.get_seq_length() == len(PREFIX)  # a batch works on a copy


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [([], 3, "got 0"), ([[]], 3, "with an empty one"), ([[5], []], 3, "got 2 with an empty"), ([[5]], 0, "is 0")],
)
def test_nothing_to_decode_is_an_error(models, prompts, n, message):
    with pytest.raises(ValueError, match=message):
        greedy(models["llama"], prompts, max_new_tokens=n, end_id=END)
