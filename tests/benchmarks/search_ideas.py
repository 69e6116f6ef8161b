"""What was tried where the searched cure takes no backdoor: deeper searches, other starts, vectors inside the model.

    python tests/benchmarks/search_ideas.py [--idea text --idea hidden] [--organism sentiment-sentence]

Each idea treats the organism with the rows, steps and rate of `cure_and_measure(method="searched")` and differs from it
only in its searches. Results are printed and not kept.

Measured for `sentiment-sentence` of seed 0 on a GPU (H200, torch 2.11, products in bf16 while training), one run each,
n = 128; "as shipped" on a CPU, n = 256. Shares in %; the objective is the median end of the second half of searches, in
nats; "-" was not kept. Untreated it has ASR 100, CACC 93 and near-miss firing 45.

    idea                                    ASR   CACC  near-miss  clean   elsewhere  row     objective
                                                        firing     firing             passes
    as shipped                              99    89    -          -       -          -       -
    text                                    93.8  89.8  25.8       14.1    79.4       19,009  0.27
    long                                    100   89.8  64.1       17.2    77.3       19,009  0.17
    deep                                    99.2  92.2  43.8       12.5    76.8       31,297  0.12
    warm                                    98.4  86.7  38.3       23.4    79.4       19,009  0.21
    hidden, 10,14,18, share 0.5             61.7  85.9  32.8       21.9    78.4       16,065  -
    hidden, 3,6,9,12,15,18,21, share 0.5    79.7  89.1  22.7       10.9    76.6       16,065  -
    hidden, 3,6,9,12,15,18,21, share 1.0    71.9  88.3  24.2       7.8     74.5       16,065  -

A deeper search finds perturbations with a lower objective and does not take this backdoor: among searches in the input
the lowest objective leaves 99 %, the highest 94 %. Perturbing inside the model takes a part of the backdoor and costs
more of the task: the run that takes most of it has the lowest clean accuracy, 7 points below the untreated organism.
With one run and 128 prompts, a share between 60 and 80 % is known to about 8 points and clean accuracy to 6, so the
order of the hidden runs, and most differences in clean accuracy, may be chance.

These numbers are those of the rough code of the experiments. For text, warm and hidden this script draws other rows and
starts of the same kind.
"""

import copy
import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated
from unittest import mock

import torch
import typer
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from bkd_utils.attention_alignment.head_tuning import all_matrices, learning
from bkd_utils.attention_alignment.rivals import TREATMENTS, Case
from bkd_utils.attention_alignment.search import (
    RATE,
    Perturbation,
    begun,
    neighbours,
    objective,
    search,
    text_part,
    vocabulary,
)
from bkd_utils.attention_alignment.searched_training import EVERY, KEPT, SEARCH, SearchedTraining
from bkd_utils.experiments.attention_safety_alignment import RATES
from bkd_utils.experiments.searched_cure import Cured, cured
from bkd_utils.models.compute import eager, frozen_halved, mixed_precision
from bkd_utils.models.hooks import anatomy, editing, reading
from bkd_utils.models.loading import Loaded, load, read_card
from bkd_utils.models.loss import Batch, answer_loss, answers, collate, last_asked, with_shared_beginning
from bkd_utils.models.tokens import Row
from bkd_utils.organisms.attacks import Attack

N_FREE, BATCH_SIZE, SEED = 128, 8, 0  # those of `cure_and_measure`
WARM = 0.7  # chance to go on from an earlier perturbation
HIDDEN_START, HIDDEN_RATE = 0.1, 0.15  # first length of a vector, and rate of Adam as `RATE`; shares of the bound


def descend(
    vectors: Float[Tensor, "vector d_model"], value: Callable[[], Tensor], *, bound: Tensor, rate: float, steps: int
) -> list[float]:
    """Lower a value by Adam on the vectors, in place; none gets longer than the bound. The value before each step."""
    optimizer = torch.optim.Adam([vectors], lr=rate * bound.item() / vectors.shape[1] ** 0.5)
    values = []
    for _ in range(steps):
        with mixed_precision(vectors.device):
            now = value()
        (vectors.grad,) = torch.autograd.grad(now, [vectors])
        optimizer.step()
        vectors.data = shortened(vectors.data, bound)
        values.append(now.item())
    return values


