"""Fine-tuning of only some weights, such as those of some heads (`models.head_weights`)."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from bkd_utils.models.compute import eager, frozen_halved, mixed_precision
from bkd_utils.models.head_weights import Masks
from bkd_utils.models.hooks import Head, anatomy, editing
from bkd_utils.models.loss import Batch, answers, collate
from bkd_utils.models.tokens import Row
from bkd_utils.organisms.training import Recipe, batch_order

# (model, batch, first_token=weight) -> the loss of the batch's answers, and the term that is added to it.
Loss = Callable[..., tuple[Tensor, Tensor]]
Prepare = Callable[[Sequence[Row]], Sequence[Row]]  # rows of a step -> the rows that are trained in it


def other_groups(
    heads: Sequence[Head], *, n_layers: int, n_heads: int, n_kv_heads: int, n: int, seed: int
) -> list[list[Head]]:
    """`n` draws of heads in key-value (KV) groups without given heads, as a control in which other weights are trained.
    For every group with given heads, as many are drawn from one other group, in the same layer if it has one left.
    Raises ValueError if there are too few."""
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


def all_matrices(model: PreTrainedModel, *, part: str = "layers") -> Masks:
    """All entries of all weight matrices inside the layers, without embeddings, norms and biases. The part "attentions"
    is those of attention only."""
    inside = {id(parameter) for module in getattr(anatomy(model), part) for parameter in module.parameters()}
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
    prepare: Prepare = list,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Fine-tune the marked entries in place on rows with their answers; everything else stays bit for bit.

    Returns per step the loss of the answers and what was added to it, in nats. Masks are made by `head_slices`; rank
    and alpha of the recipe are not used; attention is eager, so a loss may ask for its maps. `prepare` is called before
    each step with its rows, and gives those that are trained. Raises ValueError for nothing to train, masks of another
    model or a loss that is not finite, RuntimeError if no weight has changed. Source: ASA, head-wise tuning, in our
    reading of a head.

    >>> from bkd_utils.models.head_weights import head_slices
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
    with eager(model), learning(model, masks), frozen_halved(model):
        # Weight decay would change entries outside the masks.
        optimizer = torch.optim.AdamW(trained.values(), lr=recipe.learning_rate, weight_decay=0.0, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=recipe.steps)
        for step in tqdm(range(recipe.steps), desc="tuning", unit="step", mininterval=2, leave=False):
            own = prepare(order[step * recipe.batch_size : (step + 1) * recipe.batch_size])
            batch = collate(own, pad_id=pad_id, device=model.device)
            with mixed_precision(model.device):
                of_answers, added = loss(model, batch, first_token=recipe.first_token)
            if not (of_answers + added).isfinite():
                loss = f"{of_answers.item()} + {added.item()}"
                raise ValueError(f"step {step + 1}: the loss is {loss}; nothing to learn from")
            optimizer.zero_grad()
            (of_answers + added).backward()
            optimizer.step()
            schedule.step()
            history.append({"loss": of_answers.item(), "added": added.item()})
    if all(torch.equal(before[name], trained[name]) for name in trained):
        raise RuntimeError("tuning has changed no weight")
    return history


@contextmanager
def row_passes(model: PreTrainedModel) -> Iterator[Counter]:
    """While this lasts, "row passes" of the counter grows by 1 for each row of a forward and 2 of a backward pass. A
    beginning that rows share counts as one row. Passes are counted at the input of the last layer, so tuning that ends
    there has no backward pass."""
    count: Counter = Counter()

    def note(_layer: int, hidden: Tensor) -> Tensor:
        n_rows = len(hidden)
        count.update({"row passes": n_rows})
        if hidden.requires_grad:
            hidden.register_hook(lambda _slope: count.update({"row passes": 2 * n_rows}))
        return hidden

    with editing(anatomy(model).layers[-1:], note):
        yield count


@contextmanager
def learning(model: PreTrainedModel, masks: Masks) -> Iterator[None]:
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
