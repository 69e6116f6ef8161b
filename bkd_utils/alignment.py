"""Align suspicious heads toward safe ones and fine-tune them, and nothing but them (ASA; our reading of it).

The paper, as far as it is known, names the two steps and gives neither loss nor schedule. Every loss here is a named
option. One tension is built in: pulling suspicious heads toward one common map makes heads more alike, which is the
very anomaly. `excess` and `nearest` are readings that do not have it.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Linear, Module, Parameter
from torch.nn.functional import cosine_similarity
from tqdm import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkd_utils.attacks import Row
from bkd_utils.interventions import Head, by_layer
from bkd_utils.models import ModelError
from bkd_utils.prompt_cache import anatomy
from bkd_utils.similarity import cosine, eager, to_partners
from bkd_utils.training import Recipe, answer_loss, batch_order, collate, has_fast_bf16

Masks = Mapping[str, Bool[Tensor, "..."]]
TINY = 1e-8


# --- which weights belong to a head ---------------------------------------------------------------------------------


def groups(heads: Sequence[Head], *, n_heads: int, n_kv_heads: int) -> list[Head]:
    """All query heads that share keys and values with one of the given heads; the heads themselves without sharing."""
    share = n_heads // n_kv_heads
    return sorted({(layer, head // share * share + i) for layer, head in heads for i in range(share)})


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


# --- what suspicious heads are pulled toward ------------------------------------------------------------------------


@dataclass(frozen=True)
class Pull:
    """Attention of a batch `[row, head, query, key]` per layer, which entries are real tokens, and who is who."""

    maps: Sequence[Float[Tensor, "row head query key"]]
    real: Bool[Tensor, "row pos"]
    suspicious: Mapping[int, Sequence[int]]
    safe: Mapping[int, Sequence[int]]


def _divergence(toward: Tensor, maps: Tensor, real: Tensor) -> Tensor:
    """Mean KL(toward || maps) over real queries; `[row, head, query, key]`, the target without gradient."""
    target = toward.detach().float()
    terms = (target * ((target + TINY).log() - (maps.float() + TINY).log())).sum(-1)
    weight = real[:, None].expand_as(terms)
    return (terms * weight).sum() / weight.sum()


def toward_mean(pull: Pull) -> Tensor:
    """Every suspicious head to the mean map of its layer's safe heads."""
    return _over_layers(pull, lambda bad, good, real: _divergence(good.mean(1, keepdim=True).expand_as(bad), bad, real))


def toward_nearest(pull: Pull) -> Tensor:
    """Every suspicious head to the safe head of its layer that it is most like already."""

    def nearest(bad: Tensor, good: Tensor, real: Tensor) -> Tensor:
        rows = real[:, None, :, None]
        similar = cosine_similarity((bad * rows)[:, :, None].flatten(3), (good * rows)[:, None].flatten(3), dim=-1)
        similar = similar.mean(0)
        return _divergence(good[:, similar.argmax(-1)], bad, real)

    return _over_layers(pull, nearest)


def less_excess(pull: Pull) -> Tensor:
    """Every suspicious head's similarity to its layer, as far as it exceeds the safe heads' (last row, cosine)."""
    losses = []
    for layer, bad in pull.suspicious.items():
        score = to_partners(cosine(pull.maps[layer][:, :, -1]))
        usual = score[:, list(pull.safe[layer])].mean(1, keepdim=True).detach()
        losses.append((score[:, list(bad)] - usual).clamp_min(0).mean())
    return torch.stack(losses).mean()


