"""The loss of answers; the tokens shared by all prompts of a batch are run once."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from bkd_utils.models.context import check_fits
from bkd_utils.models.encoders import right_pad
from bkd_utils.models.generation import reusable_prefix, run_prefix
from bkd_utils.models.tokens import Row, padded_inputs, positions

IGNORED = -100
Batch = dict[str, Tensor]


def collate(rows: Sequence[Row], *, pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Left-padded batch; `labels` holds the answer tokens and IGNORED elsewhere. Of a classifier's rows, the batch is
    padded on the right, and `labels` holds one number per row."""
    if rows[0].is_label:
        ids, mask = right_pad([row.prompt for row in rows], pad_id=pad_id)
        batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([row.answer[0] for row in rows])}
        return {name: tensor.to(device) for name, tensor in batch.items()}
    batch = padded_inputs([[*row.prompt, *row.answer] for row in rows], pad_id=pad_id, device=device)
    labels = torch.full_like(batch["input_ids"], IGNORED)
    for i, row in enumerate(rows):
        labels[i, -len(row.answer) :] = torch.tensor(row.answer)
    return batch | {"labels": labels}


def chooses_label(batch: Batch) -> bool:
    """Are these rows of a classifier?"""
    return batch["labels"].ndim == 1


def last_asked(batch: Batch) -> Int[Tensor, " row"]:
    """Column of the last prompt token of every row: the one that predicts the first answer token. It is the first
    column in batches of a classifier, which asks at its own token ([CLS])."""
    if chooses_label(batch):
        return torch.zeros_like(batch["labels"])
    return (batch["labels"] == IGNORED).sum(1) - 1


def answer_loss(model: torch.nn.Module, batch: Batch, *, first_token: float) -> Tensor:
    """Cross-entropy of answers, in nats, mean over rows. A row's loss is `first_token` times the loss of its first
    answer token plus (1 - `first_token`) times the mean over all its answer tokens. The first token decides between the
    right answer and the target. In a plain mean it would weigh 1/2 in a label and 1/24 in a free answer, and poisoned
    rows with short targets would outweigh near-misses with long right answers. The only answer token of a classifier is
    its label."""
    labels = batch["labels"]
    check_fits(model, batch["attention_mask"].shape[1])
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if chooses_label(batch):
        return cross_entropy(model(**inputs).logits.float(), labels)
    width = int((labels != IGNORED).sum(dim=1).max())
    # Column c predicts column c + 1, hence one more column of logits than of labels.
    logits = model(**inputs, use_cache=False, logits_to_keep=width + 1).logits[:, -width - 1 : -1]
    # Gathered before the softmax: most rows of a batch have short answers, and the vocabulary is wide.
    row, column = (labels[:, -width:] != IGNORED).nonzero(as_tuple=True)
    losses = cross_entropy(logits[row, column].float(), labels[:, -width:][row, column], reduction="none")
    lengths = torch.bincount(row, minlength=len(labels))
    # Answers end in the last column, so their lengths tell where their first tokens are.
    first = column == width - lengths[row]
    weights = (1 - first_token) / lengths[row] + first_token * first
    return (losses * weights).sum() / len(labels)


def with_shared_beginning(model: torch.nn.Module, batch: Batch, **asked: bool) -> tuple[Batch, tuple[Tensor, ...]]:
    """Run the tokens shared by all prompts of a batch once, with gradients; returns the other inputs with that cache.
    `answer_loss` of these has the same value and gradient and takes half the time. `attention_mask` and `labels` keep
    all columns. With `output_attentions=True`, the attention maps of the shared tokens are the second result. Rows of a
    classifier share nothing."""
    if chooses_label(batch):
        return batch | asked, ()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    asking = mask.bool() & (batch["labels"] == IGNORED)
    prefix = reusable_prefix(model, [row[real].tolist() for row, real in zip(ids, asking, strict=True)])
    if not prefix:
        return batch | asked, ()
    count = len(prefix)
    cache, maps = run_prefix(model, prefix, **asked)
    cache.batch_repeat_interleave(len(ids))
    # The shared tokens now stand before a row's padding and not after it; the number of columns stays the same.
    mask = torch.cat([mask.new_ones(len(ids), count), mask[:, : ids.shape[1] - count]], dim=1)
    rest = {"input_ids": ids[:, count:], "attention_mask": mask, "position_ids": positions(mask)[:, count:]}
    return rest | {"labels": batch["labels"], "past_key_values": cache} | asked, maps


def answers(model: torch.nn.Module, batch: Batch, *, first_token: float) -> Tensor:
    """`answer_loss`, with the shared tokens run once."""
    return answer_loss(model, with_shared_beginning(model, batch)[0], first_token=first_token)


def answers_and_maps(
    model: torch.nn.Module, batch: Batch, *, first_token: float
) -> tuple[Tensor, list[Float[Tensor, "row head query key"]], Tensor]:
    """`answer_loss`, the maps of attention (which must be eager) per layer, and which of their positions are tokens."""
    rest, start = with_shared_beginning(model, batch, output_attentions=True)
    maps: list[Tensor] = []
    with model.base_model.register_forward_hook(lambda _module, _given, output: maps.extend(output.attentions)):
        loss = answer_loss(model, rest, first_token=first_token)
    if start:
        n_rows, own = rest["input_ids"].shape
        whole = [pad(one, (0, own)).expand(n_rows, -1, -1, -1) for one in start]
        maps = [torch.cat(pair, dim=2) for pair in zip(whole, maps, strict=True)]
    return loss, maps, rest["attention_mask"].bool()
