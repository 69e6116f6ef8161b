"""The parts of a model, and hooks that read, trace or change them while the model runs.

Edits are context managers. They act on head outputs (`hook_z` in TransformerLens), attention outputs or the residual
stream, at the token positions `at` of every forward pass inside them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager as Context
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module

from bkd_utils.models.folders import ModelError

# Names of the layers, and of the parts of one, in the model families of transformers.
LAYERS = ("model.layers", "transformer.h", "gpt_neox.layers")
PARTS = {
    "norms": ("input_layernorm", "ln_1"),
    "attentions": ("self_attn", "attn", "attention"),
    "outputs": ("self_attn.o_proj", "attn.c_proj", "attention.dense"),
    "mlps": ("mlp",),
}
Head = tuple[int, int]
LAST = slice(0, 1)  # the last prompt token is the first token that runs after a prompt's key-value cache
EVERYWHERE = slice(None)


@dataclass(frozen=True)
class Anatomy:
    """The modules of a transformers model that are read and edited, one of each per layer."""

    owner: Module
    attribute: str
    layers: tuple[Module, ...]
    norms: tuple[Module, ...]
    attentions: tuple[Module, ...]
    outputs: tuple[Module, ...]  # output matrices of attention; their input is all head outputs, one behind the other
    mlps: tuple[Module, ...]
    n_heads: int


def anatomy(model: Module) -> Anatomy:
    """Find the parts of a model. Raises ModelError, with the model type, for an architecture that is not known."""
    for path in LAYERS:
        owner, _, attribute = path.rpartition(".")
        try:
            parent = model.get_submodule(owner)
            layers = tuple(getattr(parent, attribute))
        except AttributeError:
            continue
        parts = {part: _in_each(layers, names) for part, names in PARTS.items()}
        if all(parts.values()):
            return Anatomy(parent, attribute, layers, n_heads=model.config.num_attention_heads, **parts)
    raise ModelError(f"a model of type {model.config.model_type!r} has none of the layer names known here")


def _in_each(layers: tuple[Module, ...], names: Sequence[str]) -> tuple[Module, ...]:
    for name in names:
        try:
            return tuple(layer.get_submodule(name) for layer in layers)
        except AttributeError:
            continue
    return ()


@contextmanager
def editing(
    modules: Sequence[Module], change: Callable[[int, Tensor], Tensor], *, what: str = "input"
) -> Iterator[None]:
    """While this lasts, `change(i, tensor)` replaces the first input, or the output (`what="output"`), of module i."""

    def before(i: int, _module: Module, arguments: tuple, keywords: dict) -> tuple[tuple, dict]:
        if arguments:
            return (change(i, arguments[0]), *arguments[1:]), keywords
        return arguments, keywords | {"hidden_states": change(i, keywords["hidden_states"])}

    def after(i: int, _module: Module, _arguments: tuple, output: Tensor | tuple) -> Tensor | tuple:
        return (change(i, output[0]), *output[1:]) if isinstance(output, tuple) else change(i, output)

    with ExitStack() as stack:
        for i, module in enumerate(modules):
            if what == "input":
                stack.enter_context(module.register_forward_pre_hook(partial(before, i), with_kwargs=True))
            else:
                stack.enter_context(module.register_forward_hook(partial(after, i)))
        yield


@contextmanager
def tracing(modules: Sequence[Module], kept: dict[int, Tensor]) -> Iterator[None]:
    """`reading` of inputs, with gradients. Weights are frozen, so the autograd graph starts at the first module."""

    def follow(i: int, tensor: Tensor) -> Tensor:
        kept[i] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return kept[i]

    with torch.enable_grad(), editing(modules, follow):
        yield


def reading(modules: Sequence[Module], kept: dict[int, Tensor], *, what: str = "input") -> Context:
    """While this lasts, `kept[i]` is the latest first input (or output) of every module i that ran."""

    def keep(i: int, tensor: Tensor) -> Tensor:
        kept[i] = tensor
        return tensor

    return editing(modules, keep, what=what)


def head_edit(model: Module, heads: Sequence[Head], change: Callable[[int, Tensor], Tensor], *, at: slice) -> Context:
    """While this lasts, `change(layer, z)` replaces the outputs `z` `[row, pos, chosen head, d_head]` at tokens `at`.

    The chosen heads of a layer come in ascending order. Raises what `by_layer` raises.
    """
    parts = anatomy(model)
    chosen = by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)
    layers = list(chosen)

    def edit(i: int, z: Tensor) -> Tensor:
        z, own = z.clone(), chosen[layers[i]]
        view = z.view(*z.shape[:-1], parts.n_heads, -1)
        view[:, at, own] = change(layers[i], view[:, at, own]).to(z.dtype)
        return z

    return editing([parts.outputs[layer] for layer in layers], edit)


def by_layer(heads: Sequence[Head], *, n_layers: int, n_heads: int) -> dict[int, list[int]]:
    """layer -> its chosen heads in ascending order. Raises ValueError for unknown and for repeated heads."""
    found: dict[int, list[int]] = {}
    for layer, head in sorted(heads):
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(f"no head {head} in layer {layer}: the model has {n_layers} layers of {n_heads} heads")
        if head in found.setdefault(layer, []):
            raise ValueError(f"head {layer, head} is named twice")
        found[layer].append(head)
    return found


def added(model: Module, vectors: Mapping[int, Float[Tensor, "... d_model"]], *, at: slice) -> Context:
    """While this lasts, `vectors[l]` is added to the attention output of layer l at the tokens `at`."""
    parts, layers = anatomy(model), list(vectors)

    def add(i: int, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, at] += vectors[layers[i]].to(output).unsqueeze(-2)
        return output

    return editing([parts.outputs[layer] for layer in layers], add, what="output")


def contributions(
    parts: Anatomy, layer: int, heads: Sequence[int], z: Float[Tensor, "... head d_head"]
) -> Float[Tensor, "... head d_model"]:
    """Contribution of heads of a layer to the residual stream: `z` times each head's slice of the output matrix."""
    full = z.new_zeros(*z.shape[:-1], parts.n_heads, z.shape[-1])
    for row, head in enumerate(heads):
        full[..., row, head, :] = z[..., row, :]
    module = parts.outputs[layer]
    return module(full.flatten(-2)) - module(torch.zeros_like(full[..., :1, :, :].flatten(-2)))


def projected_out(model: Module, directions: Mapping[int, Float[Tensor, " d_model"]], *, at: slice) -> Context:
    """While this lasts, `directions[l]` is projected out of the residual stream after layer l at the tokens `at`."""
    parts, layers = anatomy(model), list(directions)
    units = {layer: direction / direction.norm() for layer, direction in directions.items()}

    def remove(i: int, output: Tensor) -> Tensor:
        output, unit = output.clone(), units[layers[i]].to(output)
        output[:, at] -= (output[:, at] @ unit)[..., None] * unit
        return output

    return editing([parts.layers[layer] for layer in layers], remove, what="output")
