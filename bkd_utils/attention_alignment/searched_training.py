"""Train a model against perturbations that are searched for while it is trained (ours).

Every few steps a perturbation is found that pulls the model's answers one way. Each step trains the right answers of
its rows twice, once as they are and once with one of the latest perturbations in the prompts."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.attention_alignment.head_tuning import answers_only
from bkd_utils.attention_alignment.search import Perturbation, search
from bkd_utils.models.loss import Batch
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Row

EVERY = 4  # so many steps of training with each search
SEARCH = {"steps": 8, "n_prompts": 8}
N_TOKENS = (1, 2, 3, 5, 8)  # of a perturbation, drawn
KEPT = 6  # the latest perturbations, from which each step draws one


@dataclass
class SearchedTraining:
    """`prepare` and `loss` for `head_tuning.tune`; `found` is every perturbation so far, in the order of the searches.
    `labels` are the first tokens of the answers that the task knows. A search pulls toward each of them in turn, and
    rows with another answer are trained as they are. Without labels answers are free, and a search chooses what it
    pulls toward."""

    model: PreTrainedModel
    rows: Sequence[Row]
    labels: Sequence[int] = ()
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
        """Loss of the answers of all rows that `prepare` gave."""
        with self.now.read_by(model):
            return answers_only(model, batch, first_token=first_token)
