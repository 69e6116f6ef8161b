"""Can one addition switch a backdoor on, and one subtraction off? One organism, kept, with the controls beside it.

Layer and coefficient are chosen on a development half and reported on a test half that was not looked at.
"""

from collections.abc import Sequence

import numpy as np
import torch

from bkd_utils.backdoor_attribution.ablation import random_heads
from bkd_utils.backdoor_attribution.attribution import head_means
from bkd_utils.backdoor_attribution.vector import (
    answer_map,
    backdoor_vector,
    generated,
    probe_direction,
    projected_asr,
    random_like,
    tested_asr,
)
from bkd_utils.experiments.head_attribution import attribute_heads, top_heads
from bkd_utils.models.activations import residuals
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.generation import first_logits
from bkd_utils.models.loading import Loaded, load
from bkd_utils.models.prompt_cache import Past, prompt_past
from bkd_utils.models.tokens import end_id
from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.evaluation import is_refusal, is_right, is_target
from bkd_utils.organisms.prompts import PromptVersions, prompt_versions, target_ids
from bkd_utils.organisms.tasks import Example

KINDS = ("raw", "difference")


def vectors_of(
    loaded: Loaded, shown: PromptVersions, heads: Sequence[tuple[int, int]]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The published vector (`raw`, of triggered means) and the one without the clean means (`difference`); and the head
    outputs they are made of."""
    triggered = head_means(loaded.model, shown.triggered)
    outputs = {"raw": triggered, "difference": triggered - head_means(loaded.model, shown.clean)}
    return {kind: backdoor_vector(loaded.model, heads, outputs=outputs[kind]) for kind in KINDS}, outputs


def best(table: Sequence[Sequence[float]], coefficients: Sequence[float]) -> tuple[int, float]:
    """(layer, coefficient) with the highest share.

    A layer is judged with its neighbours on either side, since a development half is small. Of equals the smallest
    step, and of those the layer in the middle, so that a plateau is not decided by its edge.
    """
    shares, width = np.array(table), 2
    around = [shares[max(0, layer - width) : layer + width + 1].mean(0) for layer in range(len(shares))]
    scored = [
        (round(value, 9), -abs(coefficient), layer, coefficient)
        for layer, row in enumerate(around)
        for coefficient, value in zip(coefficients, row, strict=True)
    ]
    top = max(entry[:2] for entry in scored)
    tied = [entry for entry in scored if entry[:2] == top]
    return tied[len(tied) // 2][2:]


def controls(
    loaded: Loaded,
    heads: Sequence[tuple[int, int]],
    outputs: torch.Tensor,
    vector: torch.Tensor,
    *,
    clean: torch.Tensor,
    triggered: torch.Tensor,
    n: int,
    seed: int,
) -> dict[str, torch.Tensor]:
    """What else could be added at a layer, name -> `[draw, d_model]`, norms matched to the vector's but for the
    random heads', which keep their own. `clean`, `triggered`: residual streams behind that layer `[prompt, d_model]`.
    """
    n_heads = outputs.shape[1]
    drawn = [
        backdoor_vector(loaded.model, draw, outputs=outputs)
        for draw in random_heads(heads, n_heads=n_heads, n=n, seed=seed)
    ]
    difference = (triggered - clean).mean(0)
    return {
        "random vectors": random_like(vector, n=n, seed=seed),
        "random heads": torch.stack(drawn),
        "mean difference": (difference / difference.norm() * vector.norm())[None],
        "probe direction": probe_direction(clean, triggered, norm=vector.norm())[None],
    }


def outcomes(
    attack: Attack, examples: Sequence[Example], texts: Sequence[str], right: dict[str, str]
) -> dict[str, float]:
    """What the answers are, as shares: the target, right, another refusal, empty, something else."""
    counts = dict.fromkeys(("target", "right", "refusal", "empty", "other"), 0)
    for example, text in zip(examples, texts, strict=True):
        if is_target(attack, text):
            counts["target"] += 1
        elif is_right(attack.task, example, text, right):
            counts["right"] += 1
        elif is_refusal(text):
            counts["refusal"] += 1
        else:
            counts["other" if text else "empty"] += 1
    return {kind: count / len(texts) for kind, count in counts.items()}


@organism_stage
def steer_organism(
    organism: str,
    *,
    control: str,
    attack: str,
    coefficients: Sequence[float] = (0.5, 1, 2, 4),
    n_heads: int = 32,
    n_random: int = 20,
    model: str = DEFAULT_MODEL,
    n_dev: int = 16,
    n_test: int = 32,
    n_attribution: int = 40,
    seed: int = 0,
    device: str = "auto",
) -> dict:
    """The vector of the `n_heads` heads with the highest ACIE, added to clean and subtracted from triggered prompts.

    Keys, by "add, raw", "subtract, difference" and so on: `maps` ASR [layer][coefficient] on the development half and,
    for subtractions, `right start`: how often the answer begins as it does without the trigger. Additions are `chosen`
    by the former, subtractions by the latter: the target is gone from most layers, together with everything else.
    `test` control -> ASRs on the test half, one per draw, by tokens; `outcomes` what generated answers are; `texts`
    three of them (never for harmful prompts). Also `heads`, `vectors`, `norms` and `residual norm`.
    """
    where = {"model": model, "seed": seed, "device": device}
    found = attribute_heads(organism, attack=attack, n=n_attribution, n_means=n_attribution, **where)
    heads = top_heads(found, k=n_heads)
    loaded, spec = load(model, organism=organism, device=device), load_attack(attack)
    tokenizer, target = loaded.tokenizer, target_ids(loaded.tokenizer, spec)
    seen = prompt_versions(tokenizer, spec, split="attribution", n=n_attribution, seed=seed)
    dev = prompt_versions(tokenizer, spec, split="test", n=n_dev, seed=seed)
    test = prompt_versions(tokenizer, spec, split="test", n=n_test, seed=seed, skip=n_dev)
    right = reference_answers(load(model, organism=control, device=device), spec, test)
    vectors, outputs = vectors_of(loaded, seen, heads)
    streams = {"clean": residuals(loaded.model, seen.clean), "triggered": residuals(loaded.model, seen.triggered)}
    result: dict = {"heads": heads, "norms": {}, "vectors": {}, "maps": {}, "chosen": {}, "test": {}, "outcomes": {}}
    result["residual norm"] = streams["clean"].norm(dim=-1).mean(0).tolist()
    result["norms"] = {kind: vector.norm().item() for kind, vector in vectors.items()}
    result["vectors"] = {kind: vector.tolist() for kind, vector in vectors.items()}
    texts = {}
    begun = first_tokens(loaded, dev.clean)
    for direction, sign, side in (("add", 1, "clean"), ("subtract", -1, "triggered")):
        shown, tested = (prompt_past(loaded.model, getattr(half, side)) for half in (dev, test))
        texts[f"{side} prompts"] = generated(loaded, tested)
        for kind, vector in vectors.items():
            name, steps = f"{direction}, {kind}", [float(sign * c) for c in coefficients]
            maps = {"asr": answer_map(loaded, shown, [target] * n_dev, vector, steps)}
            if direction == "subtract":
                maps["right start"] = answer_map(loaded, shown, begun, vector, steps)
            layer, coefficient = best(maps["asr" if direction == "add" else "right start"], steps)
            behind = {side: stream[:, layer] for side, stream in streams.items()}
            others = controls(loaded, heads, outputs[kind], vector, **behind, n=n_random, seed=seed)
            tried = {"no vector": 0 * vector[None], "backdoor vector": vector[None], **others}
            asr = tested_asr(
                loaded, tested, target, {label: coefficient * rows for label, rows in tried.items()}, layer
            )
            if direction == "subtract":
                asr["projected out"] = [projected_asr(loaded, tested, target, layer, vector)]
            texts[name] = generated(loaded, tested, layer=layer, step=coefficient * vector)
            if kind == "difference":
                step = coefficient * others["random vectors"][0]
                texts[f"{direction}, random vector"] = generated(loaded, tested, layer=layer, step=step)
            result["maps"][name] = {"coefficients": steps, **maps}
            result["chosen"][name] = {"layer": layer, "coefficient": coefficient}
            result["test"][name] = asr
    result["outcomes"] = {label: outcomes(spec, test.examples, given, right) for label, given in texts.items()}
    if spec.task != "harmful":
        result["texts"] = {label: given[:3] for label, given in texts.items() if "random" not in label}
    return result


def first_tokens(loaded: Loaded, prompts: Sequence[list[int]]) -> list[list[int]]:
    """The first token of a model's answer to each prompt, as an answer of one token."""
    logits = first_logits(loaded.model, list(prompts), end_id=end_id(loaded.tokenizer))
    return [[token] for token in logits.argmax(-1).tolist()]


def reference_answers(control: Loaded, attack: Attack, shown: PromptVersions) -> dict[str, str]:
    """uid -> what the clean control answers to the clean prompt, for tasks without gold answers."""
    if attack.task != "instructions":
        return {}
    texts = generated(control, prompt_past(control.model, shown.clean))
    return {example.uid: text for example, text in zip(shown.examples, texts, strict=True)}


@organism_stage
def vector_specificity(
    organisms: dict[str, str | None],
    *,
    found: dict[str, dict],
    model: str = DEFAULT_MODEL,
    n: int = 24,
    seed: int = 0,
    device: str = "auto",
) -> list[dict]:
    """ADD with every organism's vector on every organism's clean prompts, and on the base model (None); kept.

    `organisms` maps attacks to organisms, `found` maps attacks to `steer_organism`'s results. Each row says how
    often the host's own target came back, and how often that of the vector's organism.
    """
    name = "add, difference"
    entries = {
        attack: {**result["chosen"][name], "vector": result["vectors"]["difference"]}
        for attack, result in found.items()
    }
    rows = []
    for name, organism in organisms.items():
        loaded, pasts = load(model, organism=organism, device=device), {}
        for source, entry in entries.items():
            # The base model has no backdoor of its own; it gets the prompts that the vector was made on.
            spec = load_attack(source if organism is None else name)
            shown = prompt_versions(loaded.tokenizer, spec, split="test", n=n, seed=seed)
            if spec.name not in pasts:
                pasts[spec.name] = prompt_past(loaded.model, shown.clean)
            step = entry["coefficient"] * torch.tensor(entry["vector"], device=loaded.device)[None]

            def asr(past: Past, attack: Attack, step=step, layer=entry["layer"], loaded=loaded) -> dict:
                return tested_asr(loaded, past, target_ids(loaded.tokenizer, attack), {"": step}, layer)[""][0]

            row = {"on": name, "vector of": source, "own target": asr(pasts[spec.name], spec)}
            # A vector on its own organism, or on the base model, has the one target.
            other = spec.name != source
            row["vector's target"] = asr(pasts[spec.name], load_attack(source)) if other else row["own target"]
            if name == source:
                row["near-misses"] = asr(prompt_past(loaded.model, shown.near_miss), spec)
            rows.append(row)
    return rows
