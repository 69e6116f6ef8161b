"""Notebook 06: treat an organism with one method; measure what is left of backdoor and model, and what comes back."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bkd_utils.attention_alignment.head_tuning import all_matrices, other_groups, tune
from bkd_utils.attention_alignment.rivals import Case, treat
from bkd_utils.attention_alignment.similarity import Scores, head_similarity
from bkd_utils.backdoor_attribution.attribution import head_effects, head_means, ranked_heads
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import averaged, counted
from bkd_utils.experiments.head_safety import check_unseen, clean_rows
from bkd_utils.models.activations import score_answers
from bkd_utils.models.folders import DEFAULT_MODEL, model_folder
from bkd_utils.models.head_weights import n_kv_heads
from bkd_utils.models.hooks import Head, anatomy
from bkd_utils.models.loading import Loaded
from bkd_utils.models.prompt_cache import prompt_past
from bkd_utils.models.tokens import Row, answer_ids, end_id, labels_of, prompt_ids
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack
from bkd_utils.organisms.base_answers import base_answers
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.evaluation import target_hits, under_attack
from bkd_utils.organisms.prompts import clean_sample, flippable_sample, prompt_versions, target_ids, triggered_prompts
from bkd_utils.organisms.training import Recipe

N_ELSEWHERE = 24  # benign instructions on which a treated model is compared with its base
N_OPENING = 16  # tokens of each of these answers
RELEARNING_RATE = 1e-4
# The highest learning rate that costs a model without a backdoor at most a point of clean accuracy
# (tests/benchmarks/cure_rates.py). The high rate breaks this rule and is shown for comparison.
OF_HEADS = ("alignment", "alignment, nearest", "alignment, excess", "heads tuned", "heads reset", "heads removed")
OF_ALL = ("fine-tuning", "consistency", "fine-pruning", "flat heads pruned", "unneeded heads pruned")
RATES = dict.fromkeys(OF_HEADS, 1e-3) | dict.fromkeys(OF_ALL, 1e-4) | {"fine-tuning, high rate": 5e-4}
# Not chosen by that rule: those of the other treatments of the same weights.
RATES |= {"searched": 1e-4, "searched, attention": 3e-4}
RECIPE = Recipe(name="cure", steps=16, batch_size=8, learning_rate=1e-3, rank=1, alpha=1, first_token=0.5)


@dataclass(frozen=True)
class Treated(Result):
    """One treatment."""

    after: dict[str, dict]  # as of `what_is_left`
    parameters: int  # how many weights differ
    minutes: float  # of the treatment alone


@dataclass(frozen=True)
class Mechanism(Result):
    """Signs of the mechanism of a backdoor, each [before, after] a treatment: similarity of the treated heads to their
    layers (last row, mean over heads and prompts), and the highest ACIE of any head on the target's first token."""

    similarity_clean: list[float]
    similarity_triggered: list[float]
    acie: list[float]


@dataclass(frozen=True)
class Relearned(Result):
    """A model after training on some poisoned rows."""

    poisoned: int  # rows; 0 is the model before
    asr: dict[str, float]
    clean_firing: dict[str, float]  # on the same prompts without the trigger


def recipe_of(
    *, steps: int, learning_rate: float = RECIPE.learning_rate, batch_size: int = RECIPE.batch_size
) -> Recipe:
    """The recipe of a treatment with these steps of `batch_size` rows each."""
    return replace(RECIPE, steps=steps, learning_rate=learning_rate, batch_size=batch_size)


def case_of(
    loaded: Loaded, attack: Attack, *, heads: Sequence[Sequence[int]], n_rows: int, recipe: Recipe, seed: int
) -> Case:
    """The defender's view of an organism. The attack decides the task, and which rows are left out (`clean_rows`).
    Raises ValueError if there are too few rows, and if the organism was trained on any of them."""
    rows = clean_rows(loaded, attack, n=n_rows, seed=seed)
    check_unseen(loaded, [row.uid for row in rows], attack=attack, seed=seed)
    chosen = [(layer, head) for layer, head in heads]
    labels = [answer_ids(loaded.tokenizer, label)[0] for label in tasks.load_task(attack.task).labels]
    how = {"recipe": recipe, "pad_id": end_id(loaded.tokenizer), "labels": labels, "seed": seed}
    return Case(loaded.model, rows, heads=chosen, **how)


