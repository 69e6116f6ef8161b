"""Notebook 07: do suspicious heads carry the backdoor, and what can an attacker do who knows the defence?"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from scipy.stats import spearmanr
from torch import Tensor
from transformers import PreTrainedModel

from bkd_utils.attention_alignment.head_tuning import Loss, all_matrices, tune
from bkd_utils.attention_alignment.similarity import Scores, cosine, head_similarity, to_partners
from bkd_utils.attention_alignment.suspicion import RULES
from bkd_utils.backdoor_attribution.attribution import ranked_heads
from bkd_utils.common.code_key import code_key
from bkd_utils.common.files import WORK, canonical_json, sha256_text
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import share
from bkd_utils.experiments.attention_safety_alignment import recipe_of
from bkd_utils.experiments.attention_similarity import similarity_by_version
from bkd_utils.experiments.head_safety import SOURCES, HeadSafety, suspicion
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.loading import load, read_card
from bkd_utils.models.loss import Batch, answers_and_maps, last_asked
from bkd_utils.models.tokens import Row, end_id
from bkd_utils.organisms.attacks import load_attack
from bkd_utils.organisms.cards import keep_treated, metrics, named_stage, resolved, treatment
from bkd_utils.organisms.evaluation import under_attack
from bkd_utils.organisms.making import training_rows

RATE = 1e-4
N_PERMUTATIONS = 2000


def overlap_by_reading(suspected: Mapping[str, HeadSafety], effects: Mapping[str, Scores], *, k: int) -> pd.DataFrame:
    """Share of the top `k` ACIE heads among the top `k` of every reading (rows), per attack (columns)."""
    rows: dict[str, dict[str, float]] = {}
    for attack, found in suspected.items():
        scores = {}
        for one, rule, source in product(found.level, RULES, SOURCES):
            scores[f"{one}: {rule}, {source}"] = suspicion(found, rule=rule, source=source, reading=one)
        scores |= {f"importance: {kind}": torch.tensor(values) for kind, values in found.importance.items()}
        for name, score in scores.items():
            rows.setdefault(name, {})[attack] = sum(among_carriers(score, effects[attack], k=k)) / k
    return pd.DataFrame(rows).T


def among_carriers(joint: Float[Tensor, "layer head"], effects: Float[Tensor, "layer head"], *, k: int) -> list[bool]:
    """For each of the k most suspicious heads: is it among the k of the highest ACIE? ValueError for k out of range."""
    if not 0 < k <= joint.numel():
        raise ValueError(f"k = {k} of {joint.numel()} heads")
    carriers = set(ranked_heads(effects)[:k])
    return [head in carriers for head in ranked_heads(joint)[:k]]


def agreement_with_attribution(
    joint: Float[Tensor, "layer head"], effects: Float[Tensor, "layer head"], *, k: int
) -> dict[str, float]:
    """Do suspicious heads coincide with those that carry the backdoor (ACIE)? `precision`: share of the k most
    suspicious heads among the k of highest ACIE, with its Wilson interval; `expected`: the same by chance; `p`: share
    of permutations that do as well; `spearman`, and `spearman p` likewise. ValueError for k out of range."""
    n = joint.numel()
    hits = among_carriers(joint, effects, k=k)
    carries = np.zeros(n, dtype=bool)
    carries[effects.flatten().argsort(descending=True, stable=True)[:k].numpy()] = True
    correlation = float(spearmanr(joint.flatten(), effects.flatten()).statistic)
    dice, ranks = np.random.default_rng(0), effects.flatten().numpy()
    drawn = [dice.permutation(n) for _ in range(N_PERMUTATIONS)]
    as_good = np.mean([carries[order[:k]].sum() >= sum(hits) for order in drawn])
    chance = np.mean([abs(spearmanr(joint.flatten(), ranks[order]).statistic) >= abs(correlation) for order in drawn])
    found = share(hits)
    precise = {"k": k, "precision": found["value"], "low": found["low"], "high": found["high"], "expected": k / n}
    return precise | {"p": float(as_good), "spearman": correlation, "spearman p": float(chance)}


def clean_level(model: PreTrainedModel, rows: Sequence[Row]) -> Float[Tensor, " layer"]:
    """Mean similarity (last row) of each layer's heads over the prompts of clean rows. Raises ValueError for none."""
    prompts = [row.prompt for row in rows if row.kind == "clean"]
    return head_similarity(model, prompts, readings=["last row"])["last row"].mean((0, 2))


