"""The identities by which `self_test` finds out what a model can do: each holds if the model's parts were found."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import peft
import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module
from transformers import DynamicCache, PreTrainedModel

from bkd_utils.models import generation
from bkd_utils.models.compute import eager, mixed_precision
from bkd_utils.models.encoders import is_encoder, prompt_inputs
from bkd_utils.models.folders import ModelError
from bkd_utils.models.head_weights import groups, head_slices, n_kv_heads
from bkd_utils.models.hooks import LAST, added, anatomy, contributions, editing, reading, tracing
from bkd_utils.models.lora import lora_config
from bkd_utils.models.loss import answer_loss, answers, collate
from bkd_utils.models.prompt_cache import Past, forward, prompt_past
from bkd_utils.models.tokens import Row

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
    ((order, first, cache, mask),) = generation.started(model, prompts, pad_id=0, batch_size=2)
    case.agree(first, case.alone[order, 0], "prompts in a batch and alone")
    mask, new = torch.cat([mask, mask.new_ones(2, 1)], dim=1), torch.tensor([[prompts[i][0]] for i in order])
    second = generation.next_logits(model, new.to(model.device), mask, cache)
    case.agree(second, case.alone[order, 1], "a token after a key-value cache and without one")


@contextmanager
def _learning(model: PreTrainedModel) -> Iterator[Module]:
    """While this lasts, what training changes has gradients: adapters with random weights, or an encoder as a whole."""
    before, wrapped = {parameter: parameter.requires_grad for parameter in model.parameters()}, model
    if is_encoder(model):
        model.requires_grad_(True)
    else:
        config = lora_config(model, rank=1, alpha=1)
        config.init_lora_weights = False  # random, as zeros would have no gradient
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers in a way that is to change
            wrapped = peft.get_peft_model(model, config)
    try:
        yield wrapped
    finally:
        if wrapped is not model:
            wrapped.unload()
            vars(model).pop("peft_config", None)
        for parameter, learns in before.items():
            parameter.requires_grad_(learns)


def train(case: Case) -> None:
    model, labels = case.model, is_encoder(case.model)
    given = [(tuple(prompt), (n - 1,) if labels else tuple(prompt[:n])) for n, prompt in enumerate(case.prompts, 1)]
    rows = [Row(*one, "clean", str(one[1]), is_label=labels) for one in given]
    batch, *singles = (collate(some, pad_id=0, device=model.device) for some in (rows, *([row] for row in rows)))
    # Training is in eager attention and, where that is fast, in bf16; answers are given in neither.
    with _learning(model) as wrapped, torch.enable_grad(), eager(model):
        learning = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
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


def attribute(case: Case) -> None:
    parts, past = anatomy(case.model), case.past
    with reading(parts.layers) as inputs, reading(parts.outputs) as z, reading(parts.outputs, what="output") as outputs:
        logits = case.answered(past)
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
    with tracing(parts.outputs) as kept:
        torch.autograd.grad(case.answered(case.past).sum(), list(kept.values()))


def _stream(case: Case, vectors: Mapping[int, Tensor]) -> None:
    """In every layer, input, vector and what attention and feed-forward part write are the input of the next layer."""
    parts, past = anatomy(case.model), case.past
    with (
        reading(parts.layers) as stream,
        reading(parts.attentions) as read,
        reading(parts.writers, what="output") as attention,  # before `added`, so without the vectors
        added(case.model, vectors, at=LAST),
        reading(parts.mlp_writers, what="output") as mlp,
        reading(parts.layers, what="output") as after,
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
    with reading(anatomy(case.model).layers) as stream:
        case.answered(case.past)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(len(stream), stream[0].shape[-1], generator=generator).to(stream[0])
    _stream(case, {layer: hidden.float().std().to(noise) * noise[layer] for layer, hidden in stream.items()})


def own_weights(case: Case) -> None:
    """With the signs of a group's query, key and value weights turned, only its heads change, and only their signs.
    Query weights alone change one head, and no key or value; in an encoder, which keeps none, no head at other tokens
    than those of the queries."""
    model, parts = case.model, anatomy(case.model)
    for layer in {0, len(parts.layers) - 1}:
        n_kv = n_kv_heads(parts, layer)
        own, *cached = _turned(case, layer, {})
        for head in {0, parts.n_heads - 1}:
            group = [h for _, h in groups([(layer, head)], n_heads=parts.n_heads, n_kv_heads=n_kv)]
            expected = own.clone()
            expected[..., group, :] *= -1
            found, *_ = _turned(case, layer, head_slices(model, [(layer, head)], unit="KV group"))
            case.agree(found, expected, f"the weights of the group of head {head} in layer {layer}")
            masks = head_slices(model, [(layer, head)])
            found, *still = _turned(case, layer, masks)
            others = [h for h in range(parts.n_heads) if h != head]
            case.agree(found[..., others, :], own[..., others, :], f"heads beside head {head} of layer {layer}")
            what = f"keys and values beside the query weights of head {head} in layer {layer}"
            for before, after in zip(cached, still, strict=True):
                case.agree(after, before, what)
            if torch.equal(found[..., head, :], own[..., head, :]):
                raise ModelError(f"the query weights of head {head} in layer {layer} do not change it")
        if not cached:
            modules = {model.get_submodule(name.rpartition(".")[0]) for name in masks} - {parts.outputs[layer]}
            with editing([*modules], lambda _, made: torch.cat([-made[:, :1], made[:, 1:]], dim=1), what="output"):
                found, *_ = _turned(case, layer, {})
            case.agree(found[:, 1:], own[:, 1:], f"heads of layer {layer} beside the token whose queries are turned")


def _turned(case: Case, layer: int, masks: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Head outputs of a layer, and keys and values where a model caches them, when the marked entries but those of the
    output matrix have the other sign."""
    model, parts = case.model, anatomy(case.model)
    output = next(name for name, one in model.named_parameters() if one is parts.outputs[layer].weight)
    turned = {name: model.get_parameter(name) * (1 - 2 * mask.int()) for name, mask in masks.items() if name != output}
    inputs, cache = prompt_inputs(model, case.prompts[:1], pad_id=0), None
    if not is_encoder(model):
        cache = DynamicCache(config=model.config)
        inputs |= {"past_key_values": cache, "logits_to_keep": 1}
    behind = parts.layers[layer + 1 : layer + 2]
    with reading([parts.outputs[layer]]) as kept, editing(behind, _stop), suppress(_Reached):
        functional_call(model, turned, (), inputs)
    heads = kept[0].unflatten(-1, (parts.n_heads, -1))
    return (heads, cache.layers[layer].keys, cache.layers[layer].values) if cache else (heads,)


