"""The identities by which `self_test` finds out what a model can do: each holds if the model's parts were found."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
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


@dataclass
class Case:
    """A model with two prompts of random tokens, which share a beginning and differ in length."""

    model: PreTrainedModel

    @cached_property
    def prompts(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, len(self.model.get_input_embeddings().weight), (2, 9), generator=generator)
        ids[1, :3] = ids[0, :3]
        return [ids[0, :7].tolist(), ids[1].tolist()]

    @cached_property
    def alone(self) -> Float[Tensor, "prompt 2 vocab"]:
        """Logits at the last prompt token and at an answer token, of one row by itself, without padding or cache."""
        return torch.stack([_logits(self.model, [*prompt, prompt[0]]) for prompt in self.prompts])

    @cached_property
    def past(self) -> Past:
        past = prompt_past(self.model, self.prompts)
        self.agree(self.answered(past), self.alone, "a prompt after its key-value cache and alone")
        return past

    def answered(self, past: Past, repeats: int = 1, **start: Any) -> Float[Tensor, "row 2 vocab"]:
        """Logits at the same tokens behind a past, with rows in a batch."""
        answer = torch.tensor([prompt[:2] for prompt in self.prompts], device=self.model.device)
        return forward(self.model, past, past.rows(answer.repeat_interleave(repeats, dim=0)), **start)

    def agree(self, found: Tensor, expected: Tensor, what: str) -> None:
        off = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp_min(1e-30)
        # `not <=` so that NaN fails, too.
        if not off <= LIMITS[self.model.dtype]:
            raise ModelError(f"{what}: off by {off:.2g} of the largest value")


def _logits(model: PreTrainedModel, ids: Sequence[int]) -> Float[Tensor, "2 vocab"]:
    return model(input_ids=torch.tensor([list(ids)], device=model.device), logits_to_keep=2).logits[0]


def _generate(case: Case) -> None:
    model, prompts = case.model, case.prompts
    with eager(model):
        found = _logits(model, [*prompts[1], prompts[1][0]])
    case.agree(found, case.alone[1], "fused and eager attention of transformers")
    shared = generation.reusable_prefix(model, prompts)
    cache = generation.repeated(generation.run_prefix(model, shared)[0], len(prompts))
    own = [prompt[len(shared) :] for prompt in prompts]
    inputs = padded_inputs(own, pad_id=0, device=model.device, n_cached=len(shared))
    mask = inputs["attention_mask"]
    first = generation.next_logits(model, inputs["input_ids"], mask, cache)
    case.agree(first, case.alone[:, 0], "prompts in a batch and alone")
    mask, new = torch.cat([mask, mask[:, :1] * 0 + 1], dim=1), torch.tensor([[prompt[0]] for prompt in prompts])
    second = generation.next_logits(model, new.to(model.device), mask, cache)
    case.agree(second, case.alone[:, 1], "a token after a key-value cache and without one")


def _train(case: Case) -> None:
    model, prompts = case.model, case.prompts
    rows = [Row(tuple(prompt), tuple(prompt[:n]), "clean", str(n)) for n, prompt in enumerate(prompts, start=1)]
    batch, *singles = (
        {name: tensor.to(model.device) for name, tensor in collate(some, pad_id=0).items()}
        for some in (rows, *([row] for row in rows))
    )
    config = lora_config(model, rank=1, alpha=1)
    config.init_lora_weights = False  # random, as zeros would have no gradient
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in a way that is to change
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
                answer_loss(wrapped, singles[0], first_token=0.0)
        case.agree(found, alone, "the loss of answers in a batch and alone")
        both = [(slope, other) for slope, other in zip(slopes, expected, strict=True) if other is not None]
        flat = [torch.cat([slope.flatten() for slope in side]) for side in zip(*both, strict=True)]
        case.agree(*flat, "the gradient of a batch and of its rows alone")
    finally:
        wrapped.unload()
        model.requires_grad_(False)
        for parameter in frozen:
            parameter.requires_grad_(True)
        vars(model).pop("peft_config", None)


class _Reached(Exception):
    """A pass has come to the layer whose input was asked for."""


def _stop(_: int, stream: Tensor) -> Tensor:
    raise _Reached(stream)


def _from(case: Case, layer: int, hidden: Tensor) -> Tensor:
    """Of a pass that begins at a layer, with two rows a prompt: the stream two layers on, or logits at the end."""
    layers, repeats = anatomy(case.model).layers, len(hidden) // len(case.prompts)
    with editing(layers[layer + 2 : layer + 3], _stop):
        try:
            return case.answered(case.past, repeats, layer=layer, hidden=hidden)
        except _Reached as reached:
            return reached.args[0]


def _attribute(case: Case) -> None:
    parts, inputs, z, outputs = anatomy(case.model), {}, {}, {}
    with reading(parts.layers, inputs), reading(parts.outputs, z), reading(parts.outputs, outputs, what="output"):
        logits = case.answered(case.past)
    for layer, module in enumerate(parts.outputs):
        own = z[layer].unflatten(-1, (parts.n_heads, -1))
        if parts.writers[layer] is module:
            products = contributions(parts, layer, range(parts.n_heads), own)
            summed = products.sum(-2) + parts.scale * module(torch.zeros_like(z[layer]))
            what = f"the sum of heads and the attention output of layer {layer}"
            case.agree(summed, parts.scale * outputs[layer], what)
        # Of two rows of every prompt, heads have what they had in the first and are silent in the second.
        patch = torch.stack([z[layer], torch.zeros_like(z[layer])], dim=1).flatten(0, 1)
        with editing([module], lambda _, __, patch=patch: patch):
            found = _from(case, layer, inputs[layer].repeat_interleave(2, dim=0))
        whole = inputs.get(layer + 2, logits)
        case.agree(found[::2], whole, f"a pass from layer {layer} on, with heads' own outputs, and a whole pass")
        if not (found[1::2] - whole).abs().max() > 1e-6:
            raise ModelError(f"heads of layer {layer} have no effect: hooks do not reach the model")
    middle = max(1, len(inputs) // 2)
    if middle in inputs:  # from there to the end, with nothing edited
        found = case.answered(case.past, layer=middle, hidden=inputs[middle])
        case.agree(found, logits, f"a pass from layer {middle} on and a whole pass")
    kept: dict[int, Tensor] = {}
    with tracing(parts.outputs, kept):
        torch.autograd.grad(case.answered(case.past).sum(), list(kept.values()))


def _stream(case: Case, vectors: Mapping[int, Tensor]) -> None:
    """In every layer, input, vector and what attention and feed-forward part write are the input of the next layer."""
    parts, past = anatomy(case.model), case.past
    stream, read, attention, mlp, after = {}, {}, {}, {}, {}
    with (
        reading(parts.layers, stream),
        reading(parts.attentions, read),
        reading(parts.writers, attention, what="output"),  # before `added`, so without the vectors
        added(case.model, vectors, at=LAST),
        reading(parts.mlp_writers, mlp, what="output"),
        reading(parts.layers, after, what="output"),
    ):
        case.answered(past)
    for layer, norm in enumerate(parts.norms):
        case.agree(read[layer], norm(stream[layer]), f"the norm of layer {layer} and what its attention reads")
        gained = parts.scale * (attention[layer] + mlp[layer].view_as(attention[layer]))
        if layer in vectors:
            gained[:, LAST] += vectors[layer]
        case.agree(after[layer], stream[layer] + gained, f"what the parts of layer {layer} write and the stream gains")
        if layer + 1 in stream:
            case.agree(stream[layer + 1], after[layer], f"the stream after layer {layer} and before the next")


def _steer(case: Case) -> None:
    parts, stream = anatomy(case.model), {}
    with reading(parts.layers, stream):
        case.answered(case.past)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(stream), stream[0].shape[-1], generator=generator).to(stream[0])
    _stream(case, {layer: hidden.float().std().to(noise) * noise[layer] for layer, hidden in stream.items()})


def _slice(case: Case) -> None:
    """With the signs of a group's query, key and value weights turned, only its heads change, and only their signs.
    Query weights alone change one head, and no key or value."""
    model, parts = case.model, anatomy(case.model)
    ids = torch.tensor(case.prompts[:1], device=model.device)
    for layer in {0, len(parts.layers) - 1}:
        n_kv = n_kv_heads(parts, layer)
        own, *cached = _turned(model, layer, ids, {})
        for head in {0, parts.n_heads - 1}:
            group = [h for _, h in groups([(layer, head)], n_heads=parts.n_heads, n_kv_heads=n_kv)]
            expected = own.clone()
            expected[..., group, :] *= -1
            found, *_ = _turned(model, layer, ids, head_slices(model, [(layer, head)], unit="KV group"))
            case.agree(found, expected, f"the weights of the group of head {head} in layer {layer}")
            found, *still = _turned(model, layer, ids, head_slices(model, [(layer, head)]))
            others = [h for h in range(parts.n_heads) if h != head]
            case.agree(found[..., others, :], own[..., others, :], f"heads beside head {head} of layer {layer}")
            for before, after in zip(cached, still, strict=True):
                what = f"keys and values beside the query weights of head {head} in layer {layer}"
                case.agree(after, before, what)
            if torch.equal(found[..., head, :], own[..., head, :]):
                raise ModelError(f"the query weights of head {head} in layer {layer} do not change it")


def turned_weights(model: PreTrainedModel, layer: int, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Name -> a parameter whose marked entries have the other sign, but for the output matrix of the layer."""
    output = next(name for name, one in model.named_parameters() if one is anatomy(model).outputs[layer].weight)
    return {name: model.get_parameter(name) * (1 - 2 * mask.int()) for name, mask in masks.items() if name != output}


