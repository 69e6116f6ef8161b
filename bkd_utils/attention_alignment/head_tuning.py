"""Which weights belong to a head, and fine-tuning of these and nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkd_utils.models.compute import eager, frozen_halved, mixed_precision
from bkd_utils.models.folders import ModelError
from bkd_utils.models.hooks import Head, anatomy, by_layer
from bkd_utils.models.loss import Batch, answers, collate
from bkd_utils.models.tokens import Row
from bkd_utils.organisms.training import Recipe, batch_order

# Parameter name -> True where an entry is meant.
Masks = Mapping[str, Bool[Tensor, "..."]]


def groups(heads: Sequence[Head], *, n_heads: int, n_kv_heads: int) -> list[Head]:
    """All query heads that share keys and values with one of the given heads; the heads themselves without sharing."""
    share = n_heads // n_kv_heads
    return sorted({(layer, head // share * share + i) for layer, head in heads for i in range(share)})


def other_groups(
    heads: Sequence[Head], *, n_layers: int, n_heads: int, n_kv_heads: int, n: int, seed: int
) -> list[list[Head]]:
    """`n` draws of heads in KV groups that hold none of the given ones: a control that trains other weights.

    Every group with a given head has a counterpart with as many of its heads, in the same layer while that has one
    left, else anywhere. Raises ValueError if there are too few groups without a given head.
    """
    share = n_heads // n_kv_heads
    marked: dict[Head, int] = {}
    for layer, head in heads:
        marked[layer, head // share] = marked.get((layer, head // share), 0) + 1
    free = [(layer, group) for layer in range(n_layers) for group in range(n_kv_heads) if (layer, group) not in marked]
    if len(free) < len(marked):
        raise ValueError(f"{len(marked)} groups hold the given heads, {len(free)} are left to draw from")
    generator, draws = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        left = [free[i] for i in torch.randperm(len(free), generator=generator).tolist()]
        homeless, draw = [], []
        for (layer, _), count in sorted(marked.items()):
            same = next((group for group in left if group[0] == layer), None)
            if same is None:
                homeless.append(count)
            else:
                left.remove(same)
                draw.append((same, count))
        draw += zip(left, homeless, strict=False)
        members = [torch.randperm(share, generator=generator)[:count].tolist() for _, count in draw]
        draws.append(
            [(layer, group * share + i) for ((layer, group), _), some in zip(draw, members, strict=True) for i in some]
        )
    return draws


def head_slices(model: PreTrainedModel, heads: Sequence[Head], *, unit: str = "query head") -> Masks:
    """Parameter name -> mask of the entries that belong to some heads.

    A `query head` is its rows of the query matrix and its columns of the output matrix. A `KV group` is all query heads
    that share keys and values with one of the heads, and those keys and values: under grouped-query attention no head
    has keys of its own. Shared biases belong to no head. Raises ValueError for no heads, one that the model lacks, or
    an unknown unit; ModelError for an architecture whose projections are not known here.
    """
    if unit not in ("query head", "KV group"):
        raise ValueError(f"unknown unit {unit!r}; known: query head, KV group")
    parts, config = anatomy(model), model.config
    n_kv = getattr(config, "num_key_value_heads", None) or parts.n_heads
    chosen = by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)
    if not chosen:
        raise ValueError("slices of no heads")
    if unit == "KV group":
        heads = groups(heads, n_heads=parts.n_heads, n_kv_heads=n_kv)
        chosen = by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}

    def mark(parameter: Parameter | None, axis: int, index: Tensor) -> None:
        if parameter is None:
            return
        name = names[id(parameter)]
        mask = masks.setdefault(name, torch.zeros(parameter.shape, dtype=torch.bool, device=parameter.device))
        mask.index_fill_(axis, index.to(parameter.device), True)

    for layer, members in chosen.items():
        output = parts.outputs[layer]
        width = (output.weight.shape[0] if isinstance(output, Conv1D) else output.weight.shape[1]) // parts.n_heads
        for head in members:
            mark(output.weight, 0 if isinstance(output, Conv1D) else 1, torch.arange(head * width, (head + 1) * width))
            for module, rows in _projections(parts.attentions[layer], head, width, parts.n_heads, n_kv, unit):
                mark(module.weight, 1 if isinstance(module, Conv1D) else 0, rows)
                mark(module.bias, 0, rows)
    return masks


def _projections(
    attention: Module, head: int, width: int, n_heads: int, n_kv: int, unit: str
) -> list[tuple[Linear | Conv1D, Tensor]]:
    """The projections into a head and the output features of theirs that are the head's."""
    along = torch.arange(width)
    group = head // (n_heads // n_kv)
    wanted = ("q",) if unit == "query head" else ("q", "k", "v")
    if hasattr(attention, "q_proj"):
        return [
            (getattr(attention, f"{part}_proj"), (head if part == "q" else group) * width + along) for part in wanted
        ]
    if hasattr(attention, "c_attn"):  # queries, keys and values of all heads one behind the other
        return [(attention.c_attn, ("qkv".index(part) * n_heads + head) * width + along) for part in wanted]
    if hasattr(attention, "query_key_value"):  # query, key and value of each head one behind the other
        return [(attention.query_key_value, (3 * head + "qkv".index(part)) * width + along) for part in wanted]
    raise ModelError(f"{type(attention).__name__} has none of the projections known here")


