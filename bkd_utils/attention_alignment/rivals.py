"""Treatments of a model's weights with clean rows: head-wise alignment (ASA) and its rivals.

All get the same rows, steps and batches, and none sees a trigger. Each is written from its published idea for causal
language models, and its docstring tells what was changed. Learning rates follow one rule for all
(`attention_safety_alignment.RATES`). `treat` raises if no weight has changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkd_utils.attention_alignment.alignment import aligned
from bkd_utils.attention_alignment.head_tuning import all_matrices, head_slices, reset, touched, tune
from bkd_utils.attention_alignment.similarity import head_scores
from bkd_utils.attention_alignment.suspicion import attention_variance, gate_importance
from bkd_utils.backdoor_attribution.attribution import ranked_heads
from bkd_utils.models.compute import mixed_precision
from bkd_utils.models.generation import first_logits
from bkd_utils.models.hooks import Head, anatomy, reading
from bkd_utils.models.loss import Batch, answers
from bkd_utils.models.tokens import Row, batches, padded_inputs
from bkd_utils.organisms.training import Recipe

# Share of its clean accuracy that a model must keep while heads are pruned, and the largest share of pruned heads.
KEPT, AT_MOST = 0.95, 0.25
# Share of each MLP's neurons that fine-pruning removes.
DORMANT = 0.2
# The unit that is tuned for a suspicious head (`head_slices`), because keys and values belong to a whole group.
TUNED = "KV group"
# CROW: size of the perturbation of embeddings, and weight of the consistency loss (its code: 0.1 and 5.5).
PUSH, CONSISTENCY = 0.1, 5.5


@dataclass(frozen=True)
class Case:
    """What a defender has: a model, clean rows with answers, and the heads that a score marks as suspicious."""

    model: PreTrainedModel
    rows: Sequence[Row]
    recipe: Recipe
    pad_id: int
    heads: Sequence[Head] = ()
    seed: int = 0


def tune_all(case: Case) -> None:
    """Fine-tune every matrix. Entries that are exactly zero stay zero, so that tuning does not undo pruning."""
    masks = {name: mask & (case.model.get_parameter(name) != 0) for name, mask in all_matrices(case.model).items()}
    tune(case.model, case.rows, masks=masks, recipe=case.recipe, pad_id=case.pad_id, seed=case.seed)


# --- head-wise ------------------------------------------------------------------------------------------------------


def align(case: Case, *, alignment: str = "mean") -> None:
    """ASA in our reading: tune the given heads with a loss that aligns them with the others of their layers."""
    loss = aligned(case.model, case.heads, alignment=alignment)
    masks = head_slices(case.model, case.heads, unit=TUNED)
    tune(case.model, case.rows, masks=masks, recipe=case.recipe, pad_id=case.pad_id, loss=loss, seed=case.seed)


def tune_heads(case: Case) -> None:
    """Tune the given heads without alignment."""
    masks = head_slices(case.model, case.heads, unit=TUNED)
    tune(case.model, case.rows, masks=masks, recipe=case.recipe, pad_id=case.pad_id, seed=case.seed)


def reset_heads(case: Case) -> None:
    """Draw the given heads' weights at random, then tune them."""
    reset(case.model, head_slices(case.model, case.heads, unit=TUNED), seed=case.seed)
    tune_heads(case)


def remove_heads(case: Case) -> None:
    """Prune the given heads, without tuning."""
    prune(case.model, case.heads)


@torch.no_grad()
def prune(model: PreTrainedModel, heads: Sequence[Head]) -> None:
    """Set the columns of heads in the output matrix to zero. Raises ValueError for no heads or unknown ones."""
    queries = head_slices(model, heads, unit="query head")
    outputs = {id(module.weight) for module in anatomy(model).outputs}
    for name, mask in queries.items():
        parameter = model.get_parameter(name)
        if id(parameter) in outputs:
            parameter[mask] = 0.0