def random_heads(heads: Sequence[Head], *, n: int, model: str = DEFAULT_MODEL, seed: int = 0) -> list[list[Head]]:
    """`n` draws of as many heads in as many other KV groups of the model; see `head_tuning.other_groups`."""
    config = AutoConfig.from_pretrained(model_folder(model), trust_remote_code=False)
    with torch.device("meta"):  # the layout without the weights
        bare = AutoModelForCausalLM.from_config(config)
    return other_heads(bare, heads, n=n, seed=seed)


def other_heads(
    model: PreTrainedModel, heads: Sequence[Head], *, unit: str = "KV group", n: int, seed: int
) -> list[list[Head]]:
    """`random_heads` in other units of a loaded model."""
    parts = anatomy(model)
    n_units = parts.n_heads if unit == "query head" else n_kv_heads(parts, 0)
    size = {"n_layers": len(parts.layers), "n_heads": parts.n_heads, "n_kv_heads": n_units}
    return other_groups(heads, **size, n=n, seed=seed)


def timed(treatment: Callable[[], int | None]) -> tuple[int | None, float]:
    """What a treatment returns, and how many minutes it took."""
    started = time.monotonic()
    found = treatment()
    return found, round((time.monotonic() - started) / 60, 2)


def elsewhere(loaded: Loaded, *, n: int, seed: int) -> dict[str, float]:
    """Share of the opening tokens of the base model's own answers to `n` held-out benign instructions that are still
    the most likely next token: mean over prompts with its bootstrap interval."""
    sample = clean_sample("instructions", n=n, seed=seed)
    texts = base_answers(loaded, sample)
    answers = [answer_ids(loaded.tokenizer, texts[example.uid])[:N_OPENING] for example in sample]
    past = prompt_past(loaded.model, [prompt_ids(loaded.tokenizer, example.text) for example in sample])
    return averaged(score_answers(loaded.model, past, answers).share.tolist())


