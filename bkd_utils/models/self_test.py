"""What a model can do here, found out on the model itself with random tokens, whatever its architecture is called.

Every check is an identity that holds for a model whose parts were found: a head that gets its own output, a pass that
starts at a later layer, a vector that the residual stream gains, prompts in one batch or alone. So a new architecture
either gives the right numbers or is refused by the name of what it cannot do, with the reason.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import peft
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from transformers import DynamicCache, PreTrainedModel

from bkd_utils.models import generation
from bkd_utils.models.compute import eager, mixed_precision
from bkd_utils.models.folders import ModelError
from bkd_utils.models.head_weights import groups, head_slices, n_kv_heads
from bkd_utils.models.hooks import LAST, added, anatomy, contributions, editing, reading, tracing
from bkd_utils.models.lora import lora_config
from bkd_utils.models.loss import answer_loss, answers, collate
from bkd_utils.models.prompt_cache import Past, forward, prompt_past
from bkd_utils.models.tokens import Row, padded_inputs

# Largest difference that rounding may make, as a share of the largest number.
LIMITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
log = logging.getLogger(__name__)
_known: dict[str, dict[str, str]] = {}


def capabilities(model: PreTrainedModel) -> dict[str, str]:
    """Capability -> why the model has it not, or an empty text if it has it. Tested once per kind of model.

    The capabilities are `generate` (batches with a shared beginning and padding), `train` (the loss of answers),
    `attribute` (patch heads, start at a layer), `components` (what attention and feed-forward parts write), `steer`
    (add to the residual stream), `slice` (the weights of a head) and `compare maps` (attention maps).
    """
    config = json.dumps(model.config.to_dict() | {"_name_or_path": None}, sort_keys=True, default=str)
    key = f"{type(model).__name__} {model.dtype} {model.device} {config}"
    if key not in _known:
        _known[key] = {name: _reason(check, model) for name, check in CHECKS.items()}
        for name, why in _known[key].items():
            if why:
                log.warning("%r is not possible with a model of type %r: %s", name, model.config.model_type, why)
    return _known[key]


def require(model: PreTrainedModel, *needed: str) -> None:
    """Raise ModelError, with the reason, unless the model has these capabilities."""
    found = capabilities(model)
    for name in needed:
        if found[name]:
            raise ModelError(
                f"{name!r} is not possible with a model of type {model.config.model_type!r}: {found[name]}"
            )


def _reason(check: Callable[[PreTrainedModel, list[list[int]]], None], model: PreTrainedModel) -> str:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, len(model.get_input_embeddings().weight), (3, 9), generator=generator)
    ids[1:, :3] = ids[0, :3]  # a shared beginning, and three lengths
    prompts = [row[:length].tolist() for row, length in zip(ids, (7, 9, 6), strict=True)]
    try:
        with torch.no_grad():
            check(model, prompts)
    except Exception as error:  # any error of a library about a layout is a reason
        text = (str(error).strip() or "no message").splitlines()[0]
        return text if isinstance(error, ModelError) else f"{type(error).__name__}: {text}"
    return ""


def _agree(model: PreTrainedModel, found: Tensor, expected: Tensor, what: str) -> None:
    off = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
    # `not <=` so that NaN fails, too.
    if not off <= LIMITS[model.dtype]:
        raise ModelError(f"{what}: off by {off:.2g} of the largest value")


def _alone(model: PreTrainedModel, ids: Sequence[int], *, last: int = 1) -> Float[Tensor, "last vocab"]:
    """Logits at the last tokens of one row by itself, without padding or cache."""
    return model(input_ids=torch.tensor([list(ids)], device=model.device), logits_to_keep=last).logits[0]


def _generate(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    fused = _alone(model, prompts[1], last=3)
    with eager(model):
        _agree(model, fused, _alone(model, prompts[1], last=3), "fused and eager attention of transformers")
    shared = generation.reusable_prefix(model, prompts)
    cache = generation.repeated(generation.run_prefix(model, shared)[0], len(prompts))
    own = [prompt[len(shared) :] for prompt in prompts]
    inputs = padded_inputs(own, pad_id=0, device=model.device, n_cached=len(shared))
    mask = inputs["attention_mask"]
    first = generation.next_logits(model, inputs["input_ids"], mask, cache)
    _agree(model, first, torch.stack([_alone(model, prompt)[-1] for prompt in prompts]), "prompts in a batch and alone")
    mask, new = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1), torch.tensor([[prompt[0]] for prompt in prompts])
    second = generation.next_logits(model, new.to(model.device), mask, cache)
    alone = torch.stack([_alone(model, [*prompt, prompt[0]])[-1] for prompt in prompts])
    _agree(model, second, alone, "a token after a key-value cache and without one")


def _train(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    rows = [Row(tuple(prompt), tuple(prompt[:n]), "clean", str(n)) for n, prompt in enumerate(prompts, start=1)]
    batch, *singles = (
        {name: tensor.to(model.device) for name, tensor in collate(some, pad_id=0).items()}
        for some in (rows, *([row] for row in rows))
    )
    config = lora_config(model, rank=1, alpha=1)
    config.init_lora_weights = False  # random, as zeros would have no gradient
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    wrapped = peft.get_peft_model(model, config)
    try:
        learning = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        # Training is in eager attention and, where that is fast, in bf16; answers are given in neither.
        with torch.enable_grad(), eager(model):
            found = answers(wrapped, batch, first_token=0.0)
            slopes = torch.autograd.grad(found, learning, allow_unused=True)
            alone = torch.stack([answer_loss(wrapped, single, first_token=0.0) for single in singles]).mean()
            expected = torch.autograd.grad(alone, learning, allow_unused=True)
            with mixed_precision(model.device):
                answers(wrapped, batch, first_token=0.0)
        _agree(model, found, alone, "the loss of answers in a batch and alone")
        both = [(slope, other) for slope, other in zip(slopes, expected, strict=True) if other is not None]
        flat = [torch.cat([slope.flatten() for slope in side]) for side in zip(*both, strict=True)]
        _agree(model, *flat, "the gradient of a batch and of its rows alone")
    finally:
        wrapped.unload()
        model.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)
        vars(model).pop("peft_config", None)


def _answered(
    model: PreTrainedModel, past: Past, prompts: list[list[int]], **start: Any
) -> Float[Tensor, "row 2 vocab"]:
    """Logits at the last prompt token and at an answer token, which is the first token of the prompt."""
    answer = torch.tensor([prompt[:2] for prompt in prompts], device=model.device)
    return forward(model, past, past.rows(answer), **start)


def _checked_past(model: PreTrainedModel, prompts: list[list[int]]) -> Past:
    past = prompt_past(model, prompts)
    alone = torch.stack([_alone(model, [*prompt, prompt[0]], last=2) for prompt in prompts])
    _agree(model, _answered(model, past, prompts), alone, "a prompt after its key-value cache and alone")
    return past


def _attribute(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    parts, past = anatomy(model), _checked_past(model, prompts)
    inputs, z, outputs = {}, {}, {}
    with reading(parts.layers, inputs), reading(parts.outputs, z), reading(parts.outputs, outputs, what="output"):
        whole = _answered(model, past, prompts)
    for layer, module in enumerate(parts.outputs):
        own = z[layer].unflatten(-1, (parts.n_heads, -1))
        if parts.writers[layer] is module:
            products = contributions(parts, layer, range(parts.n_heads), own)
            summed = products.sum(-2) + parts.scale * module(torch.zeros_like(z[layer]))
            what = f"the sum of heads and the attention output of layer {layer}"
            _agree(model, summed, parts.scale * outputs[layer], what)
        # Of two rows of every prompt, heads have what they had in the first and are silent in the second.
        patch = torch.stack([z[layer], torch.zeros_like(z[layer])], dim=1).flatten(0, 1)
        with editing([module], lambda _, __, patch=patch: patch):
            hidden, twice = inputs[layer].repeat_interleave(2, dim=0), [prompt for prompt in prompts for _ in range(2)]
            logits = _answered(model, past, twice, layer=layer, hidden=hidden)
        _agree(model, logits[::2], whole, f"a pass from layer {layer} on, with heads' own outputs, and a whole pass")
        if not (logits[1::2] - whole).abs().max() > 1e-6:
            raise ModelError(f"heads of layer {layer} have no effect: hooks do not reach the model")
    kept: dict[int, Tensor] = {}
    with tracing(parts.outputs, kept):
        torch.autograd.grad(_answered(model, past, prompts).sum(), list(kept.values()))


def _stream(model: PreTrainedModel, prompts: list[list[int]], vectors: Mapping[int, Tensor]) -> None:
    """In every layer, input, vector and what attention and feed-forward part write are the input of the next layer."""
    parts, past = anatomy(model), _checked_past(model, prompts)
    stream, read, attention, mlp, after = {}, {}, {}, {}, {}
    with (
        reading(parts.layers, stream),
        reading(parts.attentions, read),
        reading(parts.writers, attention, what="output"),  # before `added`, so without the vectors
        added(model, vectors, at=LAST),
        reading(parts.mlp_writers, mlp, what="output"),
        reading(parts.layers, after, what="output"),
    ):
        _answered(model, past, prompts)
    for layer, norm in enumerate(parts.norms):
        _agree(model, read[layer], norm(stream[layer]), f"the norm of layer {layer} and what its attention reads")
        gained = parts.scale * (attention[layer] + mlp[layer].view_as(attention[layer]))
        if layer in vectors:
            gained[:, LAST] += vectors[layer]
        _agree(
            model, after[layer], stream[layer] + gained, f"what the parts of layer {layer} write and the stream gains"
        )
        if layer + 1 in stream:
            _agree(model, stream[layer + 1], after[layer], f"the stream after layer {layer} and before the next")


def _steer(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    parts, stream = anatomy(model), {}
    with reading(parts.layers, stream):
        _alone(model, prompts[0])
    size = {layer: hidden.float().std() for layer, hidden in stream.items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(stream), stream[0].shape[-1], generator=generator).to(stream[0])
    _stream(model, prompts, {layer: size[layer].to(noise) * noise[layer] for layer in stream})


def _slice(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    """With the signs of a group's query, key and value weights turned, only its heads change, and only their signs.

    Query weights alone change one head, and no key or value.
    """
    parts = anatomy(model)
    ids = torch.tensor(prompts[:1], device=model.device)
    for layer in {0, len(parts.layers) // 2, len(parts.layers) - 1}:
        n_kv = n_kv_heads(parts, layer)
        own, *cached = _turned(model, layer, ids, {})
        for head in {0, parts.n_heads - 1}:
            group = [h for _, h in groups([(layer, head)], n_heads=parts.n_heads, n_kv_heads=n_kv)]
            expected = own.clone()
            expected[..., group, :] *= -1
            found, *_ = _turned(model, layer, ids, head_slices(model, [(layer, head)], unit="KV group"))
            _agree(model, found, expected, f"the weights of the group of head {head} in layer {layer}")
            found, *still = _turned(model, layer, ids, head_slices(model, [(layer, head)]))
            others = [h for h in range(parts.n_heads) if h != head]
            _agree(model, found[..., others, :], own[..., others, :], f"heads beside head {head} of layer {layer}")
            for before, after in zip(cached, still, strict=True):
                _agree(
                    model, after, before, f"keys and values beside the query weights of head {head} in layer {layer}"
                )
            if torch.equal(found[..., head, :], own[..., head, :]):
                raise ModelError(f"the query weights of head {head} in layer {layer} do not change it")


def _turned(model: PreTrainedModel, layer: int, ids: Tensor, masks: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Head outputs, keys and values of a layer when the marked entries but the output matrix have the other sign."""
    parts, kept = anatomy(model), {}
    names, output = {id(parameter): name for name, parameter in model.named_parameters()}, parts.outputs[layer]
    turned = {
        name: torch.where(mask, -model.get_parameter(name), model.get_parameter(name))
        for name, mask in masks.items()
        if name != names[id(output.weight)]
    }
    cache = DynamicCache(config=model.config)
    with reading([output], kept):
        functional_call(model, turned, (), {"input_ids": ids, "past_key_values": cache, "logits_to_keep": 1})
    return kept[0].unflatten(-1, (parts.n_heads, -1)), cache.layers[layer].keys, cache.layers[layer].values


