"""The weights that belong to an attention head: its rows of the query, key and value matrices, its part of the output.

Matrices of several parts come in two layouts. In a stacked one all queries stand before all keys, and these before all
values; in a grouped one the queries of a key-value group stand before its key and its value."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkd_utils.common.validation import check_known
from bkd_utils.models.folders import ModelError
from bkd_utils.models.hooks import Anatomy, Head, anatomy, by_layer

Masks = Mapping[str, Bool[Tensor, "..."]]  # parameter name -> True for the selected entries
UNITS = ("query head", "KV group")
STACKED, GROUPED = ("qkv_proj", "Wqkv"), ("query_key_value",)
ENCODER = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


def groups(heads: Sequence[Head], *, n_heads: int, n_kv_heads: int) -> list[Head]:
    """All query heads whose keys and values are those of a given head, under grouped-query attention."""
    share = n_heads // n_kv_heads
    return sorted({(layer, head // share * share + i) for layer, head in heads for i in range(share)})


def n_kv_heads(parts: Anatomy, layer: int) -> int:
    """Number of heads of a layer that have keys and values of their own, by the width of its matrices. Raises
    ModelError for projections that are not known here."""
    rows = {name: _rows(module) // head_width(parts, layer) for name, module, _ in _matrices(parts, layer)}
    return rows["k"] if "k" in rows else (rows["qkv"] - parts.n_heads) // 2


def head_slices(model: PreTrainedModel, heads: Sequence[Head], *, unit: str = "query head") -> Masks:
    """Parameter name -> mask of the entries that belong to some heads. The unit `query head` is a head's rows of the
    query matrix and its columns of the output matrix. The unit `KV group` is all query heads that share keys and values
    with one of the heads, with the rows of these keys and values. Biases of the output matrix belong to no head. Raises
    ValueError for no heads, a head that the model does not have, or an unknown unit; ModelError for an architecture
    whose projections are not known here."""
    check_known("unit", unit, UNITS)
    parts = anatomy(model)
    chosen = by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)
    if not chosen:
        raise ValueError("no heads were given")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}

    def mark(parameter: Parameter | None, axis: int, block: int, width: int) -> None:
        if parameter is not None:
            mask = masks.setdefault(names[id(parameter)], torch.zeros_like(parameter, dtype=torch.bool))
            mask.narrow(axis, block * width, width).fill_(True)

    for layer, members in chosen.items():
        output, n_kv = parts.outputs[layer], n_kv_heads(parts, layer)
        if unit == "KV group":
            named = [(layer, head) for head in members]
            members = [head for _, head in groups(named, n_heads=parts.n_heads, n_kv_heads=n_kv)]
        for head in members:
            mark(output.weight, 0 if isinstance(output, Conv1D) else 1, head, head_width(parts, layer))
            for module, block, width in _projections(parts, layer, head, n_kv, "q" if unit == UNITS[0] else "qkv"):
                mark(module.weight, 1 if isinstance(module, Conv1D) else 0, block, width)
                mark(module.bias, 0, block, width)
    return masks


def head_width(parts: Anatomy, layer: int) -> int:
    """Width of one head's output. The weights of GPT-2's module, Conv1D, are the other way round."""
    output = parts.outputs[layer]
    return output.weight.shape[0 if isinstance(output, Conv1D) else 1] // parts.n_heads


def last_matrix(part: Module) -> Module:
    """The output matrix of attention or of an MLP, which is the last of its projections."""
    return [module for module in part.modules() if isinstance(module, Linear | Conv1D)][-1]


def _rows(module: Module) -> int:
    """Number of output features."""
    return module.weight.shape[1 if isinstance(module, Conv1D) else 0]


def _matrices(parts: Anatomy, layer: int) -> Iterator[tuple[str, Module, bool]]:
    """What the projections of a layer make ("q", "k", "v" or "qkv"), their modules, and whether parts are grouped."""
    attention = parts.attentions[layer]
    fused = [(name, name in GROUPED) for name in (*STACKED, *GROUPED) if hasattr(attention, name)]
    if all(hasattr(attention, f"{part}_proj") for part in "qkv"):
        yield from ((part, getattr(attention, f"{part}_proj"), False) for part in "qkv")
    elif fused:
        yield "qkv", getattr(attention, fused[0][0]), fused[0][1]
    elif hasattr(attention, "c_attn"):  # GPT-2 has it stacked, as a Conv1D; GPT-BigCode grouped, as a linear layer
        yield "qkv", attention.c_attn, not isinstance(attention.c_attn, Conv1D)
    elif names := next((names for names in ENCODER if all(hasattr(attention, name) for name in names)), None):
        yield from ((part, getattr(attention, name), False) for part, name in zip("qkv", names, strict=True))
    else:
        raise ModelError(f"{type(attention).__name__} has none of the projections known here")


def _projections(parts: Anatomy, layer: int, head: int, n_kv: int, wanted: str) -> Iterator[tuple[Module, int, int]]:
    """Modules of the wanted projections of a head, with the number and the width of its block of output features."""
    share = parts.n_heads // n_kv
    group = head // share
    for name, module, grouped in _matrices(parts, layer):
        if name != "qkv":
            if name in wanted:
                n_blocks = parts.n_heads if name == "q" else n_kv
                yield module, head if name == "q" else group, _rows(module) // n_blocks
            continue
        first = group * (share + 2)
        stacked = {"q": head, "k": parts.n_heads + group, "v": parts.n_heads + n_kv + group}
        own = {"q": first + head % share, "k": first + share, "v": first + share + 1}
        for part in wanted:
            yield module, (own if grouped else stacked)[part], _rows(module) // (parts.n_heads + 2 * n_kv)
