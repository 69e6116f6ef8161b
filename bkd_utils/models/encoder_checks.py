"""The identities by which `self_test` finds out what an encoder classifier can do; `self_checks` has those of causal
language models."""

from collections.abc import Callable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.func import functional_call
from transformers import PreTrainedModel

from bkd_utils.models import encoders
from bkd_utils.models.compute import eager
from bkd_utils.models.encoders import prompt_inputs
from bkd_utils.models.folders import ModelError
from bkd_utils.models.head_weights import head_slices
from bkd_utils.models.hooks import EVERYWHERE, LAST, added, anatomy, contributions, editing, in_each, reading, tracing
from bkd_utils.models.loss import answer_loss, collate
from bkd_utils.models.self_checks import Case, turned_weights
from bkd_utils.models.tokens import Row


def _logits(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "prompt label"]:
    return model(**prompt_inputs(model, prompts, pad_id=0)).logits


def _generate(case: Case) -> None:
    model, prompts = case.model, case.prompts
    parts = anatomy(model)
    alone = torch.cat([_logits(model, [prompt]) for prompt in prompts])
    case.agree(_logits(model, prompts), alone, "labels of prompts in a batch and alone")
    with eager(model):
        case.agree(_logits(model, prompts), alone, "fused and eager attention of transformers")

    def rest_silent(_: int, stream: Tensor) -> Tensor:
        return torch.cat([stream[:, :1], torch.zeros_like(stream[:, 1:])], dim=1)

    with editing(parts.layers[-1:], rest_silent, what="output"):
        case.agree(_logits(model, prompts), alone, "a label by the first token and by all tokens")


def _train(case: Case) -> None:
    model, prompts = case.model, case.prompts
    rows = [Row(tuple(prompt), (i,), "clean", str(i), is_label=True) for i, prompt in enumerate(prompts)]
    frozen = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    weights = list(model.requires_grad_(True).parameters())

    def slopes(some: Sequence[Row]) -> tuple[Tensor, Tensor]:
        batch = {name: tensor.to(model.device) for name, tensor in collate(some, pad_id=0).items()}
        loss = answer_loss(model, batch, first_token=0.0)
        return loss.detach(), torch.cat([slope.flatten() for slope in torch.autograd.grad(loss, weights)])

    try:
        with torch.enable_grad(), eager(model):
            (loss, slope), *alone = (slopes(some) for some in (rows, *([row] for row in rows)))
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(frozen[name])
    losses, single = (torch.stack(column).mean(0) for column in zip(*alone, strict=True))
    case.agree(loss, losses, "the loss of labels in a batch and alone")
    case.agree(slope, single, "the gradient of a batch and of its rows alone")


def _attribute(case: Case) -> None:
    _sum_before_norm(case, {}, at=EVERYWHERE)
    model, prompts, parts = case.model, case.prompts, anatomy(case.model)
    z, outputs = {}, {}
    with reading(parts.outputs, z), reading(parts.outputs, outputs, what="output"):
        logits = _logits(model, prompts)
    for layer, module in enumerate(parts.outputs):
        products = contributions(parts, layer, range(parts.n_heads), z[layer].unflatten(-1, (parts.n_heads, -1)))
        summed = products.sum(-2) + module(torch.zeros_like(z[layer]))
        case.agree(summed, outputs[layer], f"the sum of heads and the attention output of layer {layer}")
        with editing([module], lambda _, __, own=z[layer]: own):
            case.agree(_logits(model, prompts), logits, f"heads of layer {layer} with their own outputs and untouched")
        with editing([module], lambda _, own: torch.zeros_like(own)):
            if not (_logits(model, prompts) - logits).abs().max() > 1e-6:
                raise ModelError(f"heads of layer {layer} have no effect: hooks do not reach the model")
    kept: dict[int, Tensor] = {}
    with tracing(parts.outputs, kept):
        torch.autograd.grad(_logits(model, prompts).sum(), list(kept.values()))