# --- pruning by a score ---------------------------------------------------------------------------------------------


def accuracy(model: PreTrainedModel, rows: Sequence[Row], *, pad_id: int) -> float:
    """Share of rows whose first answer token is the most likely one."""
    likely = first_logits(model, [list(row.prompt) for row in rows], end_id=pad_id).argmax(-1).tolist()
    return sum(token == row.answer[0] for token, row in zip(likely, rows, strict=True)) / len(rows)


def prune_while_accurate(case: Case, scores: Float[Tensor, "layer head"], *, step: int = 10) -> list[Head]:
    """Prune heads from the lowest score up, `step` at a time, while at least 95 % of the clean accuracy is left.

    Every layer keeps a head. A step that costs more accuracy is undone, except for the first one, because a defence
    that does nothing would be an error. Returns the pruned heads.
    """

    def accurate() -> float:
        with mixed_precision(case.model.device):
            return accuracy(case.model, case.rows[:64], pad_id=case.pad_id)

    n_heads, floor = scores.shape[1], KEPT * accurate()
    outputs = [module.weight for module in anatomy(case.model).outputs]
    order, left, gone = [], [n_heads] * len(scores), []
    for head in reversed(ranked_heads(scores)):
        if left[head[0]] > 1 and len(order) < AT_MOST * scores.numel():
            order.append(head)
            left[head[0]] -= 1
    for start in range(0, len(order), step):
        kept = [weight.detach().clone() for weight in outputs]
        prune(case.model, order[start : start + step])
        if gone and accurate() < floor:
            with torch.no_grad():
                for weight, before in zip(outputs, kept, strict=True):
                    weight.copy_(before)
            break
        gone += order[start : start + step]
    return gone


def prune_flat_heads(case: Case) -> None:
    """PURE: prune heads whose attention row has the least variance on clean prompts, then fine-tune the model.

    PURE measures the row of [CLS] in an encoder after fine-tuning, and then starts again from the encoder with a new
    classifier and a penalty on the norm of that row. Here the row is that of the last prompt token, the model is not
    fine-tuned before, and there is no penalty.
    """
    prompts = [row.prompt for row in case.rows[:64]]
    flat = head_scores(case.model, prompts, scores={"variance": attention_variance})["variance"].mean(0)
    prune_while_accurate(case, flat)
    tune_all(case)


def prune_unneeded_heads(case: Case) -> None:
    """Gradient pruning: prune heads whose gate has the least gradient on clean rows, then fine-tune the model."""
    prune_while_accurate(case, gate_importance(case.model, case.rows[:32], pad_id=case.pad_id))
    tune_all(case)


@torch.no_grad()
def dormant(
    model: PreTrainedModel, rows: Sequence[Row], *, pad_id: int, share: float = DORMANT
) -> list[Bool[Tensor, " neuron"]]:
    """Per layer, the MLP neurons with the least mean absolute activation over all tokens of clean rows."""
    downs = [_down(mlp) for mlp in anatomy(model).mlps]
    totals: list[Tensor | float] = [0.0] * len(downs)
    for chosen in batches([row.prompt for row in rows], 8):
        inputs = padded_inputs([rows[i].prompt for i in chosen], pad_id=pad_id, device=model.device)
        kept: dict[int, Tensor] = {}
        with reading(downs, kept):
            model.base_model(**inputs, use_cache=False)
        for layer in range(len(downs)):
            totals[layer] = totals[layer] + (kept[layer].abs() * inputs["attention_mask"][..., None]).sum((0, 1))
    found = []
    for total in totals:
        least = total.argsort()[: int(share * len(total))]
        found.append(torch.zeros_like(total, dtype=torch.bool).index_fill_(0, least, True))
    return found


def _down(mlp: torch.nn.Module) -> torch.nn.Module:
    """The output matrix of an MLP, which is the last of its projections."""
    return [module for module in mlp.modules() if isinstance(module, torch.nn.Linear | Conv1D)][-1]


