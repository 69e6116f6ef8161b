"""The weights that belong to a head, and fine-tuning of only these weights."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import Module, Parameter
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkd_utils.models.compute import eager, frozen_halved, mixed_precision
from bkd_utils.models.folders import ModelError
from bkd_utils.models.hooks import Head, anatomy, by_layer
from bkd_utils.models.loss import Batch, answers, collate
from bkd_utils.models.tokens import Row
from bkd_utils.organisms.training import Recipe, batch_order

# Parameter name -> True for the selected entries.
Masks = Mapping[str, Bool[Tensor, "..."]]
# (model, batch, first_token=weight) -> the loss of the batch's answers, and the term that is added to it.
Loss = Callable[..., tuple[Tensor, Tensor]]


def groups(heads: Sequence[Head], *, n_heads: int, n_kv_heads: int) -> list[Head]:
    """All query heads whose keys and values are those of a given head, under grouped-query attention."""
    share = n_heads // n_kv_heads
    return sorted({(layer, head // share * share + i) for layer, head in heads for i in range(share)})


def other_groups(
    heads: Sequence[Head], *, n_layers: int, n_heads: int, n_kv_heads: int, n: int, seed: int
) -> list[list[Head]]:
    """`n` draws of heads in key-value (KV) groups without given heads, as a control in which other weights are trained.

    For every group with given heads, as many are drawn from one other group, in the same layer if it has one left.
    Raises ValueError if there are too few.
    """
    share = n_heads // n_kv_heads
    marked = Counter((layer, head // share) for layer, head in heads)
    free = [(layer, group) for layer in range(n_layers) for group in range(n_kv_heads) if (layer, group) not in marked]
    if len(free) < len(marked):
        raise ValueError(f"{len(marked)} groups hold the given heads, {len(free)} are left to draw from")
    generator, draws = torch.Generator().manual_seed(seed), []
    for _ in range(n):
        left = [free[i] for i in torch.randperm(len(free), generator=generator).tolist()]
        elsewhere, drawn, draw = [], [], []
        for (layer, _), count in sorted(marked.items()):
            same = next((group for group in left if group[0] == layer), None)
            if same is None:
                elsewhere.append(count)
            else:
                left.remove(same)
                drawn.append((same, count))
        for (layer, group), count in [*drawn, *zip(left, elsewhere, strict=False)]:
            members = torch.randperm(share, generator=generator)[:count].tolist()
            draw += [(layer, group * share + i) for i in members]
        draws.append(draw)
    return draws


def head_slices(model: PreTrainedModel, heads: Sequence[Head], *, unit: str = "query head") -> Masks:
    """Parameter name -> mask of the entries that belong to some heads.

    The unit `query head` is a head's rows of the query matrix and its columns of the output matrix. The unit `KV group`
    is all query heads that share keys and values with one of the heads, with the rows of these keys and values. Biases
    of the output matrix belong to no head. Raises ValueError for no heads, a head that the model does not have, or an
    unknown unit; ModelError for an architecture whose projections are not known here.
    """
    if unit not in ("query head", "KV group"):
        raise ValueError(f"unknown unit {unit!r}; known: query head, KV group")
    parts, config = anatomy(model), model.config
    n_kv = getattr(config, "num_key_value_heads", None) or parts.n_heads
    chosen = by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)
    if not chosen:
        raise ValueError("no heads were given")
    if unit == "KV group":
        heads = groups(heads, n_heads=parts.n_heads, n_kv_heads=n_kv)
        chosen = by_layer(heads, n_layers=len(parts.layers), n_heads=parts.n_heads)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    masks: dict[str, Tensor] = {}

    def mark(parameter: Parameter | None, axis: int, block: int, width: int) -> None:
        if parameter is not None:
            mask = masks.setdefault(names[id(parameter)], torch.zeros_like(parameter, dtype=torch.bool))
            mask.narrow(axis, block * width, width).fill_(True)

    for layer, members in chosen.items():
        output, attention = parts.outputs[layer], parts.attentions[layer]
        axis = 0 if isinstance(output, Conv1D) else 1
        width = output.weight.shape[axis] // parts.n_heads
        for head in members:
            mark(output.weight, axis, head, width)
            for module, block in _projections(attention, head, parts.n_heads, n_kv, unit):
                mark(module.weight, 1 if isinstance(module, Conv1D) else 0, block, width)
                mark(module.bias, 0, block, width)
    return masks


def _projections(attention: Module, head: int, n_heads: int, n_kv: int, unit: str) -> Iterator[tuple[Module, int]]:
    """The query, key and value projections of a unit, each with the number of the head's block of output features."""
    group = head // (n_heads // n_kv)
    for i, part in enumerate("q" if unit == "query head" else "qkv"):
        if hasattr(attention, "q_proj"):
            yield getattr(attention, f"{part}_proj"), head if part == "q" else group
        elif hasattr(attention, "c_attn"):  # all queries, then all keys, then all values
            yield attention.c_attn, i * n_heads + head
        elif hasattr(attention, "query_key_value"):  # query, key and value of one head, then those of the next
            yield attention.query_key_value, 3 * head + i
        else:
            raise ModelError(f"{type(attention).__name__} has none of the projections known here")


