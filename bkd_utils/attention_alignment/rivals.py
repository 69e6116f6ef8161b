"""Treatments of a model's weights with clean rows: head-wise alignment (ASA) and its rivals.

All get the same rows, steps and batches, learning rates by one rule (`attention_safety_alignment.RATES`), and none sees
a trigger. Each is written from its published idea for causal language models; its docstring tells what was changed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bkd_utils.attention_alignment.alignment import aligned
from bkd_utils.attention_alignment.head_tuning import Loss, Prepare, all_matrices, answers_only, tune
from bkd_utils.attention_alignment.search import Perturbation
from bkd_utils.attention_alignment.searched_training import SearchedTraining
from bkd_utils.attention_alignment.similarity import head_scores
from bkd_utils.attention_alignment.suspicion import attention_variance, gate_importance
from bkd_utils.backdoor_attribution.attribution import ranked_heads
from bkd_utils.common.validation import check_known
from bkd_utils.models.compute import mixed_precision
from bkd_utils.models.encoders import is_encoder, prompt_inputs
from bkd_utils.models.generation import first_logits
from bkd_utils.models.head_weights import Masks, head_slices, last_matrix
from bkd_utils.models.hooks import Head, anatomy, reading
from bkd_utils.models.loss import Batch, answers
from bkd_utils.models.tokens import Row, batches
from bkd_utils.organisms.training import Recipe

# Pruning of heads: share of clean accuracy that the model must keep, largest share of pruned heads, heads in one step.
KEPT, AT_MOST, AT_ONCE = 0.95, 0.25, 10
DORMANT = 0.2  # share of each MLP's neurons that fine-pruning removes
TUNED = "KV group"  # what is tuned for a suspicious head, because keys and values belong to a whole group
# CROW: size of the perturbation of embeddings, and weight of the consistency loss (its code: 0.1 and 5.5).
PUSH, CONSISTENCY = 0.1, 5.5


@dataclass(frozen=True)
class Case:
    """What a defender has: a model, clean rows with answers, and the heads that a score marks as suspicious. `labels`
    are the first tokens of the answers that the task knows, none where answers are free. A treatment that searches for
    perturbations adds them to `found`."""

    model: PreTrainedModel
    rows: Sequence[Row]
    recipe: Recipe
    pad_id: int
    heads: Sequence[Head] = ()
    labels: Sequence[int] = ()
    seed: int = 0
    found: list[Perturbation] = field(default_factory=list)

    def tune(self, masks: Masks, loss: Loss = answers_only, prepare: Prepare = list) -> None:
        """`head_tuning.tune` on the clean rows."""
        how = {"recipe": self.recipe, "pad_id": self.pad_id, "loss": loss, "prepare": prepare, "seed": self.seed}
        tune(self.model, self.rows, masks=masks, **how)


def tune_all(case: Case) -> None:
    """Fine-tune every matrix. Entries that are exactly zero stay zero, so that tuning does not undo pruning."""
    every = all_matrices(case.model).items()
    case.tune({name: mask & (case.model.get_parameter(name) != 0) for name, mask in every})


def tune_heads(case: Case, *, alignment: str | None = None) -> None:
    """Tune the given heads; `alignment` is the loss that aligns them with the others of their layers (our ASA)."""
    loss = aligned(case.model, case.heads, alignment=alignment) if alignment else answers_only
    case.tune(head_slices(case.model, case.heads, unit=TUNED), loss)


def reset_heads(case: Case) -> None:
    """Draw the given heads' weights at random with the deviation of their matrix, biases as zero; then tune them."""
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for name, mask in head_slices(case.model, case.heads, unit=TUNED).items():
            parameter = case.model.get_parameter(name)
            spread = parameter.float().std() if parameter.ndim > 1 else 0.0
            noise = spread * torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter[mask] = noise[mask].to(parameter.dtype)
    tune_heads(case)


@torch.no_grad()
def prune(model: PreTrainedModel, heads: Sequence[Head]) -> None:
    """Set the columns of heads in the output matrix to zero. Raises ValueError for no heads or unknown ones."""
    outputs = {id(module.weight) for module in anatomy(model).outputs}
    for name, mask in head_slices(model, heads, unit="query head").items():
        parameter = model.get_parameter(name)
        if id(parameter) in outputs:
            parameter[mask] = 0.0


def tune_against_search(case: Case, masks: Masks) -> None:
    """Tune the marked entries on right answers to clean and to perturbed prompts (see `searched_training`)."""
    against = SearchedTraining(case.model, case.rows, labels=case.labels, seed=case.seed, found=case.found)
    case.tune(masks, against.loss, against.prepare)


def accuracy(model: PreTrainedModel, rows: Sequence[Row], *, pad_id: int) -> float:
    """Share of rows whose first answer token is the most likely one."""
    likely = first_logits(model, [list(row.prompt) for row in rows], end_id=pad_id).argmax(-1).tolist()
    return sum(token == row.answer[0] for token, row in zip(likely, rows, strict=True)) / len(rows)


def prune_while_accurate(case: Case, scores: Float[Tensor, "layer head"]) -> list[Head]:
    """Prune heads from the lowest score up, ten at a time, while at least 95 % of the clean accuracy is left. Every
    layer keeps a head. A step that costs more accuracy is undone, except for the first one, because a defence that does
    nothing would be an error. Returns the pruned heads."""

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
    for start in range(0, len(order), AT_ONCE):
        kept, chosen = [weight.detach().clone() for weight in outputs], order[start : start + AT_ONCE]
        prune(case.model, chosen)
        if gone and accurate() < floor:
            with torch.no_grad():
                for weight, before in zip(outputs, kept, strict=True):
                    weight.copy_(before)
            break
        gone += chosen
    return gone