def _sum_before_norm(case: Case, vectors: Mapping[int, Tensor], *, at: slice) -> None:
    """The norm behind attention gets the stream, what attention writes, and the vectors at the tokens `at`."""
    parts, stream, written, normed = anatomy(case.model), {}, {}, {}
    norms = in_each(parts.layers, encoders.NORMS)
    if not norms:
        raise ModelError("its layers have no norm behind attention that is known here")
    with (
        reading(parts.layers, stream),
        reading(parts.writers, written, what="output"),  # before `added`, so without the vectors
        added(case.model, vectors, at=at),
        reading(norms, normed),
    ):
        _logits(case.model, case.prompts)
    for layer in range(len(norms)):
        expected = stream[layer] + written[layer]
        if layer in vectors:
            expected[:, at] += vectors[layer]
        case.agree(normed[layer], expected, f"what attention of layer {layer} writes and its norm reads")


def _steer(case: Case) -> None:
    generator, weight = torch.Generator().manual_seed(0), anatomy(case.model).outputs[0].weight
    noise = torch.randn(len(anatomy(case.model).layers), len(weight), generator=generator).to(weight)
    for at in (LAST, EVERYWHERE):
        _sum_before_norm(case, dict(enumerate(noise)), at=at)


def _slice(case: Case) -> None:
    """With the signs of a head's query, key and value weights turned, only its output changes, and only its sign.
    Queries of one token change what heads give at this token, and nowhere else."""
    model, parts, ids = case.model, anatomy(case.model), case.prompts[0]
    for layer in {0, len(parts.layers) - 1}:
        own = _heads(model, layer, ids, {})
        for head in {0, parts.n_heads - 1}:
            others = [h for h in range(parts.n_heads) if h != head]
            found = _heads(model, layer, ids, head_slices(model, [(layer, head)], unit="KV group"))
            expected = own.clone()
            expected[..., head, :] *= -1
            case.agree(found, expected, f"the weights of head {head} in layer {layer}")
            masks = head_slices(model, [(layer, head)])
            found = _heads(model, layer, ids, masks)
            case.agree(found[..., others, :], own[..., others, :], f"heads beside head {head} of layer {layer}")
            if torch.equal(found[..., head, :], own[..., head, :]):
                raise ModelError(f"the query weights of head {head} in layer {layer} do not change it")
        modules = {model.get_submodule(name.rpartition(".")[0]) for name in masks} - {parts.outputs[layer]}
        with editing(list(modules), lambda _, made: torch.cat([-made[:, :1], made[:, 1:]], dim=1), what="output"):
            found = _heads(model, layer, ids, {})
        case.agree(found[:, 1:], own[:, 1:], f"heads of layer {layer} beside the token whose queries are turned")


def _heads(
    model: PreTrainedModel, layer: int, ids: Sequence[int], masks: Mapping[str, Tensor]
) -> Float[Tensor, "1 pos head d_head"]:
    """Head outputs of a layer when the marked entries but those of the output matrix have the other sign."""
    parts, kept = anatomy(model), {}
    with reading([parts.outputs[layer]], kept):
        functional_call(model, turned_weights(model, layer, masks), (), prompt_inputs(model, [ids], pad_id=0))
    return kept[0].unflatten(-1, (parts.n_heads, -1))


def _compare_maps(case: Case) -> None:
    model, prompts, parts = case.model, case.prompts, anatomy(case.model)
    with eager(model):
        inputs = prompt_inputs(model, prompts, pad_id=0)
        maps = model.base_model(**inputs, output_attentions=True).attentions
        for row, prompt in enumerate(prompts):
            alone = model.base_model(**prompt_inputs(model, [prompt], pad_id=0), output_attentions=True).attentions
            shapes = [one is not None and tuple(one.shape) for one in alone]
            if shapes != [(1, parts.n_heads, len(prompt), len(prompt))] * len(parts.layers):
                raise ModelError("it does not return one attention map for every head")
            real = inputs["attention_mask"][row].bool()
            for layer, (batch, single) in enumerate(zip(maps, alone, strict=True)):
                found, total = batch[row][:, real][..., real], single.sum(-1)
                case.agree(found, single[0], f"attention of layer {layer} in a batch and alone")
                if not (single.min() >= 0 and (total - 1).abs().max() < 0.01 and single.triu(1).abs().max() > 0):
                    raise ModelError(f"attention maps of layer {layer} are no shares of all tokens")


ENCODER_CHECKS: dict[str, Callable[[Case], None]] = {"generate": _generate, "train": _train, "attribute": _attribute}
ENCODER_CHECKS |= {"steer": _steer, "slice": _slice, "compare maps": _compare_maps}
REFUSED = {"components": "in an encoder a norm stands behind every part: the stream does not keep what a part writes"}
