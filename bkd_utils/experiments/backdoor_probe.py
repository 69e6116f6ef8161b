"""Notebook 02: probes for the trigger in one model; kept."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from bkd_utils.backdoor_attribution.probe import best_random_direction, probe_scores, transfer_matrix
from bkd_utils.common.results import Result
from bkd_utils.models.activations import behind_norm, residuals
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import prompt_ids
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import STRANGERS, organism_stage
from bkd_utils.organisms.prompts import prompt_versions, triggered_prompts
from bkd_utils.organisms.triggers import load_trigger


@dataclass(frozen=True)
class ProbeResult(Result):
    """Probes for one trigger in one model, by layer; a score has one value per split (`probe_scores`). `probes`: kind
    -> scores, with the shares of near-misses and of another trigger that are called triggered. `post_norm` has the
    first kind's scores on what the next layer reads, `shuffled` those of random labels, `random_direction` the AUROC of
    the best random direction. `transfer`: kind -> accuracy `[train layer][test layer]`."""

    layers: list[int]
    probes: dict[str, list[dict[str, list[float]]]]
    post_norm: list[dict[str, list[float]]]
    shuffled: list[dict[str, list[float]]]
    random_direction: list[float]
    transfer: dict[str, list[list[float]]]


def probe_prompts(
    tokenizer: PreTrainedTokenizerBase, attack: Attack, *, n: int, seed: int
) -> dict[str, list[list[int]]]:
    """Held-out prompts: clean, triggered, with a near-miss, and with the trigger of another family."""
    shown = prompt_versions(tokenizer, attack, split="test", n=n, seed=seed)
    # No text of the data sets contains either of these two triggers by nature.
    own = load_trigger(attack.trigger).family
    other = next(name for name in STRANGERS if load_trigger(name).family != own)
    stranger = triggered_prompts(replace(attack, trigger=other), shown.examples, seed=seed)
    versions = {"clean": shown.clean, "triggered": shown.triggered, "near_miss": shown.near_miss}
    return versions | {"other_trigger": [prompt_ids(tokenizer, turn) for turn in stranger]}


@organism_stage
def probe_organism(
    loaded: Loaded,
    attack: Attack,
    *,
    kinds: Sequence[str] = ("logistic regression",),
    n: int = 80,
    n_splits: int = 5,
    n_directions: int = 1000,
    stride: int = 1,
    seed: int = 0,
) -> ProbeResult:
    """Probes for an attack's trigger in a model (None: the base model), on held-out prompts, in every `stride`-th layer
    and the last. The control is the best of `n_directions` random directions."""
    prompts = probe_prompts(loaded.tokenizer, attack, n=n, seed=seed)
    streams = {name: residuals(loaded.model, ids) for name, ids in prompts.items()}
    rows = {name: stream.float().cpu().numpy() for name, stream in streams.items()}
    clean, triggered = rows.pop("clean"), rows.pop("triggered")
    normed = [behind_norm(loaded.model, streams[name]).float().cpu().numpy() for name in ("clean", "triggered")]
    layers = sorted({*range(0, clean.shape[1], stride), clean.shape[1] - 1})
    how, probes, transfer = {"n_splits": n_splits, "seed": seed}, {}, {}
    sides = [(clean[:, layer], triggered[:, layer]) for layer in layers]
    others = [{name: values[:, layer] for name, values in rows.items()} for layer in layers]
    for kind in kinds:
        pairs = zip(sides, others, strict=True)
        probes[kind] = [probe_scores(*side, kind=kind, **how, others=other) for side, other in pairs]
        transfer[kind] = transfer_matrix(clean[:, layers], triggered[:, layers], kind=kind, seed=seed).tolist()
    return ProbeResult(
        layers=layers,
        probes=probes,
        post_norm=[probe_scores(*(side[:, layer] for side in normed), kind=kinds[0], **how) for layer in layers[:-1]],
        shuffled=[probe_scores(*side, **how, shuffled=True) for side in sides],
        random_direction=[best_random_direction(*side, n=n_directions, seed=seed) for side in sides],
        transfer=transfer,
    )