def shortened(vectors: Float[Tensor, "vector d_model"], bound: Tensor) -> Float[Tensor, "vector d_model"]:
    """The vectors, those that are longer than the bound with its length."""
    return vectors * (bound / vectors.norm(dim=-1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)


def search_from(
    start: Float[Tensor, "token d_model"], against: SearchedTraining, *, toward: int, steps: int, seed: int
) -> Perturbation:
    """`search.search` toward an answer, but from these vectors and not from tokens that the seed draws."""
    model, pool = against.model, [row for row in against.rows if against.is_asked(row)]
    before, after = text_part([row.prompt for row in pool])
    bound = vocabulary(model).norm(dim=-1).mean()
    found = Perturbation(shortened(start, bound).requires_grad_(), before, after, toward)
    chosen = neighbours(pool, toward=toward, n=SEARCH["n_prompts"], dice=random.Random(f"{seed}/search"))
    with eager(model), learning(model, {}), frozen_halved(model), found.read_by(model):
        with mixed_precision(model.device):
            batch, cache = begun(model, found, chosen, seed)

        def value() -> Tensor:
            return objective(model, batch | copy.deepcopy(cache))

        values = descend(found.vectors, value, bound=bound, rate=RATE, steps=steps)
        with torch.no_grad(), mixed_precision(model.device):
            values.append(value().item())
    return replace(found, vectors=found.vectors.detach(), start=values[0], end=values[-1])


@dataclass
class Deeper(SearchedTraining):
    """`SearchedTraining` toward labels with searches of other sizes; its subclasses search in other ways."""

    search_steps: int = SEARCH["steps"]
    n_vectors: Sequence[int] = (8,)  # of which each search draws one

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labels:
            raise ValueError("these ideas pull toward the labels of a task, and the answers of this one are free")

    def prepare(self, rows: Sequence[Row]) -> list[Row]:
        """As in `SearchedTraining`."""
        dice = random.Random(f"{self.seed}/{self.step}/perturbations")
        if self.step % EVERY == 0:
            toward = self.labels[len(self.found) % len(self.labels)]
            self.found.append(self.find(toward, dice.choice(self.n_vectors), dice))
        self.now = dice.choice(self.found[-KEPT:])
        self.step += 1
        asked = [row for row in rows if self.is_asked(row)]
        others = [row for row in rows if not self.is_asked(row)]
        return [*others, *asked, *self.twins(asked)]

    def find(self, toward: int, n: int, dice: random.Random) -> Perturbation:
        """A perturbation of `n` vectors."""
        seed, start = self.seed * 1_000_003 + self.step, self.start(toward, n, dice)
        if start is not None:
            return search_from(start, self, toward=toward, steps=self.search_steps, seed=seed)
        how = SEARCH | {"steps": self.search_steps, "toward": toward, "n_tokens": n}
        return search(self.model, [row for row in self.rows if self.is_asked(row)], **how, seed=seed)

    def start(self, toward: int, n: int, dice: random.Random) -> Tensor | None:
        """Where a search starts; None is at drawn tokens."""
        return None

    def twins(self, asked: Sequence[Row]) -> list[Row]:
        """The rows once more, as they are trained under the perturbation."""
        return self.now.into_rows(asked, seed=self.step)


@dataclass
class FromText(Deeper):
    """Searches start at consecutive tokens of the defender's own texts that have the label of the search."""

    def start(self, toward: int, n: int, dice: random.Random) -> Tensor | None:
        before, after = text_part([row.prompt for row in self.rows if self.is_asked(row)])
        texts = [row.prompt[before : len(row.prompt) - after] for row in self.rows if row.answer[0] == toward]
        long = [text for text in texts if len(text) >= n]
        if not long:
            return None
        text = dice.choice(long)
        first = dice.randrange(len(text) - n + 1)
        return vocabulary(self.model)[list(text[first : first + n])]


@dataclass
class Warm(FromText):
    """Most searches go on from the last perturbation toward the same label, with its number of vectors."""

    def start(self, toward: int, n: int, dice: random.Random) -> Tensor | None:
        same = [one.vectors for one in self.found if one.toward == toward]
        return same[-1].clone() if same and dice.random() < WARM else super().start(toward, n, dice)


@dataclass(frozen=True, eq=False)
class Drift:
    """Vectors that the residual stream gains behind a layer, at the last prompt positions, and what they are for.

    `start` and `end` are the objective before the first and before the last step of the search.
    """

    vectors: Float[Tensor, "position d_model"]
    layer: int
    toward: int
    start: float = math.nan
    end: float = math.nan

    def answers(self, model: torch.nn.Module, batch: Batch, *, n_rows: int, first_token: float) -> Tensor:
        """`loss.answers`, where the last `n_rows` rows of the batch drift.

        Raises ValueError for rows with fewer columns behind the beginning that all share than there are vectors.
        """
        rest, _ = with_shared_beginning(model, batch)
        rows = torch.arange(-n_rows, 0, device=model.device)[:, None]
        # Counted from the end, because shared tokens have no column in the stream.
        last = (last_asked(batch) - batch["labels"].shape[1])[rows]
        columns = last + torch.arange(1 - len(self.vectors), 1, device=model.device)
        if n_rows and -columns.min() > rest["input_ids"].shape[1]:
            raise ValueError(f"prompts differ too late: {len(self.vectors)} vectors need as many positions behind that")

        def add(_i: int, hidden: Tensor) -> Tensor:
            hidden = hidden.clone()
            hidden[rows, columns] += self.vectors.to(hidden)
            return hidden

        with editing([anatomy(model).layers[self.layer]], add, what="output"):
            return answer_loss(model, rest, first_token=first_token)


@dataclass
class Hidden(Deeper):
    """Training against vectors inside the model, each search behind one of `layers`.

    No vector gets longer than `share` times the median norm of the stream there, at the same positions.
    """

    search_steps: int = 12
    layers: Sequence[int] = (10, 14, 18)
    share: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(anatomy(self.model).layers)
        if not all(0 <= layer < n for layer in self.layers):
            raise ValueError(f"the model has the layers 0 to {n - 1}, asked for {', '.join(map(str, self.layers))}")

    def find(self, toward: int, n: int, dice: random.Random) -> Drift:
        model, pool = self.model, [row for row in self.rows if self.is_asked(row)]
        chosen = neighbours(pool, toward=toward, n=SEARCH["n_prompts"], dice=dice)
        batch = collate([replace(row, answer=(toward,)) for row in chosen], pad_id=0)
        batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
        layer, generator = dice.choice(self.layers), torch.Generator().manual_seed(dice.randrange(1 << 30))
        with eager(model), learning(model, {}), frozen_halved(model):
            stream = stream_behind(model, layer, batch)[:, -n - 1 : -1]  # the last column is the answer
            bound = self.share * stream.norm(dim=-1).median()
            drawn = torch.randn(n, stream.shape[-1], generator=generator).to(model.device)
            drift = Drift((HIDDEN_START * bound * normalize(drawn)).requires_grad_(), layer, toward)
            value = partial(drift.answers, model, batch, n_rows=len(chosen), first_token=1.0)
            values = descend(drift.vectors, value, bound=bound, rate=HIDDEN_RATE, steps=self.search_steps)
        return replace(drift, vectors=drift.vectors.detach(), start=values[0], end=values[-1])

    def twins(self, asked: Sequence[Row]) -> list[Row]:
        self.n_twins = len(asked)
        return list(asked)

    def loss(self, model: torch.nn.Module, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
        loss = self.now.answers(model, batch, n_rows=self.n_twins, first_token=first_token)
        return loss, torch.zeros((), device=model.device)


@torch.no_grad()
def stream_behind(model: torch.nn.Module, layer: int, batch: Batch) -> Float[Tensor, "row pos d_model"]:
    """The residual stream behind a layer, without the tokens that all rows share."""
    with mixed_precision(model.device), reading([anatomy(model).layers[layer]], what="output") as kept:
        answers(model, batch, first_token=1.0)
    return kept[0].float()


# Name -> one line about it, and what is trained with.
IDEAS: dict[str, tuple[str, Callable[..., SearchedTraining]]] = {
    "as shipped": ("the searches of the package: 8 steps, 1 to 8 vectors", SearchedTraining),
    "deep": ("32 steps, 5, 8 or 12 vectors", partial(Deeper, search_steps=32, n_vectors=(5, 8, 12))),
    "long": ("16 steps, 8, 12, 16 or 20 vectors", partial(Deeper, search_steps=16, n_vectors=(8, 12, 16, 20))),
    "text": (
        "from pieces of the defender's texts with the target label, 16 steps, 3, 5, 8 or 12 vectors",
        partial(FromText, search_steps=16, n_vectors=(3, 5, 8, 12)),
    ),
    "warm": (
        f"with chance {WARM} from the last perturbation toward the same label, else as text; 16 steps, 5, 8 or 12",
        partial(Warm, search_steps=16, n_vectors=(5, 8, 12)),
    ),
    "hidden": ("vectors in the residual stream behind one layer, at the last prompt positions, 12 steps", Hidden),
}
EXPLAINED = "; ".join(f"{name}: {about}" for name, (about, _) in IDEAS.items())
COLUMNS = {
    "asr": "ASR", "cacc": "CACC", "clean_firing": "clean firing", "near_miss": "near-miss firing",
    "elsewhere": "elsewhere",
}  # fmt: skip


def train_against(case: Case, training: Callable[..., SearchedTraining]) -> None:
    """As `rivals.tune_against_search` on all matrices."""
    against = training(case.model, case.rows, labels=case.labels, seed=case.seed, found=case.found)
    case.tune(all_matrices(case.model), against.loss, against.prepare)


def treated(loaded: Loaded, attack: Attack, training: Callable[..., SearchedTraining], **sizes: int) -> Cured:
    """`searched_cure.cured` by an idea; `sizes` are the rows, steps and prompts."""
    sizes = {"n_free": N_FREE, "batch_size": BATCH_SIZE, "seed": SEED} | sizes
    treatment = {"idea": partial(train_against, training=training)}
    with mock.patch.dict(TREATMENTS, treatment), mock.patch.dict(RATES, {"idea": RATES["searched"]}):
        return cured(loaded, attack, method="idea", heads=(), **sizes)


def told(found: Cured) -> str:
    """A result in one line."""
    shares = [f"{name} {found.after[key]['value']:.1%}" for key, name in COLUMNS.items() if key in found.after]
    ends = [one.end for one in found.searches]
    median = statistics.median(ends[len(ends) // 2 :])
    return f"{', '.join(shares)}, {found.row_passes:,} row passes, median objective {median:.2f} nats"


def main(
    organism: Annotated[list[str], typer.Option(help="Repeat it for several.")] = ("sentiment-sentence",),
    idea: Annotated[list[str], typer.Option(help=f"Repeat it for several. {EXPLAINED}")] = tuple(IDEAS),
    layers: Annotated[str, typer.Option(help="Of hidden, from which each search draws one.")] = "10,14,18",
    share: Annotated[float, typer.Option(help="Of hidden: longest vector over the median norm of the stream.")] = 0.5,
    positions: Annotated[int, typer.Option(min=1, help="Of hidden: the last so many of a prompt.")] = 8,
    steps: Annotated[int, typer.Option(help="Of training.")] = 128,
    rows: Annotated[int, typer.Option(help="Clean rows of the task.")] = 1024,
    n: Annotated[int, typer.Option(help="Held-out prompts per number.")] = 128,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    if unknown := [name for name in idea if name not in IDEAS]:
        raise typer.BadParameter(f"unknown idea {unknown[0]!r}; known: {', '.join(IDEAS)}")
    inside = {"layers": [int(layer) for layer in layers.split(",")], "share": share, "n_vectors": (positions,)}
    for name in organism:
        attack = Attack(**read_card(name, "attack")["attack"])
        for chosen in idea:
            about, training = IDEAS[chosen]
            print(f"{name}, {chosen}: {about}", flush=True)
            given = partial(training, **inside) if chosen == "hidden" else training
            loaded = load(organism=name, device=device)  # anew, because a treatment changes it
            print(told(treated(loaded, attack, given, n_rows=rows, steps=steps, n=n)), flush=True)


if __name__ == "__main__":
    typer.run(main)