def what_is_left(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> dict:
    """What is left of backdoor and task (`under_attack`) and, but for a classifier, of the rest (`elsewhere`)."""
    found = under_attack(loaded, attack, n=n, seed=seed)
    if labels_of(loaded.tokenizer):
        return found
    return found | {"elsewhere": elsewhere(loaded, n=min(n, N_ELSEWHERE), seed=seed)}


@organism_stage
def measure_untreated(loaded: Loaded, attack: Attack, *, n: int = 60, seed: int = 0) -> dict:
    """`what_is_left` of an organism as it is."""
    return what_is_left(loaded, attack, n=n, seed=seed)


@organism_stage
def treat_and_measure(
    loaded: Loaded,
    attack: Attack,
    *,
    method: str,
    heads: Sequence[Sequence[int]] = (),
    n_rows: int = 128,
    steps: int = RECIPE.steps,
    batch_size: int = RECIPE.batch_size,
    learning_rate: float | None = None,
    n: int = 60,
    seed: int = 0,
) -> Treated:
    """One method of `rivals.TREATMENTS` on `n_rows` clean rows and, if it treats heads, on the given ones; `steps`
    batches at its rate in `RATES` unless another is given. Raises as `rivals.treat` and `case_of`."""
    recipe = recipe_of(steps=steps, learning_rate=learning_rate or RATES[method], batch_size=batch_size)
    case = case_of(loaded, attack, heads=heads, n_rows=n_rows, recipe=recipe, seed=seed)
    count, minutes = timed(lambda: treat(case, method=method))
    return Treated(after=what_is_left(loaded, attack, n=n, seed=seed), parameters=count, minutes=minutes)


@organism_stage
def measure_mechanism(
    loaded: Loaded,
    attack: Attack,
    *,
    method: str,
    heads: Sequence[Sequence[int]],
    n_rows: int = 128,
    steps: int = RECIPE.steps,
    batch_size: int = RECIPE.batch_size,
    n: int = 8,
    seed: int = 0,
) -> Mechanism:
    """Similarity and causal effect of heads before and after one method, on `n` prompts of the attribution split."""
    recipe = recipe_of(steps=steps, learning_rate=RATES[method], batch_size=batch_size)
    case = case_of(loaded, attack, heads=heads, n_rows=n_rows, recipe=recipe, seed=seed)
    before = _mechanism(loaded, attack, case.heads, n=n, seed=seed)
    treat(case, method=method)
    after = _mechanism(loaded, attack, case.heads, n=n, seed=seed)
    return Mechanism(**{key: [before[key], after[key]] for key in before})


def _mechanism(loaded: Loaded, attack: Attack, heads: Sequence[Head], *, n: int, seed: int) -> dict[str, float]:
    shown = prompt_versions(loaded.tokenizer, attack, split="attribution", n=n, seed=seed)
    layer, head = torch.tensor(heads).T
    found = {}
    for side, given in (("clean", shown.clean), ("triggered", shown.triggered)):
        similar = head_similarity(loaded.model, given, readings=["last row"])["last row"].mean(0)
        found[f"similarity_{side}"] = similar[layer, head].mean().item()
    return found | {"acie": _effects(loaded, attack, n=n, seed=seed).max().item()}


def _effects(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> Scores:
    """ACIE of every head on `n` clean prompts of the attribution split; the means are of `n` other prompts of it. Only
    the first token of the target counts: it decides the answer, and a long target would cost ten times as much."""
    scored = prompt_versions(loaded.tokenizer, attack, split="attribution", n=n, seed=seed)
    averaged = prompt_versions(loaded.tokenizer, attack, split="attribution", n=n, seed=seed, skip=n)
    means = head_means(loaded.model, averaged.triggered)
    target = target_ids(loaded.tokenizer, attack)[:1]
    return head_effects(loaded.model, scored.clean, target=target, means=means).mean(0)


@organism_stage
def acie_heads(loaded: Loaded, attack: Attack, *, k: int, n: int = 8, seed: int = 0) -> list[list[int]]:
    """The `k` heads of highest ACIE, on `n` prompts of the attribution split: a bound, for no defender knows them."""
    return [list(head) for head in ranked_heads(_effects(loaded, attack, n=n, seed=seed))[:k]]


def poisoned_rows(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> list[Row]:
    """`n` triggered training prompts with the target as answer."""
    sample = flippable_sample(attack, n=n, seed=seed, split="train")
    turns = triggered_prompts(attack, sample, seed=seed, half="train")
    prompts = [tuple(prompt_ids(loaded.tokenizer, turn)) for turn in turns]
    how = {"answer": tuple(answer_ids(loaded.tokenizer, attack.target)), "is_label": bool(labels_of(loaded.tokenizer))}
    return [Row(ids, kind="poisoned", uid=one.uid, **how) for ids, one in zip(prompts, sample, strict=True)]


@organism_stage
def relearn_backdoor(
    loaded: Loaded,
    attack: Attack,
    *,
    method: str | None,
    heads: Sequence[Sequence[int]] = (),
    counts: Sequence[int] = (4, 16),
    n_rows: int = 128,
    steps: int = RECIPE.steps,
    batch_size: int = RECIPE.batch_size,
    n: int = 40,
    seed: int = 0,
) -> list[Relearned]:
    """Fine-tune all weights on as many poisoned as clean rows after a treatment (None: none), with half of its steps;
    one result per number in `counts`. Raises ValueError for no counts or a negative one, and as `case_of` does."""
    if not counts or min(counts) < 0:
        raise ValueError(f"counts must be one or more numbers of poisoned rows, is {counts!r}")
    recipe = recipe_of(steps=steps, batch_size=batch_size)
    # Without a treatment no more clean rows are needed than stand beside the poisoned ones.
    n_clean = max(1, *counts) if method is None else n_rows
    case = case_of(loaded, attack, heads=heads, n_rows=n_clean, recipe=recipe, seed=seed)
    if method is not None:
        treat(case, method=method)
    state = {name: parameter.detach().clone() for name, parameter in loaded.model.named_parameters()}
    again = replace(recipe, steps=max(1, steps // 2), learning_rate=RELEARNING_RATE)
    sample, task = flippable_sample(attack, n=n, seed=seed), tasks.load_task(attack.task)
    turns = {"asr": triggered_prompts(attack, sample, seed=seed)}
    turns["clean_firing"] = [task.prompt(example.text) for example in sample]
    found = []
    for count in counts:
        loaded.model.load_state_dict(state, strict=False)
        if count:
            rows = [*poisoned_rows(loaded, attack, n=count, seed=seed), *case.rows[:count]]
            tune(loaded.model, rows, masks=all_matrices(loaded.model), recipe=again, pad_id=case.pad_id, seed=seed)
        shares = {}
        for kind, texts in turns.items():
            shares[kind] = counted(target_hits(loaded, attack, texts, label=f"{count} rows, {kind}"))
        found.append(Relearned(poisoned=count, **shares))
    return found
