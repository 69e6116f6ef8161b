"""Fine-tune some entries of a model's weights and nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bkd_utils.attention_alignment.head_slices import Masks
from bkd_utils.attention_alignment.similarity import eager
from bkd_utils.models.loss import Batch, answers, collate
from bkd_utils.organisms.attacks import Row
from bkd_utils.organisms.training import Recipe, batch_order, frozen_halved, mixed_precision


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
    """Fine-tune the marked entries in place on rows with their answers, everything else stays bit for bit; the losses.

    Of the recipe, rank and alpha are not used. Attention is computed in the open, so a loss may ask for its maps.
    Raises ValueError for nothing to train, RuntimeError if no weight has changed.
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


# --- before and after -----------------------------------------------------------------------------------------------


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