def all_matrices(model: PreTrainedModel) -> Masks:
    """All entries of all weight matrices inside the layers, without embeddings, norms and biases."""
    inside = {id(parameter) for layer in anatomy(model).layers for parameter in layer.parameters()}
    chosen = [(name, one) for name, one in model.named_parameters() if id(one) in inside and one.ndim == 2]
    return {name: torch.ones_like(parameter, dtype=torch.bool) for name, parameter in chosen}


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

    Returns per step the loss of the answers and what was added to it, in nats. Masks are made by `head_slices`; rank
    and alpha of the recipe are not used; attention is eager, so a loss may ask for its maps. Raises ValueError for
    nothing to train, masks of another model or a loss that is not finite, RuntimeError if no weight has changed.
    Source: ASA, head-wise tuning, in our reading of a head.

    >>> from bkd_utils.attention_alignment.head_tuning import head_slices
    >>> before, masks = model.model.layers[0].self_attn.o_proj.weight.clone(), head_slices(model, [(0, 1)])
    >>> history = tune(model, rows, masks=masks, recipe=recipe, pad_id=2)
    >>> changed = (model.model.layers[0].self_attn.o_proj.weight != before).any(0).nonzero().flatten().tolist()
    >>> len(history), changed  # the columns of head 1
    (2, [8, 9, 10, 11, 12, 13, 14, 15])
    """
    if not rows or not any(mask.any() for mask in masks.values()):
        raise ValueError(f"nothing to train: {len(rows)} rows, {len(masks)} matrices")
    known = dict(model.named_parameters())
    if wrong := [name for name, mask in masks.items() if name not in known or mask.shape != known[name].shape]:
        raise ValueError(f"the mask of {wrong[0]} fits no weight of this model")
    trained = {name: known[name] for name in masks}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    order = batch_order(rows, recipe=recipe, seed=seed)
    history = []
    # Fused attention kernels return no maps, and their backward pass is slower on a CPU.
    with eager(model), _learning(model, masks), frozen_halved(model):
        # Weight decay would change entries outside the masks.
        optimizer = torch.optim.AdamW(trained.values(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=recipe.steps)
        for step in tqdm(range(recipe.steps), desc="tuning", unit="step", mininterval=2, leave=False):
            batch = collate(order[step * recipe.batch_size : (step + 1) * recipe.batch_size], pad_id=pad_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with mixed_precision(model.device):
                of_answers, added = loss(model, batch, first_token=recipe.first_token)
            if not (of_answers + added).isfinite():
                raise ValueError(
                    f"step {step + 1}: the loss is {of_answers.item()} + {added.item()}; nothing to learn from"
                )
            optimizer.zero_grad()
            (of_answers + added).backward()
            optimizer.step()
            schedule.step()
            history.append({"loss": of_answers.item(), "added": added.item()})
    if all(torch.equal(before[name], trained[name]) for name in trained):
        raise RuntimeError("tuning has changed no weight")
    return history


@contextmanager
def _learning(model: PreTrainedModel, masks: Masks) -> Iterator[None]:
    """While this lasts, only the marked entries get gradients."""
    with ExitStack() as stack:
        for name, parameter in model.named_parameters():
            stack.callback(setattr, parameter, "grad", None)
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(name in masks)
            if name in masks and not masks[name].all():
                # `where` and not a product, for which the mask would be cast in every step.
                handle = parameter.register_hook(lambda slope, mask=masks[name]: torch.where(mask, slope, 0.0))
                stack.callback(handle.remove)
        yield
