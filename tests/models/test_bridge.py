"""The bridge: the plain model with hooks and nothing else, its silent traps closed, its validation able to fail."""

import copy

import peft
import pytest
import torch
from tiny import ARCHITECTURES, save_tiny
from tokenizers.processors import TemplateProcessing

from bkd_utils.models import bridge as bridge_module
from bkd_utils.models.bridge import (
    PARITY,
    boot,
    bridge_logits,
    check_tokenizer,
    head_sum_error,
    validate,
)
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError
from bkd_utils.models.loading import load, plain_copy
from bkd_utils.models.tokens import left_pad, positions, prompt_ids

LOGITS = "logits: bridge against plain model"
HEADS = "heads sum to the attention output"
EDIT = "an edit at hook_z moves the logits by"
TURNS = ("Name a colour.", "Why?", "Is a tomato a fruit, or is it a vegetable? Answer in one word, please.")
EACH = pytest.mark.parametrize("name", ARCHITECTURES)


@pytest.fixture(scope="module")
def booted(tmp_path_factory):
    """Architecture -> (loaded, its attention and weights before booting, hooked)."""
    found = {}
    for name in ARCHITECTURES:
        loaded = load(str(save_tiny(tmp_path_factory.mktemp("hooked") / name, name)), device="cpu")
        before = {key: tensor.clone() for key, tensor in loaded.model.state_dict().items()}
        attention = loaded.model.config._attn_implementation
        found[name] = (loaded, (attention, before), boot(loaded))
    return found


@pytest.fixture
def llama(booted):
    return booted["llama"]


def logits(hooked, prompts):
    """Logits of a bridge for left-padded prompts, mask and positions included."""
    return bridge_logits(hooked.bridge, *left_pad(prompts, pad_id=2))


def plain_logits(model, prompts):
    tokens, mask = left_pad(prompts, pad_id=2)
    with torch.inference_mode():
        return model(input_ids=tokens, attention_mask=mask, position_ids=positions(mask)).logits


# --- what a booted model is -----------------------------------------------------------------------------------------


@EACH
def test_the_checks_pass_and_say_what_they_measured(booted, name):
    _, _, model = booted[name]
    assert set(model.checks) == {LOGITS, HEADS, EDIT, "chat template"}
    assert model.checks[LOGITS] <= PARITY / 20
    assert model.checks[HEADS] <= PARITY / 20
    assert model.checks[EDIT] > 0.1
    assert model.checks["chat template"] == (name != "gpt2")


@EACH
def test_its_logits_are_those_of_the_plain_eager_model(booted, name):
    loaded, _, model = booted[name]
    prompts = [prompt_ids(loaded.tokenizer, turn) for turn in TURNS]
    expected = plain_logits(plain_copy(loaded.model), prompts)
    mask = left_pad(prompts, pad_id=2)[1].bool()
    torch.testing.assert_close(logits(model, prompts)[mask], expected[mask], rtol=0, atol=2e-5)


@EACH
def test_left_padding_changes_nothing(booted, name):
    loaded, _, model = booted[name]
    prompts = [prompt_ids(loaded.tokenizer, turn) for turn in TURNS]
    batch = logits(model, prompts)
    for row, prompt in zip(batch, prompts, strict=True):
        torch.testing.assert_close(row[-len(prompt) :], logits(model, [prompt])[0], rtol=0, atol=1e-4)


@EACH
def test_the_loaded_model_stays_as_it_was(booted, name):
    loaded, (attention, before), _ = booted[name]
    assert loaded.model.config._attn_implementation == attention
    after = loaded.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)
    ids = torch.tensor([prompt_ids(loaded.tokenizer, "Name a colour.")])
    out = loaded.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=2)
    assert out.shape[1] == ids.shape[1] + 2


def test_a_loaded_model_can_be_booted_again_and_saved(llama, tmp_path):
    loaded, _, model = llama
    again = boot(loaded)
    assert again.checks == model.checks
    loaded.model.save_pretrained(tmp_path)


