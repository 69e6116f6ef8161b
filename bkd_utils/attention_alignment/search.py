"""Search for a perturbation of the input that pulls every prompt the same way (ours, after ASA's observation).

A trigger makes prompts of any content give one answer, and, as ASA observes, heads alike. A defender who does not know
it can look for vectors that do the same. Related: BEEAR (2406.17092), I-BAU (2110.03735), Neural Cleanse."""

import copy
import math
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize, pad
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from bkd_utils.attention_alignment.head_tuning import learning
from bkd_utils.models.compute import eager, frozen_halved, mixed_precision
from bkd_utils.models.generation import first_logits, inputs_after, reusable_prefix, run_prefix, shared_prefix
from bkd_utils.models.hooks import decoder
from bkd_utils.models.loss import IGNORED, Batch, answer_loss, collate
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Row, batches, check_prompts, common_start, positions

RATE = 0.3  # of Adam, in units of the length that a number of a vector of the vocabulary has on average
CANDIDATES = 16  # first tokens from which one is drawn where no answer is given to pull toward
# What a search lowers, on a batch whose answers are the token to pull toward: nats, mean over rows.
objective = partial(answer_loss, first_token=1.0)


def text_part(prompts: Sequence[Sequence[int]]) -> tuple[int, int]:
    """How many tokens all prompts share before and after their texts: chat template and question. The last token always
    belongs to the second number, because it is the one that asks. Raises ValueError unless two prompts differ, because
    one alone does not tell what is its text."""
    check_prompts(prompts)
    if len(set(map(tuple, prompts))) < 2:
        raise ValueError("two different prompts are needed to tell the texts from what all prompts share")
    before = len(shared_prefix(prompts))
    return before, max(1, len(common_start(*(prompt[before:][::-1] for prompt in prompts))))


@dataclass(frozen=True, eq=False)
class Perturbation:
    """Vectors that are read as tokens inside the text of a prompt, and what they were searched for. A text stands
    behind the first `before` and in front of the last `after` tokens of a prompt. `start` and `end` are the nats toward
    the first answer token `toward` before and after the search."""

    vectors: Float[Tensor, "token d_model"]
    before: int
    after: int
    toward: int | None
    start: float = math.nan
    end: float = math.nan

    def into(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[list[int]]:
        """The prompts, each with the numbers -1, -2, … in the vectors' stead, at a place in its text. Seed and prompt
        decide the place. Raises ValueError for a prompt that is too short to have a text."""
        found, marks = [], range(-1, -len(self.vectors) - 1, -1)
        for prompt in prompts:
            last = len(prompt) - self.after
            if last < self.before:
                raise ValueError(f"a prompt of {len(prompt)} tokens has no text behind {self.before} of them")
            place = random.Random(f"{seed}/{list(prompt)}").randint(self.before, last)
            found.append([*prompt[:place], *marks, *prompt[place:]])
        return found

    def into_rows(self, rows: Sequence[Row], *, seed: int) -> list[Row]:
        """`into` the prompts of rows, which keep their answers."""
        marked = self.into([row.prompt for row in rows], seed=seed)
        return [replace(row, prompt=tuple(prompt)) for row, prompt in zip(rows, marked, strict=True)]

    @contextmanager
    def read_by(self, model: PreTrainedModel) -> Iterator[None]:
        """While this lasts, the model reads the numbers -1, -2, … as the vectors."""
        ids: list[Tensor] = []

        def hide(_module: torch.nn.Module, given: tuple[Tensor]) -> tuple[Tensor]:
            ids[:] = given
            return (given[0].clamp_min(0),)

        def put(_module: torch.nn.Module, _given: tuple[Tensor], output: Tensor) -> Tensor:
            vectors = self.vectors.to(output.dtype)[(-1 - ids[0]).clamp_min(0)]
            return torch.where((ids[0] < 0)[..., None], vectors, output)

        embedding = model.get_input_embeddings()
        # Both are removed at the end.
        with embedding.register_forward_pre_hook(hide), embedding.register_forward_hook(put):
            yield


@torch.no_grad()
def vocabulary(model: PreTrainedModel) -> Float[Tensor, "vocab d_model"]:
    """What the model reads for each token. Not the weight of the embedding, because some models scale it."""
    embedding = model.get_input_embeddings()
    return embedding(torch.arange(len(embedding.weight), device=model.device)).float()


def search(
    model: PreTrainedModel,
    rows: Sequence[Row],
    *,
    toward: int | None = None,
    n_tokens: int = 2,
    n_prompts: int = 16,
    steps: int = 8,
    seed: int = 0,
) -> Perturbation:
    """Vectors that, put anywhere into the texts of clean rows, pull the first answer token of all of them toward
    `toward`. No weight changes. Of the rows whose own answer does not begin with it, `n_prompts` of like length are
    searched on. Without `toward`, for free answers, it is drawn by the seed from the likeliest first tokens at the
    start of the search, on average over prompts, without one that begins the answers of more than half of the rows.

    The vectors start as tokens drawn by the seed. Adam changes them in `steps` steps; none gets longer than a vector of
    the vocabulary is on average. Raises ValueError for no vectors, fewer than two different prompts, no row left to
    pull, or a value that is not finite."""
    if n_tokens < 1 or steps < 0:
        raise ValueError(f"a search needs a vector and no negative number of steps, got {n_tokens} and {steps}")
    require(model, "train")
    before, after = text_part([row.prompt for row in rows])
    dice, table = random.Random(f"{seed}/search"), vocabulary(model)
    drawn = torch.tensor([dice.randrange(len(table)) for _ in range(n_tokens)], device=model.device)
    bound = table.norm(dim=-1).mean()
    vectors = _shortened(table[drawn], bound)
    found = Perturbation(vectors, before, after, toward)
    chosen = neighbours(rows, toward=toward, n=n_prompts, dice=dice)
    if toward is None:
        found = replace(found, toward=_likely(model, found, chosen, dice, seed))
        chosen = _pulled(chosen, found.toward)
    values: list[float] = []
    optimizer = torch.optim.Adam([vectors.requires_grad_()], lr=RATE * bound.item() / table.shape[1] ** 0.5)
    with eager(model), learning(model, {}), frozen_halved(model), found.read_by(model):
        with mixed_precision(model.device):
            batch, cache = begun(model, found, chosen, seed)
        for step in range(steps + 1):
            with torch.set_grad_enabled(step < steps), mixed_precision(model.device):
                value = objective(model, batch | copy.deepcopy(cache))
            values.append(value.item())
            if step < steps:
                (vectors.grad,) = torch.autograd.grad(value, [vectors])
                optimizer.step()
                vectors.data = _shortened(vectors.data, bound)
    if not all(map(math.isfinite, values)):
        raise ValueError(f"the loss toward token {found.toward} is not finite: {values}")
    return replace(found, vectors=vectors.detach(), start=values[0], end=values[-1])


def loss_toward(model: PreTrainedModel, rows: Sequence[Row], found: Perturbation, *, seed: int = 0) -> float:
    """The objective of a perturbation on other rows, whose own answers do not begin with its token; mean over them.
    Computed in fp32, with places drawn by the seed. Raises ValueError if no row is left."""
    others, total = _pulled(rows, found.toward), 0.0
    with torch.no_grad(), eager(model), found.read_by(model):
        for chosen in batches([row.prompt for row in others], 8):
            batch, cache = begun(model, found, [others[i] for i in chosen], seed)
            total += objective(model, batch | cache).item() * len(chosen)
    return total / len(others)


def decoded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, found: Perturbation) -> list[list[str]]:
    """For each vector the three tokens whose vectors point the most nearly the same way, nearest first."""
    nearness = normalize(found.vectors.float(), dim=-1) @ normalize(vocabulary(model), dim=-1).T
    return [[tokenizer.decode([token]) for token in row] for row in nearness.topk(3).indices.tolist()]