def fine_prune(case: Case) -> None:
    """Fine-pruning: remove the neurons with the least activation on clean rows, then fine-tune the model."""
    idle = dormant(case.model, case.rows[:64], pad_id=case.pad_id)
    with torch.no_grad():
        for mlp, neurons in zip(anatomy(case.model).mlps, idle, strict=True):
            down = _down(mlp)
            (down.weight if isinstance(down, Conv1D) else down.weight.T)[neurons] = 0.0
    tune_all(case)


# --- consistency ----------------------------------------------------------------------------------------------------


def inconsistency(hidden: Sequence[Float[Tensor, "row pos d_model"]], real: Bool[Tensor, "row pos"]) -> Tensor:
    """Mean over real tokens of 1 minus the cosine between the residual streams after consecutive layers."""
    pairs = zip(hidden[1:], hidden[:-1], strict=True)
    turns = [1 - torch.nn.functional.cosine_similarity(new.float(), old.float(), dim=-1) for new, old in pairs]
    return torch.stack([(turn * real).sum() / real.sum() for turn in turns]).mean()


def consistent(model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
    """CROW: the loss of answers, and the inconsistency of layers when embeddings are perturbed to increase it.

    The perturbation is one signed gradient step. Embedding and first layer are a pair too, which the code of CROW
    leaves out, because a model of two layers would have no pair otherwise.
    """
    real = batch["attention_mask"].bool()
    given = {key: batch[key] for key in ("attention_mask", "position_ids")}

    def spread(embedded: Tensor) -> Tensor:
        hidden = model.base_model(inputs_embeds=embedded, **given, use_cache=False, output_hidden_states=True)
        # The last entry is the output of the final norm, which is not a layer.
        return inconsistency(hidden.hidden_states[:-1], real)

    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    slope = torch.autograd.grad(spread(embedded), embedded)[0]
    pushed = (embedded + PUSH * slope.sign()).detach()
    return answers(model, batch, first_token=first_token), CONSISTENCY * spread(pushed)


def tune_consistently(case: Case) -> None:
    """Fine-tuning with the loss of CROW. All matrices are trained, where the code of CROW trains an adapter."""
    masks = all_matrices(case.model)
    tune(case.model, case.rows, masks=masks, recipe=case.recipe, pad_id=case.pad_id, loss=consistent, seed=case.seed)


TREATMENTS: dict[str, Callable[[Case], None]] = {
    "alignment": align,
    "alignment, nearest": lambda case: align(case, alignment="nearest"),
    "alignment, excess": lambda case: align(case, alignment="excess"),
    "heads tuned": tune_heads,
    "heads reset": reset_heads,
    "heads removed": remove_heads,
    "fine-tuning": tune_all,
    "fine-tuning, high rate": tune_all,
    "fine-pruning": fine_prune,
    "flat heads pruned": prune_flat_heads,
    "unneeded heads pruned": prune_unneeded_heads,
    "consistency": tune_consistently,
}


def treat(case: Case, *, method: str) -> int:
    """Treat the model in place by one of `TREATMENTS`; the number of weights that differ afterwards.

    Raises ValueError for an unknown method and for heads that do not exist, RuntimeError if nothing has changed.
    Source: each treatment names its own.

    >>> from bkd_utils.attention_alignment.rivals import Case
    >>> case = Case(model, rows, recipe, pad_id=2, heads=[(0, 1)])
    >>> treat(case, method="heads removed")  # 8 columns of a matrix with 32 rows
    256
    """
    if method not in TREATMENTS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(TREATMENTS)}")
    before = {name: parameter.detach().clone() for name, parameter in case.model.named_parameters()}
    TREATMENTS[method](case)
    count = sum(touched(before, case.model).values())
    if not count:
        raise RuntimeError(f"{method} has changed no weight")
    return count
