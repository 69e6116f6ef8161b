"""Train a model against perturbations that are searched for while it is trained (ours).

Every few steps a perturbation is found that pulls the model's answers one way. Each step trains the right answers of
its rows twice, once as they are and once with one of the latest perturbations in the prompts.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.attention_alignment.alignment import TINY
from bkd_utils.attention_alignment.head_tuning import answers_only
from bkd_utils.attention_alignment.search import Perturbation, search
from bkd_utils.models.hooks import Head, by_layer
from bkd_utils.models.loss import Batch, answers_and_maps, last_asked
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Row

EVERY = 4  # so many steps of training with each search
SEARCH = {"steps": 8, "n_prompts": 8}
N_TOKENS = (1, 2, 3, 5, 8)  # of a perturbation, drawn
KEPT = 6  # the latest perturbations, from which each step draws one
BETA = 1.0  # weight of the pull on attention


@dataclass
class SearchedTraining:
    """`prepare` and `loss` for `head_tuning.tune`; `found` is every perturbation so far, in the order of the searches.

    `labels` are the first tokens of the answers that the task knows. A search pulls toward each of them in turn, and
    rows with another answer are trained as they are. Without labels answers are free, and a search chooses what it
    pulls toward. With `heads`, the attention of these heads under a perturbation is pulled to what it is without.
    """

    model: PreTrainedModel
    rows: Sequence[Row]
    labels: Sequence[int] = ()
    heads: Sequence[Head] = ()
    seed: int = 0
    found: list[Perturbation] = field(default_factory=list)
    step: int = 0

    def __post_init__(self) -> None:
        # Not first in a search, which would test a model of which `tune` holds matrices in bf16.
        require(self.model, "train")

    def prepare(self, rows: Sequence[Row]) -> list[Row]:
        """The rows of the next step: those that stay as they are, the others, and these once more, perturbed."""
        dice = random.Random(f"{self.seed}/{self.step}/perturbations")
        if self.step % EVERY == 0:
            toward = self.labels[len(self.found) % len(self.labels)] if self.labels else None
            how = SEARCH | {"toward": toward, "n_tokens": dice.choice(N_TOKENS)}
            pool, seed = [row for row in self.rows if self.is_asked(row)], self.seed * 1_000_003 + self.step
            self.found.append(search(self.model, pool, **how, seed=seed))
        self.now = dice.choice(self.found[-KEPT:])
        self.step += 1
        asked = [row for row in rows if self.is_asked(row)]
        others = [row for row in rows if not self.is_asked(row)]
        return [*others, *asked, *self.now.into_rows(asked, seed=self.step)]

    def is_asked(self, row: Row) -> bool:
        """Is it a row of the task that the searches are about?"""
        return not self.labels or row.answer[0] in self.labels

    def loss(self, model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
        """Loss of the answers of all rows that `prepare` gave, and the pull on the attention of `heads`."""
        with self.now.read_by(model):
            if not self.heads:
                return answers_only(model, batch, first_token=first_token)
            loss, maps, real = answers_and_maps(model, batch, first_token=first_token)
        chosen = by_layer(self.heads, n_layers=len(maps), n_heads=maps[0].shape[1])
        return loss, BETA * attention_drift(maps, real, batch, chosen)


def attention_drift(maps: Sequence[Tensor], real: Tensor, batch: Batch, heads: Mapping[int, Sequence[int]]) -> Tensor:
    """How far heads look elsewhere from the asking token when a prompt is perturbed, in nats.

    The last rows of the batch are perturbed, and the same number of rows before them are their twins, in that order.
    Per twin and head it is KL(attention without || attention with the perturbation), the latter renormalised over the
    tokens that both have, and the former without gradient; the mean over heads and twins, then over layers. `maps` and
    `real` are those of `answers_and_maps`; `heads` is layer -> heads. 0 for a batch without a perturbed row.
    """
    n = int((batch["input_ids"] < 0).any(1).sum())
    if not n:
        return torch.zeros((), device=real.device)
    # Maps may have another order of columns than the batch, but a row's tokens are in the same order in both.
    common = real.clone()
    common[real] = (batch["input_ids"] >= 0)[batch["attention_mask"].bool()]
    rows, asked, losses = torch.arange(len(real)), last_asked(batch), []
    for layer, chosen in heads.items():
        looks = maps[layer][:, list(chosen)][rows, :, asked].float() * common[:, None]
        looks = (looks / looks.sum(-1, keepdim=True).clamp_min(TINY)).transpose(1, 2)  # [row, key, head]
        own, perturbed = (looks[part][common[part]] for part in (slice(-2 * n, -n), slice(-n, None)))
        own = own.detach()
        losses.append((own * ((own + TINY).log() - (perturbed + TINY).log())).sum() / (n * len(chosen)))
    return torch.stack(losses).mean()