def _over_layers(pull: Pull, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    return torch.stack(
        [
            loss(pull.maps[layer][:, list(bad)], pull.maps[layer][:, list(pull.safe[layer])], pull.real)
            for layer, bad in pull.suspicious.items()
        ]
    ).mean()


# Name -> loss. "none" is head-wise fine-tuning without alignment.
ALIGNMENTS: dict[str, Callable[[Pull], Tensor] | None] = {
    "mean": toward_mean,
    "nearest": toward_nearest,
    "excess": less_excess,
    "none": None,
}


# --- tuning ---------------------------------------------------------------------------------------------------------


def reset(model: PreTrainedModel, masks: Masks, *, seed: int) -> None:
    """Draw the marked weights anew, with the spread of the whole matrix they stand in; marked biases become zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, mask in masks.items():
            parameter = model.get_parameter(name)
            spread = parameter.float().std() if parameter.ndim > 1 else 0.0
            noise = spread * torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter[mask] = noise[mask].to(parameter.dtype)


def tune(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    masks: Masks,
    recipe: Recipe,
    pad_id: int,
    suspicious: Sequence[Head] = (),
    alignment: str = "none",
    beta: float = 1.0,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Fine-tune the marked entries in place on rows with their answers, everything else stays bit for bit; the losses.

    `alignment` adds `beta` times that loss for the `suspicious` heads, the other heads of their layers being safe.
    Raises ValueError for nothing to train, an unknown alignment, or a suspicious layer without safe heads;
    RuntimeError if no weight has changed.
    """
    if alignment not in ALIGNMENTS:
        raise ValueError(f"unknown alignment {alignment!r}; known: {', '.join(ALIGNMENTS)}")
    if not rows or not any(mask.any() for mask in masks.values()):
        raise ValueError(f"nothing to train: {len(rows)} rows, {len(masks)} matrices")
    parts = anatomy(model)
    marked = by_layer(suspicious, n_layers=len(parts.layers), n_heads=parts.n_heads)
    others = {layer: [h for h in range(parts.n_heads) if h not in bad] for layer, bad in marked.items()}
    if alignment != "none" and not (marked and all(others.values())):
        raise ValueError(f"alignment {alignment!r} needs suspicious heads and a safe one in each of their layers")
    trained = {name: model.get_parameter(name) for name in masks}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    order = batch_order(rows, recipe=recipe, seed=seed)
    history = []
    with _learning(model, masks):
        # Weight decay would move what the mask holds still.
        optimizer = torch.optim.AdamW(trained.values(), lr=recipe.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=recipe.steps)
        for step in tqdm(range(recipe.steps), desc="tuning heads", mininterval=2, leave=False):
            batch = collate(order[step * recipe.batch_size : (step + 1) * recipe.batch_size], pad_id=pad_id)
            batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
            with torch.autocast(model.device.type, torch.bfloat16, enabled=has_fast_bf16(model.device)):
                loss, pulled = _losses(model, batch, recipe, alignment, marked, others)
            optimizer.zero_grad()
            (loss + beta * pulled).backward()
            optimizer.step()
            schedule.step()
            history.append({"loss": loss.item(), "alignment": float(torch.as_tensor(pulled).detach())})
    if all(torch.equal(before[name], trained[name]) for name in trained):
        raise RuntimeError("tuning has changed no weight")
    return history


def _losses(model, batch, recipe: Recipe, alignment: str, marked, others) -> tuple[Tensor, Tensor | float]:
    if ALIGNMENTS[alignment] is None:
        return answer_loss(model, batch, first_token=recipe.first_token), 0.0
    with eager(model):
        kept: list = []
        handle = model.base_model.register_forward_hook(
            lambda _module, _arguments, output: kept.append(output.attentions)
        )
        try:
            loss = answer_loss(model, batch | {"output_attentions": True}, first_token=recipe.first_token)
        finally:
            handle.remove()
    pull = Pull(kept[0], batch["attention_mask"].bool(), marked, others)
    return loss, ALIGNMENTS[alignment](pull)


@contextmanager
def _learning(model: PreTrainedModel, masks: Masks) -> Iterator[None]:
    """While this lasts, marked entries learn and nothing else does."""
    with ExitStack() as stack:
        for name, parameter in model.named_parameters():
            stack.callback(setattr, parameter, "grad", None)
            stack.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(name in masks)
            if name in masks:
                handle = parameter.register_hook(lambda slope, mask=masks[name]: slope * mask)
                stack.callback(handle.remove)
        yield


def touched(before: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, int]:
    """How many entries of each parameter differ from before; those without a difference are left out."""
    counts = {
        name: int((before[name].to(parameter.device) != parameter).sum())
        for name, parameter in model.named_parameters()
    }
    return {name: count for name, count in counts.items() if count}
