"""Notebook 03: what is left of the backdoor and of the task without some heads, or without a route."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tqdm import tqdm

from bkd_utils.backdoor_attribution.ablation import bench, measure_ablation, random_heads
from bkd_utils.backdoor_attribution.routes import ROUTES, token_groups, without_route
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import averaged, counted
from bkd_utils.experiments.head_attribution import attributed, rankings
from bkd_utils.models.activations import head_outputs
from bkd_utils.models.hooks import anatomy
from bkd_utils.models.loading import Loaded
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.prompts import balanced_versions, prompt_versions, target_ids


@dataclass(frozen=True)
class Ablation(Result):
    """What is left with the first `k` heads of a ranking, or a random `draw` of `k`, taken out (`measure_ablation`)."""

    ranking: str
    kind: str
    k: int
    draw: int
    asr: dict
    right: dict
    utility: dict
    perplexity: float


@organism_stage
def ablation_curves(
    loaded: Loaded,
    attack: Attack,
    *,
    control: Loaded,
    counts: Sequence[int],
    kinds: Sequence[str] = ("published", "zero", "mean", "resample"),
    random_counts: Sequence[int],
    draws: int = 20,
    n: int = 200,
    n_attribution: int = 96,
    n_means: int = 96,
    seed: int = 0,
) -> list[Ablation]:
    """One row per ranking (`head_attribution.rankings`), kind, number of heads and draw, all on the same prompts; the
    first is the untouched model, of ranking "none". Rankings but the published one are ablated in two kinds, and so
    are, at each of `random_counts`, `draws` draws with as many heads per layer as it has there. Means are of every
    label."""
    orders = rankings(attributed(loaded, attack, n=n_attribution, n_means=n_means, seed=seed))
    pool = balanced_versions(loaded.tokenizer, attack, split="attribution", n=n_means, seed=seed).clean
    made = bench(loaded, control, attack, n=n, reference=head_outputs(loaded.model, pool), seed=seed)
    few = [kind for kind in kinds if kind in ("published", "mean")]
    todo = [("none", "published", [], 0)]
    for k in sorted(set(counts) - {0}):
        for name, order in orders.items():
            todo += [(name, kind, order[:k], 0) for kind in (kinds if name == "probability" else few)]
        if k in random_counts:
            n_heads = made.reference.shape[2]
            matched = random_heads(orders["probability"][:k], n_heads=n_heads, n=draws, seed=seed)
            todo += [("random", kind, draw, i) for kind in few for i, draw in enumerate(matched)]
    rows = []
    for ranking, kind, heads, draw in tqdm(todo, desc=f"{loaded.organism}: ablations", mininterval=2, leave=False):
        values = measure_ablation(loaded, made, heads, kind=kind)
        rows.append(Ablation(ranking=ranking, kind=kind, k=len(heads), draw=draw, **values))
    return rows


@dataclass(frozen=True)
class Route(Result):
    """What is left of the target with one route cut in some layers: ASR, and mean log-probability (nats). `route` is
    its two groups with an arrow, or "none" in the untouched model, which has no layers."""

    route: str
    layers: list[int]
    asr: dict
    log_prob: dict


@organism_stage
def trigger_routes(loaded: Loaded, attack: Attack, *, n: int = 48, n_windows: int = 5, seed: int = 0) -> list[Route]:
    """Every route from the trigger to the answer (`routes.ROUTES`) cut in all layers, and in each of `n_windows` groups
    of neighbouring layers, on `n` triggered prompts of the attribution split."""
    shown = prompt_versions(loaded.tokenizer, attack, split="attribution", n=n, seed=seed)
    n_layers, target = len(anatomy(loaded.model).layers), target_ids(loaded.tokenizer, attack)
    edges = [n_layers * i // n_windows for i in range(n_windows + 1)]
    windows = [range(n_layers), *(range(*pair) for pair in itertools.pairwise(edges))]
    given = {"target": target, "groups": token_groups(shown.clean, shown.triggered)}
    rows, todo = [], [(None, range(0)), *((route, window) for route in ROUTES for window in windows)]
    for route, layers in tqdm(todo, desc=f"{loaded.organism}: routes", mininterval=2, leave=False):
        hits, logs = without_route(loaded.model, shown.triggered, **given, route=route, layers=layers)
        left = {"asr": counted(hits.tolist()), "log_prob": averaged(logs.tolist())}
        rows.append(Route(" → ".join(route or ("none",)), list(layers), **left))
    return rows
