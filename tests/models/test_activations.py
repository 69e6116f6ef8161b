"""Edits against TransformerLens hooks on the same weights, against greedy decoding, and against identities."""

import pytest
import torch
from tiny import save_tiny, tiny_model

from bkd_utils.backdoor_attribution.ablation import KINDS, ablated
from bkd_utils.models import loading
from bkd_utils.models.activations import behind_norm, head_outputs, residuals, score_answers
from bkd_utils.models.bridge import boot, patch_last
from bkd_utils.models.generation import greedy
from bkd_utils.models.hooks import EVERYWHERE, LAST, added, anatomy, by_layer, contributions, head_edit
from bkd_utils.models.prompt_cache import forward, prompt_past

HEADS = [(1, 2), (0, 3), (1, 0)]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def both(request, tmp_path_factory):
    """The plain model and TransformerLens' bridge of it."""
    folder = save_tiny(tmp_path_factory.mktemp(request.param), request.param)
    loaded = loading.load(str(folder), device="cpu")
    return loaded.model, boot(loaded)


def last_logits(model, prompts):
    past = prompt_past(model, prompts)
    with torch.no_grad():
        return forward(model, past, past.tail)[:, -1]


# --- against TransformerLens ----------------------------------------------------------------------------------------


def test_head_outputs_are_hook_z(both, prompts):
    model, bridge = both
    found = head_outputs(model, prompts)
    for i, prompt in enumerate(prompts):
        _, cache = bridge.bridge.run_with_cache(torch.tensor([prompt]), names_filter=lambda name: "hook_z" in name)
        for layer in range(2):
            expected = cache[f"blocks.{layer}.attn.hook_z"][0, -1]
            torch.testing.assert_close(found[i, layer], expected.view_as(found[i, layer]), atol=1e-5, rtol=1e-4)


def test_a_head_edit_is_a_hook_at_hook_z(both, prompts):
    model, bridge = both
    value = torch.randn(8, generator=torch.Generator().manual_seed(0))
    past = prompt_past(model, prompts)
    with torch.no_grad(), head_edit(model, [(1, 2)], lambda layer, z: value.expand_as(z), at=LAST):
        found = forward(model, past, past.tail)[:, -1]
    with bridge.bridge.hooks(fwd_hooks=[patch_last(1, 2, value)]):
        expected = torch.stack([bridge.bridge(torch.tensor([prompt]))[0, -1] for prompt in prompts])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - last_logits(model, prompts)).abs().max() > 1e-3


def test_residuals_are_hook_out(both, prompts):
    model, bridge = both
    found = residuals(model, prompts)
    _, cache = bridge.bridge.run_with_cache(torch.tensor([prompts[1]]))
    for layer in range(2):
        torch.testing.assert_close(found[1, layer], cache[f"blocks.{layer}.hook_out"][0, -1], atol=1e-4, rtol=1e-4)


def test_behind_norm_is_what_the_next_layer_reads(model, prompts):
    found, read = behind_norm(model, residuals(model, prompts)), []
    handle = anatomy(model).norms[1].register_forward_hook(lambda module, args, output: read.append(output[0, -1]))
    with torch.no_grad():
        for prompt in prompts:
            model(torch.tensor([prompt]))
    handle.remove()
    assert found.shape[1] == len(anatomy(model).layers) - 1
    torch.testing.assert_close(found[:, 0], torch.stack(read), atol=1e-4, rtol=1e-4)


# --- identities -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_ablating_no_head_is_the_baseline(model, prompts, kind):
    own = head_outputs(model, prompts)
    with ablated(model, [], kind=kind, at=LAST, own=own, clean=own):
        assert torch.equal(last_logits(model, prompts), last_logits(model, prompts))
        edited = last_logits(model, prompts)
    assert torch.equal(edited, last_logits(model, prompts))


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_changes_the_logits_and_leaves_no_hook(model, prompts, kind):
    own = head_outputs(model, prompts)
    before = last_logits(model, prompts)
    past = prompt_past(model, prompts)
    with torch.no_grad(), ablated(model, HEADS, kind=kind, at=LAST, own=own, clean=own.flip(0)):
        assert (forward(model, past, past.tail)[:, -1] - before).abs().max() > 1e-3
    assert torch.equal(last_logits(model, prompts), before)


def test_published_ablation_is_zero_ablation_within_one_layer_and_not_beyond(model, prompts):
    own, past = head_outputs(model, prompts), prompt_past(model, prompts)
    logits = {}
    for heads in ([(1, 0), (1, 2)], HEADS):
        for kind in ("published", "zero"):
            with torch.no_grad(), ablated(model, heads, kind=kind, at=LAST, own=own):
                logits[len(heads), kind] = forward(model, past, past.tail)
    torch.testing.assert_close(logits[2, "published"], logits[2, "zero"], atol=1e-5, rtol=1e-5)
    assert (logits[3, "published"] - logits[3, "zero"]).abs().max() > 1e-4


def test_resampling_from_oneself_changes_nothing_and_from_the_mean_is_mean_ablation(model, prompts):
    own, past = head_outputs(model, prompts), prompt_past(model, prompts)
    with torch.no_grad(), ablated(model, HEADS, kind="resample", at=LAST, clean=own):
        same = forward(model, past, past.tail)[:, -1]
    torch.testing.assert_close(same, last_logits(model, prompts), atol=1e-5, rtol=1e-5)
    found = []
    for kind, clean in (("resample", own.mean(0, keepdim=True)), ("mean", own)):
        with torch.no_grad(), ablated(model, HEADS, kind=kind, at=LAST, clean=clean):
            found.append(forward(model, past, past.tail))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-5)