def _compare_maps(model: PreTrainedModel, prompts: list[list[int]]) -> None:
    parts = anatomy(model)
    with eager(model):
        shared = generation.reusable_prefix(model, prompts)
        cache, _ = generation.run_prefix(model, shared, output_attentions=True)
        own = [prompt[len(shared) :] for prompt in prompts]
        inputs = padded_inputs(own, pad_id=0, device=model.device, n_cached=len(shared))
        inputs |= {"past_key_values": generation.repeated(cache, len(prompts)), "output_attentions": True}
        maps = model.base_model(**inputs, use_cache=True).attentions
        for row, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=model.device)
            alone = model.base_model(input_ids=ids, use_cache=False, output_attentions=True).attentions
            shapes = [one is not None and tuple(one.shape) for one in alone]
            if shapes != [(1, parts.n_heads, len(prompt), len(prompt))] * len(parts.layers):
                raise ModelError("it does not return one attention map for every head")
            real = inputs["attention_mask"][row].bool()
            for layer, (batch, single) in enumerate(zip(maps, alone, strict=True)):
                _agree(
                    model,
                    batch[row, :, -1][:, real],
                    single[0, :, -1],
                    f"attention of layer {layer} in a batch and alone",
                )
                total = single.sum(-1)
                if not (single.min() >= 0 and total.max() <= 1.01 and single.triu(1).abs().max() == 0):
                    raise ModelError(f"attention maps of layer {layer} are no shares of earlier tokens")


CHECKS: dict[str, Callable[[PreTrainedModel, list[list[int]]], None]] = {
    "generate": _generate,
    "train": _train,
    "attribute": _attribute,
    "components": partial(_stream, vectors={}),
    "steer": _steer,
    "slice": _slice,
    "compare maps": _compare_maps,
}
