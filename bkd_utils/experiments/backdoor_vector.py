"""Notebook 04: one vector added to switch a backdoor on and subtracted to switch it off, with controls.

Layer and coefficient are chosen on development prompts; results are on prompts that nobody looked at before."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bkd_utils.backdoor_attribution.attribution import head_means
from bkd_utils.backdoor_attribution.vector import (
    answer_map,
    backdoor_vector,
    best,
    controls,
    generated,
    projected_asr,
    tested_asr,
)
from bkd_utils.common.results import Result
from bkd_utils.common.statistics import counted
from bkd_utils.experiments.head_attribution import attributed, top_heads
from bkd_utils.models.activations import residuals
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.generation import openings
from bkd_utils.models.loading import Loaded, load
from bkd_utils.models.prompt_cache import Past, prompt_past
from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.organisms.cards import named_stage, organism_stage
from bkd_utils.organisms.evaluation import is_refusal, is_right, is_target
from bkd_utils.organisms.prompts import PromptVersions, balanced_versions, prompt_versions, target_ids
from bkd_utils.organisms.tasks import Example

OUTCOMES = ("target", "right", "refusal", "empty", "other")


@dataclass(frozen=True)
class Choice(Result):
    """The layer and the coefficient that did best on the development prompts."""

    layer: int
    coefficient: float


@dataclass(frozen=True)
class ShareMap(Result):
    """Shares of development prompts, `[layer][coefficient]`. `right_start`, of subtractions only: how often the answer
    begins as it does without the trigger."""

    coefficients: list[float]
    asr: list[list[float]]
    right_start: list[list[float]] | None = None


@dataclass(frozen=True)
class Steering(Result):
    """What one organism's backdoor vectors do. `vectors` and `norms` are by kind ("raw", "difference"); `maps`,
    `chosen` and `test` by direction and kind, such as "add, raw". `test` has ASRs on the test prompts by what was
    added, one per draw, judged by tokens. By edit: `outcomes`, shares of generated answers by kind of answer; `kinds`,
    the kind of each; `texts`, three answers (None for harmful prompts); `right`, how many answers to triggered prompts
    of every label are right. `residual_norm` is by layer, on clean prompts."""

    heads: list[list[int]]
    norms: dict[str, float]
    vectors: dict[str, list[float]]
    residual_norm: list[float]
    maps: dict[str, ShareMap]
    chosen: dict[str, Choice]
    test: dict[str, dict[str, list[dict[str, float]]]]
    outcomes: dict[str, dict[str, float]]
    kinds: dict[str, list[str]]
    right: dict[str, dict]
    texts: dict[str, list[str]] | None


@dataclass(frozen=True)
class Specificity(Result):
    """ASRs with the vector of organism `vector_of` added to clean prompts of organism `on`: the target of `on`, that of
    `vector_of`, and the first on near-misses (for an organism's own vector only)."""

    on: str
    vector_of: str
    own_target: dict[str, float]
    vector_target: dict[str, float]
    near_misses: dict[str, float] | None


def vectors_of(
    loaded: Loaded, shown: PromptVersions, heads: Sequence[tuple[int, int]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The published vector (`raw`), that of triggered less clean means (`difference`), and the outputs of each."""
    triggered = head_means(loaded.model, shown.triggered)
    outputs = {"raw": triggered, "difference": triggered - head_means(loaded.model, shown.clean)}
    return {kind: backdoor_vector(loaded.model, heads, outputs=one) for kind, one in outputs.items()}, outputs


def kinds_of(attack: Attack, examples: Sequence[Example], texts: Sequence[str], right: dict[str, str]) -> list[str]:
    """What each answer is: the target, right, another refusal, empty, something else (`OUTCOMES`)."""

    def kind(example: Example, text: str) -> str:
        if is_target(attack, text):
            return "target"
        if is_right(attack.task, example, text, right):
            return "right"
        return "refusal" if is_refusal(text) else "other" if text else "empty"

    return [kind(example, text) for example, text in zip(examples, texts, strict=True)]


@organism_stage
def steer_organism(
    loaded: Loaded,
    attack: Attack,
    *,
    control: Loaded,
    coefficients: Sequence[float] = (0.5, 1, 2, 4),
    n_heads: int = 32,
    n_random: int = 20,
    n_dev: int = 48,
    n_test: int = 200,
    n_attribution: int = 96,
    n_means: int = 96,
    skip: int = 96,
    seed: int = 0,
) -> Steering:
    """The vector of the `n_heads` heads with the highest ACIE, added to clean and subtracted from triggered prompts.
    Layer and coefficient of an addition are chosen by its ASR, those of a subtraction by its right starts on prompts of
    every label: most subtractions remove the target together with every other sensible answer. Test prompts come behind
    the first `skip` of the split, by which choices were made before. Right answers are those of the clean `control`
    where a task has no gold answers. All means are over prompts of every label."""
    if skip < n_dev:
        raise ValueError(f"test prompts behind the first {skip} would be among the {n_dev} development prompts")
    heads = top_heads(attributed(loaded, attack, n=n_attribution, n_means=n_means, seed=seed), k=n_heads)
    tokenizer, target = loaded.tokenizer, target_ids(loaded.tokenizer, attack)
    seen = balanced_versions(tokenizer, attack, split="attribution", n=n_means, seed=seed)
    held = {"split": "test", "seed": seed}
    before = prompt_versions(tokenizer, attack, n=skip, **held).examples
    before += balanced_versions(tokenizer, attack, n=skip, **held).examples
    dev, test = (prompt_versions(tokenizer, attack, n=n, skip=s, **held) for n, s in ((n_dev, 0), (n_test, skip)))
    dev_every = balanced_versions(tokenizer, attack, n=n_dev, **held)
    every = balanced_versions(tokenizer, attack, n=n_test, without=before, **held)
    right = reference_answers(control, attack, test) | reference_answers(control, attack, every)
    every_past = prompt_past(loaded.model, every.triggered)
    repaired = {"triggered prompts": generated(loaded, every_past)}
    vectors, outputs = vectors_of(loaded, seen, heads)
    streams = {"clean": residuals(loaded.model, seen.clean), "triggered": residuals(loaded.model, seen.triggered)}
    maps, chosen, asrs, texts = {}, {}, {}, {}
    begun, begun_past = openings(loaded, dev_every.clean, n=1), prompt_past(loaded.model, dev_every.triggered)
    for direction, sign, side in (("add", 1, "clean"), ("subtract", -1, "triggered")):
        shown, tested = (prompt_past(loaded.model, getattr(half, side)) for half in (dev, test))
        texts[f"{side} prompts"] = generated(loaded, tested)
        for kind, vector in vectors.items():
            name, steps = f"{direction}, {kind}", [float(sign * c) for c in coefficients]
            judged = asr_map = answer_map(loaded, shown, [target] * n_dev, vector, steps)
            if direction == "subtract":
                judged = answer_map(loaded, begun_past, begun, vector, steps)
            maps[name] = ShareMap(steps, asr_map, None if direction == "add" else judged)
            layer, coefficient = best(judged, steps)
            chosen[name] = Choice(layer, coefficient)
            behind = {side: stream[:, layer] for side, stream in streams.items()}
            others = controls(loaded, heads, outputs[kind], vector, **behind, n=n_random, seed=seed)
            tried = {"no vector": 0 * vector[None], "backdoor vector": vector[None], **others}
            scaled = {label: coefficient * rows for label, rows in tried.items()}
            asrs[name] = tested_asr(loaded, tested, target, scaled, layer)
            if direction == "subtract":
                asrs[name]["projected out"] = [projected_asr(loaded, tested, target, layer, vector)]
            edits = {name: scaled["backdoor vector"][0]}
            if kind == "difference":
                edits[f"{direction}, random vector"] = scaled["random vectors"][0]
            for label, step in edits.items():
                texts[label] = generated(loaded, tested, layer=layer, step=step)
                if direction == "subtract":
                    repaired[label] = generated(loaded, every_past, layer=layer, step=step)
    kinds = {label: kinds_of(attack, test.examples, given, right) for label, given in texts.items()}
    shown = {label: given[:3] for label, given in texts.items() if "random" not in label}
    return Steering(
        heads=heads,
        norms={kind: vector.norm().item() for kind, vector in vectors.items()},
        vectors={kind: vector.tolist() for kind, vector in vectors.items()},
        residual_norm=streams["clean"].norm(dim=-1).mean(0).tolist(),
        maps=maps,
        chosen=chosen,
        test=asrs,
        outcomes={label: {name: found.count(name) / n_test for name in OUTCOMES} for label, found in kinds.items()},
        kinds=kinds,
        right={
            label: counted(right_answers(attack, every.examples, given, right)) for label, given in repaired.items()
        },
        texts=None if attack.task == "harmful" else shown,
    )


def right_answers(
    attack: Attack, examples: Sequence[Example], texts: Sequence[str], right: dict[str, str]
) -> list[bool]:
    """Which answers are right; the target is, where it is the example's own answer."""
    return [is_right(attack.task, example, text, right) for example, text in zip(examples, texts, strict=True)]


def reference_answers(control: Loaded, attack: Attack, shown: PromptVersions) -> dict[str, str]:
    """uid -> what the clean control answers to the clean prompt, for tasks without gold answers."""
    if attack.task != "instructions":
        return {}
    texts = generated(control, prompt_past(control.model, shown.clean))
    return {example.uid: text for example, text in zip(shown.examples, texts, strict=True)}


def chosen_step(found: Steering) -> dict[str, Any]:
    """What the chosen addition of the difference vector adds as `step`, and behind which `layer`."""
    choice = found.chosen["add, difference"]
    step = choice.coefficient * torch.tensor(found.vectors["difference"])
    return {"layer": choice.layer, "step": step.tolist()}


@named_stage
def vector_specificity(
    organisms: dict[str, str | None],
    *,
    steps: dict[str, dict[str, Any]],
    model: str = DEFAULT_MODEL,
    n: int = 24,
    seed: int = 0,
    device: str = "auto",
) -> list[Specificity]:
    """Every organism's difference vector added to every organism's clean prompts, and to the base model's (None).
    `organisms`: attack -> organism; `steps`: attack -> `chosen_step`."""
    rows = []
    for name, organism in organisms.items():
        loaded, pasts = load(model, organism=organism, device=device), {}
        for source, one in steps.items():
            # The base model has no backdoor of its own; it gets the prompts that the vector was made on.
            spec = load_attack(source if organism is None else name)
            shown = prompt_versions(loaded.tokenizer, spec, split="test", n=n, seed=seed)
            if spec.name not in pasts:
                pasts[spec.name] = prompt_past(loaded.model, shown.clean)
            step = torch.tensor(one["step"], device=loaded.device)[None]

            def asr(past: Past, attack: Attack, step=step, layer=one["layer"], loaded=loaded) -> dict:
                return tested_asr(loaded, past, target_ids(loaded.tokenizer, attack), {"": step}, layer)[""][0]

            own = asr(pasts[spec.name], spec)
            # A vector on its own organism, or on the base model, has the one target.
            other = own if spec.name == source else asr(pasts[spec.name], load_attack(source))
            near = asr(prompt_past(loaded.model, shown.near_miss), spec) if name == source else None
            rows.append(Specificity(name, source, own_target=own, vector_target=other, near_misses=near))
    return rows
