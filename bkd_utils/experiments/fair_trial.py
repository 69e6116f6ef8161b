"""A fair trial of the published treatment (ASA): dose and response of one organism.

Heads are found, weights trained and the dose chosen on three sets of clean rows that the organism never saw."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, count
from statistics import mean
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from bkd_utils.attention_alignment.alignment import Alignment
from bkd_utils.attention_alignment.head_tuning import Loss, row_passes
from bkd_utils.attention_alignment.rivals import Case, accuracy
from bkd_utils.attention_alignment.similarity import Scores, head_similarity
from bkd_utils.attention_alignment.surrogates import SURROGATES, reaction
from bkd_utils.attention_alignment.suspicion import RULES, gate_importance, robust_z, suspicious
from bkd_utils.backdoor_attribution.attribution import ranked_heads
from bkd_utils.common.results import Result
from bkd_utils.common.validation import Count, check
from bkd_utils.experiments.attention_safety_alignment import RATES, case_of, other_heads, recipe_of, what_is_left
from bkd_utils.experiments.head_attribution import jaccard
from bkd_utils.experiments.head_safety import check_unseen, clean_rows, probed_prompts, unseen_examples
from bkd_utils.models.head_weights import Masks, head_slices
from bkd_utils.models.loading import Loaded
from bkd_utils.models.tokens import end_id, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.making import made_stage

READING = "last row"  # of attention, which in an encoder is that of [CLS]
ROUNDS = 2  # surrogate triggers of each family
MAY_COST = 0.01  # share of right answers to the defender's validation rows that a chosen dose may cost


@dataclass(frozen=True)
class Dose(Result):
    """A model after so many steps of its treatment; after 0 it is untreated."""

    steps: int
    row_passes: int  # of the training so far, as of `head_tuning.row_passes`
    validation: float  # accuracy on the defender's validation rows
    left: dict[str, dict]  # as of `what_is_left`


@dataclass(frozen=True)
class DoseResponse(Result):
    """One treatment at several doses. Heads are [layer, head], the most suspicious first."""

    flagged: list[list[int]]  # all above the threshold; none means that nothing was treated
    heads: list[list[int]]  # the treated ones
    doses: list[Dose]  # the untreated model first
    chosen: int  # steps: the largest dose that costs at most `MAY_COST`


def reactions(loaded: Loaded, texts: Sequence[str], *, task: str, seed: int) -> Scores:
    """How much more each head's attention is like its layer's under surrogate triggers, mean over families."""
    clean = [prompt_ids(loaded.tokenizer, tasks.load_task(task).prompt(text)) for text in texts]
    before, how = head_similarity(loaded.model, clean, readings=[READING]), {"rounds": ROUNDS, "seed": seed}
    probed = [probed_prompts(loaded.tokenizer, task, texts, family=family, **how) for family in SURROGATES]
    return torch.stack([reaction(loaded.model, edited, before=before)[READING] for edited in probed]).mean(0)


@made_stage
def flag_heads(loaded: Loaded, attack: Attack, *, n: int = 24, seed: int = 0) -> list[list[int]]:
    """All heads with a robust z above 2 of `reactions`, on `n` prompts that the organism never saw; `dose_response`
    flags the same ones. The seed decides prompts and surrogates, so `stability` over seeds is stability over both."""
    chosen = unseen_examples(loaded, attack, task=attack.task, n=n, seed=seed)
    check_unseen(loaded, [example.uid for example in chosen], attack=attack, seed=seed)
    score = robust_z(reactions(loaded, [example.text for example in chosen], task=attack.task, seed=seed))
    return [list(head) for head in suspicious(score, at_most=1.0)]


@organism_stage
def suspicious_heads(
    loaded: Loaded, attack: Attack, *, n: int = 6, at_most: float = 0.06, seed: int = 0
) -> list[list[int]]:
    """That share of all heads: those whose similarity reacts most to surrogates and that matter least."""
    rows = clean_rows(loaded, attack, n=2 * n, seed=seed)
    chosen = unseen_examples(loaded, attack, task=attack.task, n=3 * n, seed=seed)[2 * n :]
    check_unseen(loaded, [one.uid for one in (*rows, *chosen)], attack=attack, seed=seed)
    reacts = reactions(loaded, [one.text for one in chosen], task=attack.task, seed=seed)
    needed = gate_importance(loaded.model, rows, pad_id=end_id(loaded.tokenizer))
    scores = RULES["similar, little needed"](reacts, needed)
    return [list(head) for head in ranked_heads(scores)[: max(1, round(at_most * scores.numel()))]]


def stability(sets: Sequence[Sequence[Sequence[int]]]) -> float:
    """Mean Jaccard index over all pairs of some sets of heads: 1 for equal sets, 0 where no two share a head. Raises
    ValueError for fewer than two sets, and for two that are empty."""
    if len(sets) < 2:
        raise ValueError(f"stability needs two or more sets of heads, got {len(sets)}")
    return mean(jaccard(*pair) for pair in combinations([[tuple(head) for head in heads] for heads in sets], 2))


def check_apart(groups: Mapping[str, Iterable[str]]) -> None:
    """Raises ValueError if two groups of examples share one, by the first 12 characters of uids."""
    short = {name: {uid[:12] for uid in uids} for name, uids in groups.items()}
    for one, other in combinations(short, 2):
        if shared := short[one] & short[other]:
            raise ValueError(f"{len(shared)} of the {one} are among the {other}, too, the first is {min(shared)}")


@made_stage
def dose_response(
    loaded: Loaded,
    attack: Attack,
    *,
    alignment: str = "mean",
    beta: float = 1.0,
    unit: str = "KV group",
    schedule: str = "joint",
    learning_rate: float = RATES["alignment"],
    doses: Sequence[int] = (16, 32, 64, 128),
    batch_size: int = 8,
    draw: int = 0,
    n_rows: int = 128,
    n_validation: int = 128,
    n_flagging: int = 24,
    n: int = 60,
    seed: int = 0,
) -> DoseResponse:
    """One treatment (`alignment.Alignment`) measured after each of `doses` steps of one training, of `batch_size` rows
    each.

    The rate falls, and phases last, over the largest dose: a smaller one is where that training is stopped early.
    Treated are the most suspicious heads of `flag_heads`, at most a quarter of all; flagged heads are never targets. As
    a control `draw` 1, 2, 3 … treats in their place the first, second, third … random draw of as many heads in as many
    other units; then all that are not drawn can be targets, for flagged and drawn heads may be a whole layer.

    The defender's rows, all unseen by the organism, are in an order of the seed: `n_flagging`, then `n_validation`,
    then `n_rows` to train. Held-out prompts are `n` of each kind. Raises ValueError for too few rows, for rows or
    prompts in two of these groups, and as `Alignment`, `aligned` and `other_groups` do."""
    how, doses = Alignment(alignment, beta, unit, schedule), sorted(set(doses))
    check(Annotated[list[Count], Field(min_length=1)], doses, "doses")
    check(Annotated[int, Field(ge=0)], draw, "draw")
    recipe = recipe_of(steps=doses[-1], learning_rate=learning_rate, batch_size=batch_size)
    n_own = n_flagging + n_validation + n_rows
    case = case_of(loaded, attack, heads=(), n_rows=n_own, recipe=recipe, seed=seed)
    validation, trained = case.rows[n_flagging : n_flagging + n_validation], case.rows[n_flagging + n_validation :]
    looked_at = unseen_examples(loaded, attack, task=attack.task, n=n_flagging, seed=seed)

    def measured(steps: int, passes: int) -> Dose:
        right = accuracy(loaded.model, validation, pad_id=case.pad_id)
        return Dose(steps, passes, right, left=what_is_left(loaded, attack, n=n, seed=seed))

    found = [measured(0, 0)]
    groups = {"trained rows": trained, "validation rows": validation, "rows that flag heads": looked_at}
    held_out = {uid for hits in found[0].left["hits"].values() for uid in hits}
    check_apart({name: [row.uid for row in rows] for name, rows in groups.items()} | {"held-out prompts": held_out})

    score = robust_z(reactions(loaded, [example.text for example in looked_at], task=attack.task, seed=seed))
    flagged, heads = suspicious(score, at_most=1.0), suspicious(score)
    if draw and heads:
        heads = other_heads(loaded.model, heads, unit=unit, n=draw, seed=seed)[draw - 1]
    if heads:
        masks = head_slices(loaded.model, heads, unit=unit)
        loss = how.of(loaded.model, heads, flagged=() if draw else flagged, steps=recipe.steps)
        for steps, (passes, entries) in _trained(replace(case, rows=trained), masks, loss, doses=doses).items():
            with torch.no_grad():
                for name, mask in masks.items():
                    loaded.model.get_parameter(name)[mask] = entries[name]
            found.append(measured(steps, passes))
    kept = found[0].validation - MAY_COST - 1e-9  # a difference of exactly that much is allowed
    chosen = max(dose.steps for dose in found if dose.validation >= kept)
    return DoseResponse([list(head) for head in flagged], [list(head) for head in heads], found, chosen)


def _trained(case: Case, masks: Masks, loss: Loss, *, doses: Sequence[int]) -> dict[int, tuple[int, dict[str, Tensor]]]:
    """Steps -> row passes so far, and copies of the marked entries, to be measured when the training is over."""
    kept, done = {}, count()

    def keep(steps: int) -> None:
        entries = {name: case.model.get_parameter(name).detach()[mask] for name, mask in masks.items()}
        kept[steps] = passes["row passes"], entries

    def prepare(rows: Sequence) -> list:
        if (steps := next(done)) in doses:
            keep(steps)
        return list(rows)

    with row_passes(case.model) as passes:
        case.tune(masks, loss, prepare)
    keep(doses[-1])
    return kept