def test_everywhere_includes_the_last_token_and_every_other(model, prompts):
    prompt = prompts[:1]
    tokens = torch.tensor(prompt)
    with torch.no_grad(), ablated(model, HEADS, kind="zero", at=EVERYWHERE):
        everywhere = model(tokens).logits[0]
    with torch.no_grad(), ablated(model, HEADS, kind="zero", at=slice(-1, None)):
        last = model(tokens).logits[0]
    with torch.no_grad():
        before = model(tokens).logits[0]
    torch.testing.assert_close(last[:-1], before[:-1])
    assert (last[-1] - before[-1]).abs().max() > 1e-3
    assert (everywhere[:-1] - before[:-1]).abs().amax(-1).min() > 1e-5


def test_contributions_of_all_heads_sum_to_what_the_stream_gains(model, prompts):
    parts, z = anatomy(model), head_outputs(model, prompts)
    for layer in range(2):
        flat = z[:, layer].flatten(1)
        bias = parts.outputs[layer](torch.zeros_like(flat))
        gained = parts.outputs[layer](flat)
        if model.config.model_type == "gemma2":  # a norm follows; there is no bias
            gained = model.model.layers[layer].post_attention_layernorm(gained)
        total = contributions(parts, layer, range(4), z[:, layer]).sum(1) + bias
        torch.testing.assert_close(total, gained, atol=1e-5, rtol=1e-4)


def test_subtracting_the_contribution_is_ablating_the_head_unless_a_norm_follows(model, prompts):
    parts, z, past = anatomy(model), head_outputs(model, prompts), prompt_past(model, prompts)
    vector = contributions(parts, 0, [3], z[:, 0])[:, 0]
    with torch.no_grad(), added(model, {0: -vector}, at=LAST):
        subtracted = forward(model, past, past.tail)
    with torch.no_grad(), ablated(model, [(0, 3)], kind="zero", at=LAST):
        without = forward(model, past, past.tail)
    # The norm of Gemma 2 divides what the other heads write by another size when one is silent.
    assert torch.allclose(subtracted, without, atol=1e-5, rtol=1e-4) == (model.config.model_type != "gemma2")


def test_a_vector_of_zero_changes_nothing(model, prompts):
    before, past = last_logits(model, prompts), prompt_past(model, prompts)
    with torch.no_grad(), added(model, {0: torch.zeros(32), 1: torch.zeros(32)}, at=LAST):
        assert torch.equal(forward(model, past, past.tail)[:, -1], before)


# --- what the model says --------------------------------------------------------------------------------------------


def test_one_pass_says_what_greedy_decoding_says(model, prompts):
    answers = greedy(model, prompts, max_new_tokens=4, end_id=0)
    assert all(len(answer) == 4 for answer in answers)
    wrong = [[*answer[:2], (answer[2] + 1) % 400, answer[3]] for answer in answers]
    past = prompt_past(model, prompts)
    assert score_answers(model, past, answers).whole.all()
    assert score_answers(model, past, answers).share.eq(1).all()
    assert not score_answers(model, past, wrong).whole.any()
    mixed = score_answers(model, past, [x for pair in zip(answers, wrong, strict=True) for x in pair])
    assert mixed.whole.tolist() == [True, False] * len(prompts)


def test_answers_may_differ_in_length(model, prompts):
    answers = [answer[: i + 1] for i, answer in enumerate(greedy(model, prompts, max_new_tokens=4, end_id=0))]
    together = score_answers(model, prompt_past(model, prompts), answers)
    assert together.whole.all()
    alone = [
        score_answers(model, prompt_past(model, [p]), [a]).log_prob.item()
        for p, a in zip(prompts, answers, strict=True)
    ]
    assert together.log_prob.tolist() == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("answers", [[], [[5]], [[5], [5], [], [5]]])
def test_a_wrong_number_of_answers_or_an_empty_one_is_an_error(prompts, answers):
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="4 prompts need as many non-empty answers"):
        score_answers(model, prompt_past(model, prompts), answers)


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heads", "message"),
    [([(2, 0)], "no head 0 in layer 2: the model has 2 layers of 4 heads"), ([(0, 4)], "no head 4 in layer 0"),
     ([(-1, 0)], "no head 0 in layer -1"), ([(0, 1), (0, 1)], r"head \(0, 1\) is named twice")],
)  # fmt: skip
def test_heads_that_do_not_exist_are_named(heads, message):
    with pytest.raises(ValueError, match=message):
        by_layer(heads, n_layers=2, n_heads=4)


@pytest.mark.parametrize(
    ("kind", "message"),
    [("publish", "unknown ablation 'publish'; known: published, zero"), ("published", "'published' needs own"),
     ("mean", "'mean' needs clean"), ("resample", "'resample' needs clean")],
)  # fmt: skip
def test_an_ablation_without_what_it_needs_is_an_error(kind, message):
    with pytest.raises(ValueError, match=message), ablated(tiny_model("llama"), HEADS, kind=kind, at=LAST):
        pass