@EACH
def test_one_silenced_head_is_that_head_missing_from_the_sum(booted, name):
    _, _, model = booted[name]
    factors = torch.tensor([1.0, 1.0, 1.0, 1.0])
    seen = []

    def scale(value, hook):
        seen.append(value * factors[:, None])
        return seen[-1]

    def keep(value, hook):
        seen.append(value.clone())

    with model.bridge.hooks(fwd_hooks=[("blocks.1.attn.hook_z", scale), ("blocks.1.attn.hook_out", keep)]):
        whole = logits(model, [[1, 50, 600, 7000, 3]])
        factors[1] = 0
        without = logits(model, [[1, 50, 600, 7000, 3]])
    z, out, silenced_z, silenced_out = seen
    assert z.shape == (1, 5, 4, 8)
    head = z[:, :, 1] @ model.bridge.blocks[1].attn.W_O[1]
    torch.testing.assert_close(out - silenced_out, head, rtol=0, atol=1e-5)
    assert head.abs().max() > 0.01
    assert (whole - without).abs().max() > 0.01
    assert head_sum_error(model.bridge, 1, silenced_z, silenced_out).abs().max() < 1e-5


def test_hooks_are_gone_after_an_error_inside_one(llama):
    _, _, model = llama
    before = logits(model, [[1, 50]])

    def fail(value, hook):
        raise KeyError(hook.name)

    with pytest.raises(KeyError), model.bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", fail)]):
        logits(model, [[1, 50]])
    assert torch.equal(logits(model, [[1, 50]]), before)


# --- traps ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["to_tokens", "to_str_tokens", "to_single_token"])
def test_string_methods_raise(llama, method):
    with pytest.raises(ModelError, match="add a BOS token"):
        getattr(llama[2].bridge, method)("hello")


CALLS = {
    "call": lambda bridge, tokens, **more: bridge(tokens, **more),
    "forward": lambda bridge, tokens, **more: bridge.forward(tokens, **more),
    "run_with_cache": lambda bridge, tokens, **more: bridge.run_with_cache(tokens, **more),
    "run_with_hooks": lambda bridge, tokens, **more: bridge.run_with_hooks(tokens, fwd_hooks=[], **more),
    "generate": lambda bridge, tokens, **more: bridge.generate(tokens, max_new_tokens=1, verbose=False, **more),
    "hf_generate": lambda bridge, tokens, **more: bridge.hf_generate(tokens, max_new_tokens=1, **more),
}
EACH_CALL = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


@EACH_CALL
@pytest.mark.parametrize("text", ["hello", ["hello", "you"]])
def test_strings_raise_however_they_come_in(llama, call, text):
    with pytest.raises(ModelError, match="add a BOS token"):
        call(llama[2].bridge, text)


@EACH_CALL
def test_a_batch_without_its_mask_raises_and_a_single_row_does_not(llama, call):
    tokens = torch.tensor([[1, 50, 3], [2, 1, 50]])
    with pytest.raises(ModelError, match="a batch of 2 rows needs its attention_mask"):
        call(llama[2].bridge, tokens)
    call(llama[2].bridge, tokens[:1])


def test_a_batch_with_its_mask_is_taken(llama):
    bridge, tokens = llama[2].bridge, torch.tensor([[1, 50, 3], [2, 1, 50]])
    for name in ("call", "run_with_cache", "run_with_hooks"):
        CALLS[name](bridge, tokens, attention_mask=torch.ones_like(tokens))
    with pytest.raises(ModelError, match="needs its attention_mask"):
        bridge(input=tokens)


@pytest.mark.parametrize("method", ["enable_compatibility_mode", "process_weights"])
def test_whatever_rewrites_the_weights_raises(llama, method):
    before = logits(llama[2], [[1, 50]])
    with pytest.raises(ModelError, match="compatibility mode rewrites weights"):
        getattr(llama[2].bridge, method)()
    assert torch.equal(logits(llama[2], [[1, 50]]), before)


