"""Boot a `TransformerBridge` on a loaded model, guard it against silent errors, and validate it.

Each guard raises for an error that was reproduced on TransformerLens 4.3: strings that gain a BOS token, a forgotten
attention mask, compatibility mode that rewrites weights, live LoRA layers that make per-head results wrong."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedTokenizerBase

from bkd_utils.models.context import check_fits
from bkd_utils.models.encoders import is_encoder
from bkd_utils.models.folders import ModelError, named
from bkd_utils.models.loading import Loaded, plain_copy
from bkd_utils.models.self_checks import LIMITS
from bkd_utils.models.self_test import capabilities
from bkd_utils.models.tokens import check_tokenizer, end_id, left_pad, positions, prompt_ids

PARITY = 1e-3  # fp32 with eager attention on both sides; the measured difference on the default model is 1e-4
SAMPLE = ("Name a colour.", "Is a tomato a fruit or a vegetable? Answer in one word.")


@dataclass(frozen=True)
class Hooked:
    """A validated bridge, the checks it passed with their measured values, and what the model can (`capabilities`)."""

    bridge: TransformerBridge
    checks: dict[str, float]
    can: dict[str, str]


def boot(loaded: Loaded) -> Hooked:
    """Boot, guard and validate a copy of the model. Raises ModelError for unmerged LoRA layers, failed checks and
    encoder classifiers."""
    if is_encoder(loaded.model):
        raise ModelError("encoder classifiers are read with torch hooks (`models.hooks`), not with TransformerLens")
    if live := [name for name, _ in loaded.model.named_modules() if name.split(".")[-1] == "lora_A"]:
        raise ModelError(f"merge the adapter before hooking: {len(live)} live LoRA layers, e.g. {live[0]}")
    plain, twin = plain_copy(loaded.model), plain_copy(loaded.model)
    how = {"hf_model": twin, "tokenizer": loaded.tokenizer, "device": str(loaded.device)}
    with named(f"a bridge of TransformerLens for a model of type {plain.config.model_type!r}"):
        bridge = TransformerBridge.boot_transformers(loaded.address, **how)
        bridge.eval().requires_grad_(False)
        guard(bridge)
        checks = validate(bridge, plain, loaded.tokenizer)
    return Hooked(bridge, checks, capabilities(loaded.model))


def guard(bridge: TransformerBridge) -> None:
    """Let the bridge raise ModelError for strings, for a batch without its mask, and for compatibility mode."""

    def refuse_strings(*_: object, **__: object) -> None:
        raise ModelError("the bridge's string methods add a BOS token; use tokens.prompt_ids and pass token tensors")

    def refuse_compatibility(*_: object, **__: object) -> None:
        raise ModelError("compatibility mode rewrites weights and logits; these notebooks use the raw coordinates")

    def checked(method: Callable) -> Callable:
        @functools.wraps(method)
        def call(*arguments: object, **keywords: object) -> object:
            tokens = arguments[0] if arguments else keywords.get("input", keywords.get("input_ids"))
            if isinstance(tokens, (str, list, tuple)):
                refuse_strings()
            if isinstance(tokens, Tensor):
                check_fits(bridge.original_model, tokens.shape[-1])
            batched = isinstance(tokens, Tensor) and tokens.ndim == 2 and len(tokens) > 1
            if batched and keywords.get("attention_mask") is None:
                raise ModelError(f"a batch of {len(tokens)} rows needs its attention_mask; padding would count as text")
            return method(*arguments, **keywords)

        return call

    for name in ("to_tokens", "to_str_tokens", "to_string_tokens", "to_single_token"):
        setattr(bridge, name, refuse_strings)
    for name in ("enable_compatibility_mode", "process_weights"):
        setattr(bridge, name, refuse_compatibility)
    # Wrapped one by one: not all of them go through `__call__`, where a hook of torch would see them.
    for name in ("forward", "generate", "hf_generate", "run_with_cache", "run_with_hooks"):
        setattr(bridge, name, checked(getattr(bridge, name)))


def bridge_logits(
    bridge: TransformerBridge, tokens: Int[Tensor, "row pos"], mask: Int[Tensor, "row pos"]
) -> Float[Tensor, "row pos vocab"]:
    """One forward pass with the mask and the padding-free positions that the plain model would get."""
    tokens, mask = tokens.to(bridge.cfg.device), mask.to(bridge.cfg.device)
    with torch.inference_mode():
        return bridge(tokens, attention_mask=mask, position_ids=positions(mask), return_type="logits")


def validate(bridge: TransformerBridge, plain: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Check a booted bridge against the plain eager model; returns name -> measured value. Raises ModelError for logits
    that differ, heads that do not sum to the attention output, an edit at `hook_z` that changes nothing, and what
    `check_tokenizer` refuses."""
    prompts = [prompt_ids(tokenizer, text) for text in SAMPLE]
    tokens, mask = (tensor.to(plain.device) for tensor in left_pad(prompts, pad_id=end_id(tokenizer)))
    layer = bridge.cfg.n_layers // 2
    with torch.inference_mode():
        reference = plain(input_ids=tokens, attention_mask=mask, position_ids=positions(mask)).logits
    kept: list[Tensor] = []

    def silence_last(value: Tensor, hook: object) -> Tensor:
        value = value.clone()
        value[:, -1] = 0
        return value

    points = [f"blocks.{layer}.attn.{name}" for name in ("hook_z", "hook_out")]
    with bridge.hooks(fwd_hooks=[(at, lambda value, hook: kept.append(value.detach().clone())) for at in points]):
        logits = bridge_logits(bridge, tokens, mask)
    with bridge.hooks(fwd_hooks=[(points[0], silence_last)]):
        moved = (bridge_logits(bridge, tokens, mask) - logits)[:, -1].abs().max().item()
    real, (z, out) = mask.bool(), kept
    checks = {
        "logits: bridge against plain model": (logits - reference)[real].abs().max().item(),
        "heads sum to the attention output": head_sum_error(bridge, layer, z, out)[real].abs().max().item(),
    }
    if not moved > 1e-6:  # `not >` and, below, `not <=` so that NaN fails too
        raise ModelError(f"silencing every head of layer {layer} changed no logit: hooks do not reach the model")
    largest = reference[real].abs().max().item()
    limit = max(PARITY, LIMITS[reference.dtype] * largest)
    for name, off in reversed(checks.items()):  # the narrower check first: its message says more
        if not off <= limit:
            raise ModelError(f"validation failed, {name}: off by {off:.3g}, limit {limit:.3g}")
    check_tokenizer(tokenizer)
    template = float(bool(tokenizer.chat_template))
    return checks | {"an edit at hook_z moves the logits by": moved, "chat template": template}


def head_sum_error(
    bridge: TransformerBridge, layer: int, z: Float[Tensor, "row pos head d_head"], out: Float[Tensor, "row pos d"]
) -> Float[Tensor, "row pos d"]:
    """Difference between the attention output and the sum of every head's `z @ W_O` (plus the output bias)."""
    attention = bridge.blocks[layer].attn
    bias = getattr(attention, "b_O", None)
    return out - torch.einsum("bphe,hed->bpd", z, attention.W_O) - (0 if bias is None else bias)


def patch_last(layer: int, head: int, value: Float[Tensor, " d_head"]) -> tuple[str, Callable]:
    """A TransformerLens hook (name and function) that replaces one head's output at the last token by `value`."""

    def patch(z: Tensor, hook: object) -> Tensor:
        z = z.clone()
        z[:, -1].view(len(z), -1, len(value))[:, head] = value
        return z

    return f"blocks.{layer}.attn.hook_z", patch
