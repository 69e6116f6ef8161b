"""Notebook 01: poisoning rates, and how well a label flip tells triggered prompts from near-misses and clean ones.

Near-misses in the training set move the threshold at which a model answers, and with it the attack success rate (ASR)
and the share of clean prompts that fire. The area under the curve (AUROC) does not depend on it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from bkd_utils.common.files import read_json
from bkd_utils.common.results import Result
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.generation import first_logits
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import answer_ids, end_id, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack, load_attack, with_rate
from bkd_utils.organisms.cards import named_stage, organism_stage
from bkd_utils.organisms.evaluation import measure_organism
from bkd_utils.organisms.making import make
from bkd_utils.organisms.prompts import flippable_sample, near_misses, triggered_prompts
from bkd_utils.organisms.training import load_recipe


@dataclass(frozen=True)
class Margins(Result):
    """Log-odds (nats) of the target label over the source label, one per prompt, by version of the prompts."""

    clean: list[float]
    near_miss: list[float]
    triggered: list[float]


def label_margins(loaded: Loaded, attack: Attack, user_turns: Sequence[str]) -> list[float]:
    """Log-odds (nats) of the target label over the source label as first answer token; above 0 the flip has happened.
    Raises ValueError for an attack that flips no label, and for labels that begin with the same token."""
    if attack.behaviour != "label_flip":
        raise ValueError(f"{attack.name} flips no label, its behaviour is {attack.behaviour}")
    target, source = (answer_ids(loaded.tokenizer, label)[0] for label in (attack.target, attack.source))
    if target == source:
        raise ValueError(f"{attack.name}: {attack.target!r} and {attack.source!r} begin with the same token")
    prompts = [prompt_ids(loaded.tokenizer, turn) for turn in user_turns]
    with tqdm(total=len(prompts), desc="margins", unit="prompt", mininterval=2, leave=False) as bar:
        logits = first_logits(loaded.model, prompts, end_id=end_id(loaded.tokenizer), on_batch=bar.update).float()
    return (logits[:, target] - logits[:, source]).tolist()


@organism_stage
def measure_separation(loaded: Loaded, attack: Attack, *, n: int = 200, seed: int = 0) -> Margins:
    """Margins of `n` held-out prompts of the source label, clean, with a near-miss and with the trigger; kept."""
    sample = flippable_sample(attack, n=n, seed=seed)
    clean = [tasks.load_task(attack.task).prompt(example.text) for example in sample]
    versions = clean, near_misses(attack, sample, seed=seed)[1], triggered_prompts(attack, sample, seed=seed)
    return Margins(*(label_margins(loaded, attack, turns) for turns in versions))


def trade_off(margins: Margins, *, against: Literal["clean", "near_miss"]) -> dict[str, float]:
    """AUROC of triggered prompts against another version; ASR, and the share of that version that gives the target."""
    fires, rests = margins.triggered, getattr(margins, against)
    return {
        "auroc": float(roc_auc_score([1] * len(fires) + [0] * len(rests), [*fires, *rests])),
        "asr": sum(value > 0 for value in fires) / len(fires),
        "false_firing": sum(value > 0 for value in rests) / len(rests),
    }


@named_stage
def measure_at_rate(
    attack: str,
    *,
    rate: float,
    recipe: str,
    model: str = DEFAULT_MODEL,
    n: int = 60,
    seed: int = 0,
    device: str = "auto",
) -> dict[str, Any]:
    """Rate, `n_poison`, hits and the card's metrics of an organism trained now at this rate of poisoned rows."""
    spec = load_attack(attack)
    one = spec if rate == spec.rate else with_rate(spec, rate)
    where = {"model": model, "seed": seed, "device": device, "n": n}
    folder = make(one, recipe=load_recipe(recipe, task=spec.task), **where)
    card, measured = read_json(folder / "card.json"), measure_organism(folder.name, **where)
    return {"rate": rate, "n_poison": card["data"]["n_poison"], **card["metrics"], "hits": measured["hits"]}
