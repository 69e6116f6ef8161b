"""The parts of a model, and hooks that read, trace or change them while the model runs.

Edits are context managers. They act on head outputs (`hook_z` in TransformerLens), attention outputs or the residual
stream, at the token positions `at` of every forward pass inside them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager as Context
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Identity, Module, ModuleList

from bkd_utils.models import encoders
from bkd_utils.models.folders import ModelError

# Names of the list of layers in a decoder, and of the parts of a layer, in the model families of transformers.
LAYERS = ("layers", "h", "blocks")
ATTENTIONS = ("self_attn", "attn.attention", "attn", "attention", "self_attention", "norm_attn_norm.attn")
OUTPUTS = ("o_proj", "c_proj", "out_proj", "dense")
PARTS = {
    "attentions": ATTENTIONS,
    "outputs": tuple(f"{attention}.{output}" for attention in ATTENTIONS for output in OUTPUTS),
    # In some families the whole feed-forward module adds the residual stream, and its last matrix does not.
    "mlps": ("mlp.dense_4h_to_h", "ffn.down_proj", "mlp", "feed_forward", "block_sparse_moe", "ffn", "fc2"),
}
NORMS = ("input_layernorm", "ln_1", "ln_attn", "attention_layernorm", "self_attn_layer_norm", "norm_1")
NORMS += ("norm_attn_norm.norm_1",)
# Norms behind a part, whose output is what the residual stream gains. In families without a norm in front of the
# feed-forward part, `post_attention_layernorm` is that norm instead.
BEHIND_ATTENTION = ("post_self_attn_layernorm", "post_attention_layernorm")
BEHIND_MLP = ("post_mlp_layernorm", "post_feedforward_layernorm")
MULTIPLIERS = ("residual_multiplier", "residual_scale")
Head = tuple[int, int]
# The last prompt token, which is the first that runs after a prompt's key-value cache; [CLS] in a pass of an encoder.
LAST = slice(0, 1)
EVERYWHERE = slice(None)


@dataclass(frozen=True)
class Anatomy:
    """The modules of a transformers model that are read and edited, one of each per layer. `writers` are the modules
    whose outputs, times `scale`, the residual stream gains from attention; `mlp_writers` are those of the feed-forward
    part. They differ from `outputs` and `mlps` where a norm follows. In an encoder the norm follows behind the sum of
    both, so the stream gains the outputs of `outputs` and `mlps` before it is normed."""

    owner: Module
    attribute: str
    layers: tuple[Module, ...]
    norms: tuple[Module, ...]
    attentions: tuple[Module, ...]
    outputs: tuple[Module, ...]  # output matrices of attention; their input is all head outputs, one behind the other
    writers: tuple[Module, ...]
    mlps: tuple[Module, ...]
    mlp_writers: tuple[Module, ...]
    n_heads: int
    scale: float


def decoder(model: Module) -> Module:
    """The module that holds the layers."""
    if encoders.is_encoder(model):
        return encoders.stack(model)
    owner = model.get_decoder()
    return owner.model if owner is model and hasattr(model, "model") else owner


def anatomy(model: Module) -> Anatomy:
    """Find the parts of a model. Raises ModelError, with the model type, for an architecture that is not known."""
    owner = decoder(model)
    kind, config = f"a model of type {model.config.model_type!r}", model.config.get_text_config()
    encoder = encoders.is_encoder(model)
    names = ("layer",) if encoder else LAYERS
    attribute = next((name for name in names if isinstance(getattr(owner, name, None), ModuleList)), None)
    if attribute is None:
        raise ModelError(f"{kind} has none of the layer names known here: {', '.join(LAYERS)}")
    layers = tuple(getattr(owner, attribute))
    parts = {part: in_each(layers, names) for part, names in (encoders.PARTS if encoder else PARTS).items()}
    if missing := [part for part, found in parts.items() if not found]:
        raise ModelError(f"{kind} has layers in which no {', '.join(missing)} of attention heads are known here")
    widths = {module.weight.numel() // config.hidden_size for module in parts["outputs"]}
    if len(widths) > 1:
        raise ModelError(f"{kind} has layers whose heads are not as many or as wide as those of others")
    # Where no norm is in front of attention, it reads the residual stream itself.
    norms = in_each(layers, NORMS) or tuple(Identity() for _ in layers)
    behind = BEHIND_ATTENTION if not in_each(layers, NORMS) or in_each(layers, BEHIND_MLP) else BEHIND_ATTENTION[:1]
    writers = {"writers": in_each(layers, behind) or parts["outputs"]}
    writers["mlp_writers"] = in_each(layers, BEHIND_MLP) or parts["mlps"]
    scale = next((float(getattr(layers[0], name)) for name in MULTIPLIERS if hasattr(layers[0], name)), 1.0)
    return Anatomy(owner, attribute, layers, norms, n_heads=config.num_attention_heads, scale=scale, **parts, **writers)


def in_each(layers: tuple[Module, ...], names: Sequence[str]) -> tuple[Module, ...]:
    """The submodule that all layers have under the first of the names that fits; none if there is no such name."""
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
def tracing(modules: Sequence[Module]) -> Iterator[dict[int, Tensor]]:
    """`reading` of inputs, with gradients. Weights are frozen, so the autograd graph starts at the first module."""
    kept: dict[int, Tensor] = {}

    def follow(i: int, tensor: Tensor) -> Tensor:
        kept[i] = tensor if tensor.requires_grad else tensor.detach().requires_grad_()
        return kept[i]

    with torch.enable_grad(), editing(modules, follow):
        yield kept


@contextmanager
def reading(modules: Sequence[Module], *, what: str = "input") -> Iterator[dict[int, Tensor]]:
    """A dictionary that holds, while this lasts, the latest first input (or output) of each module i that ran, by i."""
    kept: dict[int, Tensor] = {}

    def keep(i: int, tensor: Tensor) -> Tensor:
        kept[i] = tensor.clone()  # a copy, because some layers add to their parts' outputs in place
        return tensor

    with editing(modules, keep, what=what):
        yield kept


def head_edit(model: Module, heads: Sequence[Head], change: Callable[[int, Tensor], Tensor], *, at: slice) -> Context:
    """While this lasts, `change(layer, z)` replaces the outputs `z` `[row, pos, chosen head, d_head]` at tokens `at`.
    The chosen heads of a layer come in ascending order. Raises what `by_layer` raises."""
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
    """While this lasts, the stream gains `vectors[l]` beside what attention of layer l adds, at the tokens `at`."""
    parts, layers = anatomy(model), list(vectors)

    def add(i: int, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, at] += (vectors[layers[i]] / parts.scale).to(output).unsqueeze(-2)
        return output

    return editing([parts.writers[layer] for layer in layers], add, what="output")


def contributions(
    parts: Anatomy, layer: int, heads: Sequence[int], z: Float[Tensor, "... head d_head"]
) -> Float[Tensor, "... chosen d_model"]:
    """What heads add to the residual stream: each head's part of `z` (all heads of the layer) times the output matrix.
    A norm behind the output matrix divides by the size of the sum of all heads; it is taken as it is for that sum, so
    that contributions of all heads add up to what the stream gains. Raises ModelError for a norm that is no product."""
    full = z.new_zeros(*z.shape[:-2], len(heads), *z.shape[-2:])
    for row, head in enumerate(heads):
        full[..., row, head, :] = z[..., head, :]
    module, norm = parts.outputs[layer], parts.writers[layer]
    products = module(full.flatten(-2)) - module(torch.zeros_like(full[..., :1, :, :].flatten(-2)))
    if norm is module:
        return products * parts.scale if parts.scale != 1 else products
    whole = module(z.flatten(-2))
    normed, gain = norm(whole), norm(torch.ones_like(whole))
    size = (normed * gain * whole).sum(-1, keepdim=True) / (gain * whole).square().sum(-1, keepdim=True)
    if (normed - size * gain * whole).abs().max() > 0.01 * normed.abs().max():
        raise ModelError(f"the norm behind attention, {type(norm).__name__}, does more than divide and multiply")
    return products * (size * gain * parts.scale)[..., None, :]


def projected_out(model: Module, directions: Mapping[int, Float[Tensor, " d_model"]], *, at: slice) -> Context:
    """While this lasts, `directions[l]` is projected out of the residual stream after layer l at the tokens `at`."""
    parts, layers = anatomy(model), list(directions)
    units = {layer: direction / direction.norm() for layer, direction in directions.items()}

    def remove(i: int, output: Tensor) -> Tensor:
        output, unit = output.clone(), units[layers[i]].to(output)
        output[:, at] -= (output[:, at] @ unit)[..., None] * unit
        return output

    return editing([parts.layers[layer] for layer in layers], remove, what="output")
