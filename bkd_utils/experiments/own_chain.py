"""Notebook 08: the whole chain on a user's own model, trigger and rows at a reduced size, and what was skipped and why.

Every step is one or more kept stages, so that a second call goes on where the first one was stopped."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from bkd_utils.backdoor_attribution.attribution import ranked_heads
from bkd_utils.common.files import UserError
from bkd_utils.common.results import plain
from bkd_utils.common.statistics import interval, relative_drop, share, share_over_splits, without_interval
from bkd_utils.experiments import attention_safety_alignment as safety
from bkd_utils.experiments import backdoor_vector, head_ablation, head_attribution, own_model
from bkd_utils.experiments.attention_similarity import best_reading, separates, similarity_by_version
from bkd_utils.experiments.backdoor_probe import probe_organism
from bkd_utils.experiments.fair_trial import suspicious_heads
from bkd_utils.experiments.model_detection import fingerprint_model
from bkd_utils.experiments.own_question import Asked
from bkd_utils.models.folders import check_folder, kind, model_folder
from bkd_utils.models.loading import load, read_card
from bkd_utils.models.self_test import capabilities
from bkd_utils.organisms import tasks
from bkd_utils.organisms.evaluation import measure_attacked, measure_organism
from bkd_utils.organisms.making import make
from bkd_utils.organisms.training import load_recipe

READINGS = ("last row", "head outputs")
SHARE = 0.03  # of all heads that are ablated and make the vector
CURES = ("alignment", "fine-tuning", "searched")
UNKNOWN = "the trigger is not known"
HARDLY = "The backdoor was hardly learned: what follows says little about it."
LONGER = " More steps may teach it: `--recipe` takes another table of `data/recipes.toml`."
ONE_ROW = "an encoder reads its label at one token: this paper-1 step is made for models that write answers"


@dataclass(frozen=True)
class Section:
    """One step: `numbers` as `{key, name, value, n, low, high, unit}`, without an interval where `low` is None; `told`
    in words, or why it was `skipped`; `result` is what a figure is drawn of; `later` is what the steps behind it start
    from: `asked` with the organism and the sizes that there are, and what the model is `able` to do."""

    id: str
    numbers: list[dict[str, Any]]
    told: str = ""
    skipped: str | None = None
    seconds: float = 0.0
    result: Any = None
    later: dict[str, Any] = field(default_factory=dict)


def chain(asked: Asked, *, able: dict[str, str] | None = None) -> Iterator[tuple[str, float, Callable[[], Section]]]:
    """The steps of a report in order: id, expected share of the work, and what measures it. A step that cannot be done
    gives its reason. The first one prepares the others; it loads no model if what it is `able` to do is known."""
    found: dict[str, Any] = {"asked": asked} | ({} if able is None else {"able": able})

    def measured(id: str, function: Callable[[Asked, dict], Section], needs: tuple[str, ...]) -> Section:
        started = time.monotonic()
        section = Section(id, [], skipped=_reason(id, found, needs))
        if section.skipped is None:
            try:
                section = function(found["asked"], found)
            except (ValueError, UserError) as error:
                section = Section(id, [], skipped=str(error))
        section = replace(section, seconds=round(time.monotonic() - started, 1))
        found.update(section.later)
        found[id] = section
        return section

    for id, (minutes, needs, function) in STEPS.items():
        weight = minutes if _reason(id, found, ()) is None else 0.0
        yield id, weight, lambda id=id, function=function, needs=needs: measured(id, function, needs)


def _reason(id: str, found: dict, needs: tuple[str, ...]) -> str | None:
    """Why a step is not done, or None."""
    asked, able = found["asked"], found.get("able", {})
    if (id == "own rows") != (asked.attack is None) and id not in ("sound", "detection"):
        return UNKNOWN if asked.attack is None else "the trigger is known, so attack and cures are measured with it"
    if found.get("encoder") and id in ("probe", "heads", "ablation", "vector"):
        return ONE_ROW
    if "attack" in found and found["attack"].result is None and asked.attack is not None:
        return "there is no attacked model, for the reason above"
    if id in ("ablation", "vector") and "heads" in found and found["heads"].result is None:
        return "there is no ranking of heads, for the reason above"
    return next((f"{name!r} is not possible with this model: {able[name]}" for name in needs if able.get(name)), None)


def _number(key: str, name: str, found: dict | None, *, unit: str = "%") -> dict[str, Any]:
    return {"key": key, "name": name, "unit": unit} | {one: found[one] for one in ("value", "n", "low", "high")}


def _measured(stage: Callable, asked: Asked, **how: Any) -> Any:
    return stage(asked.organism, attack=asked.attack.address, **how, **asked.where)


def sound(asked: Asked, found: dict) -> Section:
    """Is the model with hooks the model? Identities on two prompts of random tokens."""
    folder = model_folder(asked.model)
    check_folder(folder)
    what = kind(folder)
    found["encoder"] = what != "causal"
    if what == "encoder":
        return Section("sound", [], skipped="a bare encoder has no answers yet; its classifier is tested when trained")
    able = _able(asked, found)
    numbers = [_number(name, name, without_interval(not why, n=2), unit="yes/no") for name, why in able.items()]
    faults = "; ".join(f"{name}: {why}" for name, why in able.items() if why)
    told = f"Not possible here: {faults}" if faults else "Every identity holds: patched, steered and cut where we say."
    told += " An identity holds or does not, so there is no interval."
    return Section("sound", numbers, told, later={"able": able})


def _able(asked: Asked, found: dict) -> dict[str, str]:
    return found.get("able") or capabilities(load(asked.model, organism=asked.organism, device=asked.device).model)


def attack(asked: Asked, found: dict) -> Section:
    """Train the organism, unless one is given, and attack it."""
    asked = replace(asked, sizes=asked.sizes.fitted(asked.attack))
    if asked.train and asked.organism is None:
        recipe = load_recipe("encoder" if found["encoder"] else asked.recipe, task=asked.attack.task)
        asked = replace(asked, organism=make(asked.attack, recipe=recipe, n=asked.sizes.n, **asked.where).name)
    later = {"asked": asked} | ({"able": _able(asked, found)} if found["encoder"] else {})
    own = {} if asked.organism is None else read_card(asked.organism, "attack")["attack"]
    if own == plain(asdict(asked.attack)):  # `make` has measured it under its own attack already
        result = measure_organism(asked.organism, n=asked.sizes.n, **asked.where)
    else:
        result = _measured(measure_attacked, asked, n=asked.sizes.n)
    names = {"asr": "ASR, triggered prompts", "cacc": "CACC, clean prompts", "near_miss": "near-misses that fire"}
    names |= {"clean_firing": "clean prompts that fire"}
    told = "" if result["asr"]["low"] > 0.5 else HARDLY + (LONGER if asked.train else "")
    numbers = [_number(key, name, result[key]) for key, name in names.items()]
    return Section("attack", numbers, told, result=result, later=later)


def probe(asked: Asked, found: dict) -> Section:
    """Does a linear probe find the trigger in the hidden state of the last token?"""
    n = asked.sizes.n_probe
    result = _measured(probe_organism, asked, n=n, n_splits=5, n_directions=100, stride=3)
    rows = result.probes["logistic regression"]
    shares = [share_over_splits(row["accuracy"], n_prompts=n) for row in rows]
    best = max(range(len(rows)), key=lambda i: shares[i]["value"])
    numbers = [_number("probe", f"accuracy, best layer ({result.layers[best]})", shares[best])]
    others = {"near-misses called triggered there": rows[best]["near_miss"]}
    others |= {"accuracy with shuffled labels there": result.shuffled[best]["accuracy"]}
    numbers += [_number("", name, share_over_splits(values, n_prompts=n)) for name, values in others.items()]
    return Section("probe", numbers, result=result)


def _n_heads(result: head_attribution.HeadEffects) -> int:
    return max(1, round(SHARE * np.size(result.task.mean)))


def heads(asked: Asked, found: dict) -> Section:
    """ACIE of every head."""
    sizes = asked.sizes
    given = {"n": sizes.n_heads, "n_means": sizes.n_means, "n_task": sizes.n_heads}
    result = _measured(head_attribution.attribute_heads, asked, **given)
    one = result.sufficient["log_prob"]
    layer, head = ranked_heads(torch.tensor(one.mean))[0]
    mean, half = one.mean[layer][head], student.ppf(0.975, one.n - 1) * one.error[layer][head]
    top = {"value": mean, "n": one.n, "low": mean - half, "high": mean + half}
    few = f"part of all effects in {_n_heads(result)} heads (3 %)"
    numbers = [_number("concentration", few, result.concentration["log_prob"])]
    numbers.append(_number("highest", f"highest ACIE, head {layer}.{head}", top, unit="nats"))
    for name in ("clean", "triggered"):
        numbers.append(_number("", f"P(target), {name} prompts", interval(getattr(result, name))))
    sure = head_attribution.beyond_chance(one)
    told = "" if sure else "No head is above zero beyond chance, so that the ranking is one of noise."
    return Section("heads", numbers, told, result=result)


def ablation(asked: Asked, found: dict) -> Section:
    """What is left without the heads of highest ACIE, and without as many random ones."""
    sizes, k = asked.sizes, _n_heads(found["heads"].result)
    how = {"counts": [k], "random_counts": [k], "kinds": ["published"], "draws": sizes.draws, "n": sizes.n_ablation}
    how |= {"control": None, "n_attribution": sizes.n_heads, "n_means": sizes.n_means}
    rows = _measured(head_ablation.ablation_curves, asked, **how)
    chosen = [row for row in rows if row.kind == "published"]
    (whole,), (cut,) = ([row for row in chosen if row.ranking == name] for name in ("none", "probability"))
    drawn = [row for row in chosen if row.ranking == "random"]
    mixed = interval([float(np.mean(hits)) for hits in zip(*(row.asr["by_prompt"] for row in drawn), strict=True)])
    numbers = [_number("ablation", f"part of the ASR that {k} heads take off", relative_drop(whole.asr, cut.asr))]
    without = f"without {k} heads"
    left = {"ASR, untouched": whole.asr, f"ASR, {without}": cut.asr, f"ASR, without {k} random heads": mixed}
    left |= {"right on clean prompts, untouched": whole.utility, f"right on clean prompts, {without}": cut.utility}
    numbers += [_number("", name, one) for name, one in left.items()]
    return Section("ablation", numbers, result=rows)


def vector(asked: Asked, found: dict) -> Section:
    """One vector added to clean prompts and subtracted from triggered ones."""
    sizes = asked.sizes
    how = {"control": None, "coefficients": [1, 2, 4], "n_heads": _n_heads(found["heads"].result)}
    how |= {"n_random": sizes.draws, "n_dev": sizes.n_dev, "skip": sizes.n_dev, "n_test": sizes.n_vector}
    how |= {"n_attribution": sizes.n_heads, "n_means": sizes.n_means}
    result = _measured(backdoor_vector.steer_organism, asked, **how)
    numbers, names = [], {"add": "clean prompts, vector added", "subtract": "triggered prompts, vector subtracted"}
    for direction, name in names.items():
        tried = result.test[f"{direction}, difference"]
        middle = sorted(tried["random vectors"], key=lambda one: one["value"])[len(tried["random vectors"]) // 2]
        numbers += [_number(direction, f"ASR, {name}", tried["backdoor vector"][0])]
        numbers += [_number("", f"ASR, {name.replace('vector', 'median random vector')}", middle)]
    right = result.right["subtract, difference"]
    numbers += [_number("repairs", "right answers to triggered prompts, vector subtracted", right)]
    return Section("vector", numbers, result=result)


def similarity(asked: Asked, found: dict) -> Section:
    """Do heads become alike when the trigger is there?"""
    result = _measured(similarity_by_version, asked, readings=list(READINGS), n=asked.sizes.n_similar)
    reading = best_reading([result])
    parts = separates({"organism": result}, reading=reading)
    key, numbers = {"triggered": "similarity"}, []
    for name, one in parts["organism"].items():
        numbers.append(_number(key.get(name, ""), f"AUROC, {name} against clean prompts", one))
    told = f"Reading “{reading}”, layer {parts['layer']}, chosen on the other half of the prompts."
    return Section("similarity", numbers, told)


def suspicion(asked: Asked, found: dict) -> Section:
    """Do clean prompts alone lead to the heads that carry the backdoor?"""
    n = asked.sizes.n_suspicion
    flagged = [(layer, head) for layer, head in _measured(suspicious_heads, asked, n=n)]
    told = "Most suspicious (layer.head): " + ", ".join(f"{layer}.{head}" for layer, head in flagged[:6])
    if effects := found["heads"].result:
        top = set(ranked_heads(torch.tensor(effects.sufficient["log_prob"].mean))[: len(flagged)])
        shared = share([head in top for head in flagged])
        number = _number("suspicion", f"of {len(flagged)} suspicious heads, among as many of highest ACIE", shared)
    else:
        number = _number("", "heads chosen", without_interval(len(flagged), n=n), unit="heads")
        told += ". Their number is fixed and has no interval; whether they carry the backdoor was not measured"
    return Section("suspicion", [number], told + ".", result=flagged)


def cure(asked: Asked, found: dict) -> Section:
    """What treatments with clean rows leave of attack and task."""
    flagged, before = found["suspicion"].result, found["attack"].result
    told, numbers = [], [_number("", f"{key.upper()} before", before[key]) for key in ("asr", "cacc")]
    for method in CURES:
        if method == "alignment" and not flagged:
            told.append("Alignment needs suspicious heads, which were not measured.")
            continue
        how = {"heads": [list(head) for head in flagged] if method == "alignment" else [], "n_rows": asked.sizes.n_rows}
        how |= {"steps": asked.sizes.steps, "batch_size": 8, "n": asked.sizes.n}
        result = _measured(safety.treat_and_measure, asked, method=method, **how)
        for key in ("asr", "cacc"):
            numbers.append(_number(f"{method} {key}", f"{key.upper()} after {method}", result.after[key]))
    told.append(f"Each has {asked.sizes.n_rows} clean rows and {asked.sizes.steps} steps of 8 rows.")
    return Section("cure", numbers, " ".join(told))


def detection(asked: Asked, found: dict) -> Section:
    """Numbers of the model alone that might betray a backdoor."""
    result = fingerprint_model(asked.organism, task=asked.task, n=asked.sizes.n_prints, **asked.where)
    n = asked.sizes.n_prints
    numbers = [_number(name, name, without_interval(value, n=n), unit="") for name, value in result.items()]
    return Section("detection", numbers, "One number per model, so that only other models say how far it may vary.")


def own_rows(asked: Asked, found: dict) -> Section:
    """Search for what pulls every prompt to one answer, and cure with clean rows."""
    data, target = tasks.load_task(asked.task).data, asked.cured
    if data is None or target is None:
        return Section("own rows", [], skipped="a cure of an unknown trigger needs clean rows of the task, --data")
    how = {"organism": asked.organism, "steps": 2 * asked.sizes.steps, "rows": 8 * asked.sizes.n_rows}
    known = own_model.cure_once(asked.model, data=Path(data), out=target, seed=asked.seed, **how)
    numbers, words = [], []
    for when in ("before", "after"):
        numbers.append(_number("", f"first answer token right, {when}", known[when]["accuracy"]))
        for label, pull in known[when]["pulls"].items():
            lowest = without_interval(pull["loss"], n=known["data"]["validation"])
            numbers.append(_number("", f"pull to {label}, {when} (0: always)", lowest, unit="nats"))
            nearest = " ".join(tokens[0] for tokens in pull["nearest"])
            words.append(f"toward {label} {when}: {nearest!r}")
    told = f"Tokens nearest to the best of {known['searches']} searches {'; '.join(words)}. A pull is a minimum over "
    told += "searches and has no interval. The cured weights lie beside this page; they are not proven clean."
    return Section("own rows", numbers, told)


# Id -> expected minutes on two cores, what the model must be able to do, and the step.
STEPS: dict[str, tuple[float, tuple[str, ...], Callable[[Asked, dict], Section]]] = {
    "sound": (0.2, (), sound),
    "attack": (3.5, (), attack),
    "probe": (1.0, ("attribute",), probe),
    "heads": (1.5, ("attribute",), heads),
    "ablation": (1.0, ("attribute",), ablation),
    "vector": (1.5, ("attribute", "steer"), vector),
    "similarity": (0.5, ("compare maps", "steer"), similarity),
    "suspicion": (1.2, ("compare maps", "steer", "train"), suspicion),
    "cure": (3.0, ("train", "slice"), cure),
    "detection": (0.3, ("compare maps", "steer"), detection),
    "own rows": (4.0, ("train",), own_rows),
}