def prune_flat_heads(case: Case) -> None:
    """PURE: prune heads whose attention row has the least variance on clean prompts, then fine-tune the model. PURE
    measures the row of [CLS] in an encoder after fine-tuning, and starts again from there with a new classifier and a
    penalty on that row's norm. Here the row is that of the last prompt token of the model as it is, without penalty."""
    prompts = [row.prompt for row in case.rows[:64]]
    flat = head_scores(case.model, prompts, scores={"variance": attention_variance})["variance"].mean(0)
    prune_while_accurate(case, flat)
    tune_all(case)


def prune_unneeded_heads(case: Case) -> None:
    """Gradient pruning: prune heads whose gate has the least gradient on clean rows, then fine-tune the model."""
    prune_while_accurate(case, gate_importance(case.model, case.rows[:32], pad_id=case.pad_id))
    tune_all(case)


@torch.no_grad()
def dormant(model: PreTrainedModel, rows: Sequence[Row], *, pad_id: int) -> list[Int[Tensor, " neuron"]]:
    """Per layer, the MLP neurons with the least mean absolute activation over all tokens of clean prompts."""
    downs = [last_matrix(mlp) for mlp in anatomy(model).mlps]
    totals: list[Tensor | float] = [0.0] * len(downs)
    for chosen in batches([row.prompt for row in rows], 8):
        inputs = prompt_inputs(model, [rows[i].prompt for i in chosen], pad_id=pad_id)
        with reading(downs) as kept:
            model.base_model(**inputs, use_cache=False)
        for layer in range(len(downs)):
            totals[layer] = totals[layer] + (kept[layer].abs() * inputs["attention_mask"][..., None]).sum((0, 1))
    return [total.argsort()[: int(DORMANT * len(total))] for total in totals]


def fine_prune(case: Case) -> None:
    """Fine-pruning: remove the neurons with the least activation on clean rows, then fine-tune the model."""
    idle = dormant(case.model, case.rows[:64], pad_id=case.pad_id)
    with torch.no_grad():
        for mlp, neurons in zip(anatomy(case.model).mlps, idle, strict=True):
            down = last_matrix(mlp)
            (down.weight if isinstance(down, Conv1D) else down.weight.T)[neurons] = 0.0
    tune_all(case)


def inconsistency(hidden: Sequence[Float[Tensor, "row pos d_model"]], real: Bool[Tensor, "row pos"]) -> Tensor:
    """Mean over real tokens of 1 minus the cosine between the residual streams after consecutive layers."""
    pairs = zip(hidden[1:], hidden[:-1], strict=True)
    turns = [1 - torch.nn.functional.cosine_similarity(new.float(), old.float(), dim=-1) for new, old in pairs]
    return torch.stack([(turn * real).sum() / real.sum() for turn in turns]).mean()


def consistent(model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
    """CROW: the loss of answers, and the inconsistency of layers when embeddings are perturbed to increase it. The
    perturbation is one signed gradient step. The code of CROW trains an adapter and not all matrices, and has no pair
    of embedding and first layer; here a model of two layers would have no pair otherwise."""
    real = batch["attention_mask"].bool()
    given = {key: batch[key] for key in ("attention_mask", "position_ids") if key in batch}

    def spread(embedded: Tensor) -> Tensor:
        hidden = model.base_model(inputs_embeds=embedded, **given, use_cache=False, output_hidden_states=True)
        # The last entry is the output of the final norm, which is not a layer; an encoder has no such norm.
        return inconsistency(hidden.hidden_states[: None if is_encoder(model) else -1], real)

    embedded = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
    slope = torch.autograd.grad(spread(embedded), embedded)[0]
    pushed = (embedded + PUSH * slope.sign()).detach()
    return answers(model, batch, first_token=first_token), CONSISTENCY * spread(pushed)


TREATMENTS: dict[str, Callable[[Case], None]] = {
    "alignment": lambda case: tune_heads(case, alignment="mean"),
    "alignment, nearest": lambda case: tune_heads(case, alignment="nearest"),
    "alignment, excess": lambda case: tune_heads(case, alignment="excess"),
    "heads tuned": tune_heads,
    "heads reset": reset_heads,
    "heads removed": lambda case: prune(case.model, case.heads),
    "fine-tuning": tune_all,
    "fine-tuning, high rate": tune_all,
    "fine-pruning": fine_prune,
    "flat heads pruned": prune_flat_heads,
    "unneeded heads pruned": prune_unneeded_heads,
    "consistency": lambda case: case.tune(all_matrices(case.model), consistent),
    "searched": lambda case: tune_against_search(case, all_matrices(case.model)),
    "searched, attention": lambda case: tune_against_search(case, all_matrices(case.model, part="attentions")),
}
# Ours, and not what is published: named apart in every table.
SEARCHED = tuple(name for name in TREATMENTS if name.startswith("searched"))


def treat(case: Case, *, method: str) -> int:
    """Treat the model in place by one of `TREATMENTS`; the number of weights that differ afterwards. Raises ValueError
    for an unknown method and for heads that do not exist, RuntimeError if nothing has changed. Source: each treatment
    names its own.

    >>> from bkd_utils.attention_alignment.rivals import Case
    >>> case = Case(model, rows, recipe, pad_id=2, heads=[(0, 1)])
    >>> treat(case, method="heads removed")  # 8 columns of a matrix with 32 rows
    256
    """
    check_known("method", method, TREATMENTS)
    before = {name: parameter.detach().clone() for name, parameter in case.model.named_parameters()}
    TREATMENTS[method](case)
    count = sum(int((before[name] != parameter).sum()) for name, parameter in case.model.named_parameters())
    if not count:
        raise RuntimeError(f"{method} has changed no weight")
    return count