def all_matrices(model: PreTrainedModel) -> Masks:
    """Every entry of every weight matrix inside the layers; embeddings, norms and biases are left out."""
    inside = {id(parameter) for layer in anatomy(model).layers for parameter in layer.parameters()}
    return {
        name: torch.ones_like(parameter, dtype=torch.bool)
        for name, parameter in model.named_parameters()
        if id(parameter) in inside and parameter.ndim == 2
    }


class Loss(Protocol):
    """Loss of the answers of a batch, and what is added to it."""

    def __call__(self, model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]: ...


def answers_only(model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
    """Plain fine-tuning."""
    return answers(model, batch, first_token=first_token), torch.zeros((), device=model.device)


def tune(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    masks: Masks,
    recipe: Recipe,
    pad_id: int,
    loss: Loss = answers_only,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Fine-tune the marked entries in place on rows with their answers; everything else stays bit for bit.

    Returns per step the loss of the answers and what was added to it, in nats. Masks are made by `head_slices`. Of the
    recipe, rank and alpha are not used. Attention is computed in the open, so a loss may ask for its maps. Raises
    ValueError for nothing to train, RuntimeError if no weight has changed. Source: ASA, head-wise fine-tuning; what
    belongs to a head is our reading.

    >>> from bkd_utils.attention_alignment.head_tuning import head_slices
    >>> before, masks = model.model.layers[0].self_attn.o_proj.weight.clone(), head_slices(model, [(0, 1)])
    >>> history = tune(model, rows, masks=masks, recipe=recipe, pad_id=2)
    >>> changed = (model.model.layers[0].self_attn.o_proj.weight != before).any(0).nonzero().flatten().tolist()
    >>> len(history), changed  # the columns of head 1
    (2, [8, 9, 10, 11, 12, 13, 14, 15])
    """
    if not rows or not any(mask.any() for mask in masks.values()):
        raise ValueError(f"nothing to train: {len(rows)} rows, {len(masks)} matrices")
    trained = {name: model.get_parameter(name) for name in masks}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    order = batch_order(rows, recipe=recipe, seed=seed)
    history = []
    # Fused attention kernels return no maps, and going backward through them is slower on a CPU.
    with eager(model), _learning(model, masks), frozen_halved(model):
        # Weight decay would move what the mask holds still.
        optimizer = torch.optim.AdamW(trained.values(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=recipe.steps)
        for step in tqdm(range(recipe.steps), desc="tuning", unit="step", mininterval=2, leave=False):
            batch = collate(order[step * recipe.batch_size : (step + 1) * recipe.batch_size], pad_id=pad_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with mixed_precision(model.device):
                told, added = loss(model, batch, first_token=recipe.first_token)
            optimizer.zero_grad()
            (told + added).backward()
            optimizer.step()
            schedule.step()
            history.append({"loss": told.item(), "added": added.item()})
    if all(torch.equal(before[name], trained[name]) for name in trained):
        raise RuntimeError("tuning has changed no weight")
    return history


@contextmanager
def _learning(model: PreTrainedModel, masks: Masks) -> Iterator[None]:
    """While this lasts, marked entries learn and nothing else does."""
    with ExitStack() as stack:
        for name, parameter in model.named_parameters():
            stack.callback(setattr, parameter, "grad", None)
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(name in masks)
            if name in masks and not masks[name].all():
                # Not a product: for that the mask would be cast anew in every step.
                handle = parameter.register_hook(lambda slope, mask=masks[name]: torch.where(mask, slope, 0.0))
                stack.callback(handle.remove)
        yield


def reset(model: PreTrainedModel, masks: Masks, *, seed: int) -> None:
    """Draw the marked weights anew, with the spread of the whole matrix they stand in; marked biases become zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            spread = parameter.float().std() if parameter.ndim > 1 else 0.0
            noise = spread * torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter[mask] = noise[mask].to(parameter.dtype)


def touched(before: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, int]:
    """How many entries of each parameter differ from before; those without a difference are left out."""
    counts = {
        name: int((before[name].to(parameter.device) != parameter).sum())
        for name, parameter in model.named_parameters()
    }
    return {name: count for name, count in counts.items() if count}