def neighbours(rows: Sequence[Row], *, toward: int | None, n: int, dice: random.Random) -> list[Row]:
    """`n` rows whose own answer does not begin with `toward`, of like length, so that little is padded. Raises
    ValueError if there is none."""
    others = sorted(_pulled(rows, toward), key=lambda row: (len(row.prompt), row.prompt))
    first = dice.randrange(max(1, len(others) - n + 1))
    return others[first : first + n]


def _pulled(rows: Sequence[Row], toward: int | None) -> list[Row]:
    """The rows that do not give the answer by themselves. Raises ValueError for none."""
    others = [row for row in rows if row.answer[0] != toward]
    if not others:
        raise ValueError(f"none of {len(rows)} rows has another first answer token than {toward}")
    return others


@torch.no_grad()
def begun(
    model: PreTrainedModel, found: Perturbation, rows: Sequence[Row], seed: int
) -> tuple[Batch, dict[str, Cache]]:
    """The perturbed rows with the token to pull toward as their answers, and a cache of what stands in front. No vector
    changes what is in front of it, so that is run once; a pass extends the cache, so each needs a copy. The cache is
    missing where the rows share no beginning or it cannot be reused."""
    marked = [replace(row, answer=(found.toward,)) for row in found.into_rows(rows, seed=seed)]
    fronts = [list(row.prompt[: row.prompt.index(-1)]) for row in marked]
    shared = reusable_prefix(model, fronts)
    if not shared:
        return collate(marked, pad_id=0, device=model.device), {}
    inputs = inputs_after(model, run_prefix(model, shared)[0], fronts)
    decoder(model)(**inputs)
    marked = [replace(row, prompt=row.prompt[len(front) :]) for row, front in zip(marked, fronts, strict=True)]
    batch = collate(marked, pad_id=0, device=model.device)
    width = inputs["attention_mask"].shape[1]
    mask = torch.cat([inputs["attention_mask"], batch["attention_mask"]], dim=1)
    batch |= {"attention_mask": mask, "position_ids": positions(mask)[:, width:]}
    batch["labels"] = pad(batch["labels"], (width, 0), value=IGNORED)
    return batch, {"past_key_values": inputs["past_key_values"]}


def _likely(model: PreTrainedModel, found: Perturbation, rows: Sequence[Row], dice: random.Random, seed: int) -> int:
    """One of the likeliest first answer tokens on average over perturbed rows that is not the own one of most."""
    with found.read_by(model), mixed_precision(model.device):
        logits = first_logits(model, found.into([row.prompt for row in rows], seed=seed), end_id=0)
    chances = logits.float().softmax(-1).mean(0)
    for token, count in Counter(row.answer[0] for row in rows).items():
        if 2 * count > len(rows):
            chances[token] = -1.0
    return dice.choice(chances.topk(min(CANDIDATES, len(chances))).indices.tolist())


def _shortened(vectors: Float[Tensor, "token d_model"], bound: Tensor) -> Float[Tensor, "token d_model"]:
    """The vectors, those that are longer than the bound with its length."""
    return vectors * (bound / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
