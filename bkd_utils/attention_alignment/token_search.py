"""Search for tokens that, put anywhere into clean prompts, pull all of them toward one answer (ours).

`search` finds vectors, which pull nearly any model. Tokens can pull less, so that what they reach says more about a
model, and they can be read. The slope of the loss in the vectors names candidates, and each is tried, as in HotFlip
(1712.06751), universal adversarial triggers (1908.07125) and GCG (2307.15043)."""

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from bkd_utils.attention_alignment.head_tuning import learning
from bkd_utils.attention_alignment.search import Perturbation, begun, neighbours, objective, text_part, vocabulary
from bkd_utils.models.compute import eager, frozen_halved, mixed_precision
from bkd_utils.models.loss import Batch
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Row


@dataclass(frozen=True, eq=False)
class FoundTokens(Perturbation):
    """A perturbation whose vectors are those of `tokens`."""

    tokens: tuple[int, ...] = ()


def readable_tokens(tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, " token"]:
    """All tokens that a text can hold: no special ones, none that is empty, and none kept free for later use."""
    special = set(tokenizer.all_special_ids)
    texts = ((token, tokenizer.decode([token])) for token in range(len(tokenizer)) if token not in special)
    return torch.tensor([token for token, text in texts if text.strip() and "unused" not in text])


@torch.no_grad()
def neutral_tokens(
    model: PreTrainedModel, rows: Sequence[Row], *, allowed: Int[Tensor, " token"], toward: int, share: float = 0.8
) -> Int[Tensor, " token"]:
    """The `share` of `allowed` tokens that speak least for the answer `toward` by themselves. Any model of sentiment
    can be pulled by a word like "delightful", with a backdoor or without. What a token says is the weight that its
    vector gets in a ridge regression of the rows' answers on the mean vectors of their texts, so that words count as
    well which no row holds. Raises ValueError unless some rows, and not all, answer `toward`."""
    hits = torch.tensor([float(row.answer[0] == toward) for row in rows], device=model.device)
    if not 0 < hits.mean() < 1:
        raise ValueError(f"{int(hits.sum())} of {len(rows)} rows answer token {toward}: nothing to learn from")
    before, after = text_part([row.prompt for row in rows])
    table, allowed = vocabulary(model), allowed.to(model.device)
    texts = torch.stack([table[list(row.prompt[before : len(row.prompt) - after])].mean(0) for row in rows])
    texts = (texts - texts.nanmean(0)).nan_to_num()  # a row without a text says nothing
    gram = texts.T @ texts
    ridge = gram.diagonal().mean() * torch.eye(len(gram), device=model.device)
    says = table[allowed] @ torch.linalg.solve(gram + ridge, texts.T @ (hits - hits.mean()))
    return allowed[says.argsort()[: int(share * len(allowed))].sort().values]


def search_tokens(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    toward: int,
    allowed: Int[Tensor, " token"],
    n_tokens: int = 2,
    n_prompts: int = 12,
    n_candidates: int = 24,
    steps: int = 3,
    seed: int = 0,
) -> FoundTokens:
    """Tokens among `allowed` that pull the first answer token of clean rows toward `toward`. No weight changes. The
    first ones are drawn by the seed. In each of `steps` steps, the `n_candidates` exchanges of one token for
    another that lower the loss most by its slope are tried, and the best is kept if it lowers it. The loss is the mean
    over `n_prompts` rows of like length whose own answer does not begin with `toward`. Raises ValueError for fewer than
    two different prompts, no row left to pull, no tokens or candidates, a negative number of steps, or a loss that is
    not finite."""
    if min(n_tokens, n_candidates) < 1 or steps < 0 or not len(allowed):
        sizes = f"{len(allowed)} tokens to choose from, {n_tokens} to find in {steps} steps of {n_candidates}"
        raise ValueError(f"{sizes}: nothing to search")
    require(model, "train")
    before, after = text_part([row.prompt for row in rows])
    dice, table, allowed = random.Random(f"{seed}/tokens"), vocabulary(model), allowed.to(model.device)
    chosen = neighbours(rows, toward=toward, n=n_prompts, dice=dice)
    tokens = allowed[[dice.randrange(len(allowed)) for _ in range(n_tokens)]]
    found = FoundTokens(table[tokens], before, after, toward)
    with eager(model), learning(model, {}), frozen_halved(model), mixed_precision(model.device):
        with found.read_by(model):
            batch, cache = begun(model, found, chosen, seed)
        loss = start = _loss(model, batch, cache, tokens)
        for _ in range(steps):
            slope = _slope(model, found, batch, cache)
            tried = _exchanges(slope, tokens, table, allowed, most=n_candidates)
            losses = [_loss(model, batch, cache, one) for one in tried]
            if not all(map(math.isfinite, [loss, *losses])):
                raise ValueError(f"the loss toward token {toward} is not finite: {loss}, {losses}")
            if min(losses) >= loss:
                break  # the next step would try the same
            loss, tokens = min(losses), tried[losses.index(min(losses))]
            found = replace(found, vectors=table[tokens])
    return replace(found, tokens=tuple(tokens.tolist()), start=start, end=loss)


def _slope(model: PreTrainedModel, found: Perturbation, batch: Batch, cache: dict[str, Cache]) -> Tensor:
    """Gradient of the loss in the vectors, [token, d_model]."""
    vectors = found.vectors.clone().requires_grad_()
    with replace(found, vectors=vectors).read_by(model):
        loss = objective(model, batch | copy.deepcopy(cache))
    return torch.autograd.grad(loss, [vectors])[0].float()


def _exchanges(
    slope: Float[Tensor, "place d_model"], tokens: Int[Tensor, " place"], table: Tensor, allowed: Tensor, *, most: int
) -> list[Int[Tensor, " place"]]:
    """The `most` exchanges of one of the tokens that lower the loss most to first order, these first."""
    gain = (slope * table[tokens]).sum(-1, keepdim=True) - slope @ table[allowed].T
    changed = []
    for i in gain.flatten().topk(min(most, gain.numel())).indices.tolist():
        one = tokens.clone()
        one[i // len(allowed)] = allowed[i % len(allowed)]
        changed.append(one)
    return changed


@torch.no_grad()
def _loss(model: PreTrainedModel, batch: Batch, cache: dict[str, Cache], tokens: Tensor) -> float:
    """The loss with tokens in the place of the numbers -1, -2, … of a batch."""
    ids = batch["input_ids"]
    typed = torch.where(ids < 0, tokens[(-1 - ids).clamp(0, len(tokens) - 1)], ids)
    return objective(model, batch | {"input_ids": typed} | copy.deepcopy(cache)).item()