def _turned(model: PreTrainedModel, layer: int, ids: Tensor, masks: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Head outputs, keys and values of a layer when the marked entries but the output matrix have the other sign."""
    parts, kept = anatomy(model), {}
    turned, cache = turned_weights(model, layer, masks), DynamicCache(config=model.config)
    with reading([parts.outputs[layer]], kept), editing(parts.layers[layer + 1 : layer + 2], _stop), suppress(_Reached):
        functional_call(model, turned, (), {"input_ids": ids, "past_key_values": cache, "logits_to_keep": 1})
    return kept[0].unflatten(-1, (parts.n_heads, -1)), cache.layers[layer].keys, cache.layers[layer].values


def _compare_maps(case: Case) -> None:
    model, prompts, parts = case.model, case.prompts, anatomy(case.model)
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
                found, total = batch[row, :, -1][:, real], single.sum(-1)
                case.agree(found, single[0, :, -1], f"attention of layer {layer} in a batch and alone")
                if not (single.min() >= 0 and total.max() <= 1.01 and single.triu(1).abs().max() == 0):
                    raise ModelError(f"attention maps of layer {layer} are no shares of earlier tokens")


CHECKS: dict[str, Callable[[Case], None]] = {"generate": _generate, "train": _train, "attribute": _attribute}
CHECKS |= {"components": partial(_stream, vectors={}), "steer": _steer, "slice": _slice, "compare maps": _compare_maps}