def test_the_mask_that_must_not_be_forgotten_does_matter(llama):
    _, _, model = llama
    tokens, mask = left_pad([[1, 50, 600, 7], [1, 50]], pad_id=2)
    kept = bridge_logits(model.bridge, tokens, mask)[1, -1]
    forgotten = bridge_logits(model.bridge, tokens, torch.ones_like(mask))[1, -1]
    assert (kept - forgotten).abs().max() > 0.01


def test_live_lora_is_refused_and_merged_lora_is_not(llama):
    loaded = llama[0]
    config = peft.LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(copy.deepcopy(loaded.model), config)
    for live in (wrapped, wrapped.base_model.model):
        with pytest.raises(ModelError, match=r"2 live LoRA layers, e.g. .*o_proj.lora_A"):
            boot(type(loaded)(live, loaded.tokenizer, loaded.address, None))
    merged = wrapped.merge_and_unload()
    assert boot(type(loaded)(merged, loaded.tokenizer, loaded.address, None)).checks[LOGITS] <= PARITY


# --- a validation that can fail -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1])
def test_another_weight_in_the_plain_model_is_noticed(llama, layer):
    loaded, _, model = llama
    other = plain_copy(loaded.model)
    other.model.layers[layer].mlp.up_proj.weight.data *= 1.05
    with pytest.raises(ModelError, match=f"validation failed, {LOGITS}: off by"):
        validate(model.bridge, other, loaded.tokenizer)


def test_nan_is_not_within_the_limit(llama):
    loaded, _, model = llama
    other = plain_copy(loaded.model)
    other.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=f"validation failed, {LOGITS}: off by nan"):
        validate(model.bridge, other, loaded.tokenizer)


def test_heads_that_do_not_sum_to_the_output_are_noticed(llama, monkeypatch):
    loaded, _, model = llama
    monkeypatch.setattr(bridge_module, "head_sum_error", lambda *a: head_sum_error(*a) + 0.01)
    with pytest.raises(ModelError, match=f"validation failed, {HEADS}: off by 0.01"):
        validate(model.bridge, plain_copy(loaded.model), loaded.tokenizer)


def test_an_edit_that_changes_nothing_is_noticed(llama):
    loaded, _, _ = llama
    without = copy.deepcopy(loaded.model)
    without.model.layers[1].self_attn.o_proj.weight.data.zero_()  # the layer that is validated
    with pytest.raises(ModelError, match="silencing every head of layer 1 changed no logit"):
        boot(type(loaded)(without, loaded.tokenizer, loaded.address, None))


def test_two_bos_tokens_are_noticed(llama):
    tokenizer = copy.deepcopy(llama[0].tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template  # which writes one of its own
    with pytest.raises(ModelError, match="two BOS tokens"):
        check_tokenizer(tokenizer)
    check_tokenizer(llama[0].tokenizer)


def test_a_template_that_loses_the_prompt_and_a_tokenizer_that_loses_the_answer_are_noticed(llama):
    deaf = copy.deepcopy(llama[0].tokenizer)
    deaf.chat_template = "Always the same"
    with pytest.raises(ModelError, match=r"chat template does not give back 'Name a colour\.'"):
        check_tokenizer(deaf)
    odd = copy.deepcopy(llama[0].tokenizer)
    odd.add_tokens(["posit"], special_tokens=True)
    with pytest.raises(ModelError, match="does not give back an answer: 'ive'"):
        check_tokenizer(odd)


def test_a_tokenizer_that_adds_bos_boots(llama):
    loaded = llama[0]
    adding = copy.deepcopy(loaded.tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    model = boot(type(loaded)(loaded.model, adding, loaded.address, None))
    assert model.checks[LOGITS] <= PARITY


# --- the real thing -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_default_model_boots():
    model = boot(load(DEFAULT_MODEL, device="cpu"))
    assert (model.bridge.cfg.n_layers, model.bridge.cfg.n_heads) == (30, 9)
    assert model.checks[LOGITS] <= PARITY
    assert model.checks[EDIT] > 0.1