def compare_maps(case: Case) -> None:
    model, prompts, parts = case.model, case.prompts, anatomy(case.model)
    causal, asked = not is_encoder(model), {"output_attentions": True}
    with eager(model):
        prefix, _ = generation.run_prefix(model, generation.reusable_prefix(model, prompts), **asked)
        shared, inputs = prefix.get_seq_length(), generation.inputs_after(model, prefix, prompts)
        maps = model.base_model(**inputs, **asked).attentions
        for row, prompt in enumerate(prompts):
            alone = model.base_model(**prompt_inputs(model, [prompt], pad_id=0), **asked).attentions
            shapes = [one is not None and tuple(one.shape) for one in alone]
            if shapes != [(1, parts.n_heads, len(prompt), len(prompt))] * len(parts.layers):
                raise ModelError("it does not return one attention map for every head")
            real = inputs["attention_mask"][row].bool()
            for layer, (batch, single) in enumerate(zip(maps, alone, strict=True)):
                found, total = batch[row][:, real[shared:]][..., real], single.sum(-1)
                case.agree(found, single[0][:, shared:], f"attention of layer {layer} in a batch and alone")
                shares = single.min() >= 0 and total.max() <= 1.01 and (causal or total.min() >= 0.99)
                if not (shares and causal == bool(single.triu(1).abs().max() == 0)):
                    tokens = "earlier" if causal else "all"
                    raise ModelError(f"attention maps of layer {layer} are no shares of {tokens} tokens")


CHECKS: dict[str, Callable[[Case], None]] = {"generate": _generate, "train": train, "attribute": attribute}
CHECKS |= {"components": partial(_stream, vectors={}), "steer": _steer}
CHECKS |= {"slice": own_weights, "compare maps": compare_maps}