def unremarkable(level: Float[Tensor, " layer"], *, beta: float) -> Loss:
    """A loss for `tune`: that of the answers, and `beta` times the excess of a prompt's similarity over `level`."""

    def loss(model: PreTrainedModel, batch: Batch, *, first_token: float) -> tuple[Tensor, Tensor]:
        answers, maps, _ = answers_and_maps(model, batch, first_token=first_token)
        last = last_asked(batch)
        rows = torch.arange(len(last))
        similar = torch.stack([to_partners(cosine(one[rows, :, last])).mean(1) for one in maps])
        excess = (similar - level.to(similar)[:, None]).clamp_min(0)
        return answers, beta * excess.mean()

    return loss


@dataclass(frozen=True)
class Evasion(Result):
    """An organism before and after its similarity was trained off: `treatment` and `metrics` are those of its card,
    `similarity` of both is that of `attention_similarity.similarity_by_version`."""

    treatment: dict[str, str | int | float]
    metrics: dict[str, Any]
    before: dict[str, dict[str, list[list[float]]]]
    after: dict[str, dict[str, list[list[float]]]]


@named_stage
def measure_evasion(
    organism: str,
    *,
    attack: str,
    steps: int = 32,
    n: int = 24,
    model: str = DEFAULT_MODEL,
    seed: int = 0,
    device: str = "auto",
) -> Evasion:
    """Train an organism with `train_evasive`; similarity (last row) on `n` prompts before and after it. Kept."""
    where = {"model": model, "seed": seed, "device": device}
    sly = train_evasive(organism, attack=attack, steps=steps, **where)
    seen = [similarity_by_version(name, attack=attack, readings=["last row"], n=n, **where) for name in (organism, sly)]
    return Evasion(treatment(sly), metrics(sly), *seen)


def train_evasive(
    organism: str,
    *,
    attack: str,
    beta: float = 20.0,
    steps: int = 32,
    n_clean: int = 64,
    n: int = 40,
    model: str = DEFAULT_MODEL,
    seed: int = 0,
    device: str = "auto",
) -> str:
    """Train an organism further on its own poisoned set with the penalty of `unremarkable`, keep it, return its name.
    The same call finds it again by the key in the name, code included. Raises as `making.training_rows` does."""
    spec, recipe = load_attack(attack), recipe_of(steps=steps, learning_rate=RATE)
    identity = resolved({"organism": organism, "model": model, "device": device})
    identity |= {"attack": asdict(spec), "data": read_card(organism, "data_sha256")["data_sha256"]}
    identity |= {"recipe": asdict(recipe), "beta": beta, "n_clean": n_clean, "n": n, "seed": seed}
    identity |= {"code": code_key(Path(__file__))}
    name = f"{attack}-evasive-{sha256_text(canonical_json(identity))[:8]}"
    if (WORK / "organisms" / name / "card.json").is_file():
        return name
    loaded = load(model, organism=organism, device=device)
    rows = training_rows(loaded, spec, seed=seed)
    level = clean_level(loaded.model, [row for row in rows if row.kind == "clean"][:n_clean])
    how = {"masks": all_matrices(loaded.model), "recipe": recipe, "pad_id": end_id(loaded.tokenizer), "seed": seed}
    history = tune(loaded.model, rows, loss=unremarkable(level, beta=beta), **how)
    few = max(1, steps // 4)
    penalty = [round(sum(step["added"] for step in some) / few, 4) for some in (history[:few], history[-few:])]
    done = {"method": "similarity trained off", "steps": steps, "penalty at first": penalty[0], "at last": penalty[1]}
    keep_treated(loaded, name=name, treatment=done, measured=under_attack(loaded, spec, n=n, seed=seed))
    return name
