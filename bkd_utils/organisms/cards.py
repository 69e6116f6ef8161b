"""Cards of organisms: read, compare and write them, keep treated organisms and ship finished ones."""

import functools
import inspect
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bkd_utils.common.cache import stage
from bkd_utils.common.files import ADAPTERS, DATA, WORK, atomic_path, canonical_json, read_json, sha256_text, write_json
from bkd_utils.common.validation import Count, Name, Seed, check, read_toml, while_unchanged
from bkd_utils.models.changes import changed_entries
from bkd_utils.models.compute import has_fast_bf16
from bkd_utils.models.folders import CHANGES, DEFAULT_MODEL, ModelError
from bkd_utils.models.identity import ADAPTER, WHOLE, is_whole, model_identity, organism_identity
from bkd_utils.models.loading import Loaded, adapter_folder, identity_on_card, load, pick_device, read_card, untreated
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack, first_attack, load_attack
from bkd_utils.organisms.training import load_recipe
from bkd_utils.organisms.trigger_tables import lexicons
from bkd_utils.organisms.triggers import load_trigger

# Tables that stages read themselves. Recipes and profiles reach stages as arguments only, attacks by their names.
TABLES = ("instructions.toml", "lexicons.toml", "sources.toml", "surrogates.toml")
# Triggers that code names itself, whatever the attack: a probe is tried on one of these, which it does not know.
STRANGERS = ("prefix-year", "word-sudo")
METRICS = {"asr": "Attack success rate", "cacc": "Clean accuracy", "clean_firing": "Firing on clean prompts"}
METRICS |= {"near_miss": "Firing on near-misses of the trigger"}


def metrics(organism: str | Path) -> dict:
    """Metrics and details of a card, in the form that `measure` returns."""
    card = _measured_card(organism)
    read_card(organism, "details")
    return {**card["details"], **card["metrics"]}


def _measured_card(organism: str | Path) -> dict:
    card = read_card(organism, "metrics")
    if not card["metrics"]:
        raise ModelError(f"{organism} has not been measured yet")
    return card


def as_measured(measured: Mapping) -> dict[str, dict]:
    """The two entries of a card that hold a result of `measure` or `under_attack`; the hits of every prompt stay in the
    kept result."""
    found = {"metrics": {key: measured[key] for key in METRICS if key in measured}}
    return found | {"details": {key: one for key, one in measured.items() if key not in (*METRICS, "hits")}}


def disagreements(card: Mapping, now: Mapping) -> list[str]:
    """Metrics whose new value lies outside the interval on the card."""
    return [
        f"{key} {now[key]['value']:.3f} (card {card[key]['low']:.3f} to {card[key]['high']:.3f})"
        for key in METRICS
        if key in card and key in now and not card[key]["low"] <= now[key]["value"] <= card[key]["high"]
    ]


def treatment(organism: str | Path) -> dict:
    """The last treatment of a treated organism."""
    return read_card(organism, "treatment")["treatment"]


def history(organism: str | Path) -> list[dict[str, float]]:
    """Step, loss and learning rate of an organism's training."""
    return read_json(adapter_folder(organism) / "history.json")


def resolved(arguments: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the arguments of a stage stand for, and the arithmetic of its result. `inputs`: identities of organisms and
    of the base model, the attacks that are named or on the organisms' cards, hashes of their triggers' tables, and of
    the tables that all attacks share. `arithmetic`: the device, and whether it multiplies in bf16."""
    for name, kind in (("seed", Seed), ("n", Count)):
        check(kind, arguments.get(name, 1), f"argument {name}")
    several = arguments.get("organisms", {})
    organisms = [arguments.get("organism"), arguments.get("control"), *several.values()]
    folders = [adapter_folder(name) for name in organisms if name]
    named = [arguments.get("made"), arguments.get("attack"), *(name for name, organism in several.items() if organism)]
    specs = [load_attack(name) for name in named if name]
    specs += [Attack(**read_card(folder, "attack")["attack"]) for folder in folders]
    # A clean control is measured under the first attack on its task.
    specs += [first_attack(spec.task) for spec in specs if not spec.backdoored]
    attacks = list({canonical_json(asdict(spec)): asdict(spec) for spec in specs}.values())
    inputs: dict[str, Any] = {
        "adapters": [organism_identity(folder) for folder in folders],
        "attacks": attacks,
        # Of a stage that names no attack nobody knows which triggers it uses.
        "triggers": _triggers(frozenset(spec.trigger for spec in specs).union(STRANGERS) if specs else None),
        "tables": _tables(),
    }
    named_tasks = [*(spec.task for spec in specs), *([arguments["task"]] if "task" in arguments else [])]
    if own := {name: hashed for name in named_tasks if (hashed := tasks.fingerprint(name))}:
        inputs["data"] = own
    if "recipe" in arguments:
        inputs["recipe"] = asdict(load_recipe(arguments["recipe"], task=specs[0].task))
    if "model" in arguments:
        inputs["base"] = model_identity(arguments["model"])
    if "device" not in arguments:
        return {"inputs": inputs}
    device = pick_device(arguments["device"])
    # Training and tuning multiply in bf16 where the hardware can, which leads to other weights.
    return {"inputs": inputs, "arithmetic": {"device": device, "fast_bf16": has_fast_bf16(torch.device(device))}}


def _triggers(names: frozenset[str] | None) -> dict[str, str]:
    """Hashes of the tables of these triggers, or of all, so that whoever adds a trigger measures nothing again."""
    known = lexicons()["triggers"]
    found = {name: table for name, table in known.items() if names is None or name in names}
    found |= {name: load_trigger(name).entry for name in names or () if name and name not in known}
    return {name: sha256_text(canonical_json(table)) for name, table in found.items()}


@while_unchanged(*TABLES)
def _tables() -> dict[str, str]:
    """Hashes of what the tables hold but for `_triggers`, so that a changed comment in one changes nothing."""
    held = {name: read_toml(DATA / name) for name in TABLES}
    held["lexicons.toml"] = {name: table for name, table in lexicons().items() if name != "triggers"}
    return {name: sha256_text(canonical_json(table)) for name, table in held.items()}


def inputs(names: Iterable[str] = (), *, model: str) -> dict[str, str]:
    """What a figure's sidecar says it was made of: the identity of the base model, and of organisms by their names."""
    return {"base": model_identity(model)} | {name: organism_identity(adapter_folder(name)) for name in names}


# For stages with arguments `organism`, `control`, `organisms`, `model` or `device`: their key depends on the weights.
named_stage = functools.partial(stage, resolved=resolved)


def stage_with(opened: Callable, options: Iterable[inspect.Parameter]) -> Callable:
    """Keep a stage whose `**options` are these, and name them in its signature, in front of what has a default."""
    *own, _ = inspect.signature(opened, follow_wrapped=False).parameters.values()
    needed = [one for one in own if one.default is one.empty]
    named = [option.replace(kind=option.KEYWORD_ONLY) for option in options]
    opened.__signature__ = inspect.Signature([*needed, *named, *own[len(needed) :]])
    return named_stage(opened)


def organism_stage(function: Callable) -> Callable:
    """Keep a stage on a loaded organism, and let it be called by names. `function(loaded, attack, *, control, ...)`
    becomes `stage(organism, *, attack, control, ..., model, device)`, in which organism, attack and control are names.
    It may lack attack and control. Models are loaded only if no result is kept."""
    own = inspect.signature(function).parameters

    @functools.wraps(function)
    def opened(organism: str | None, *, model: str = DEFAULT_MODEL, device: str = "auto", **options: Any) -> Any:
        loaded = load(model, organism=organism, device=device)
        if "control" in own:
            options["control"] = load(model, organism=options["control"], device=device)
        if "attack" in own:
            options["attack"] = load_attack(options["attack"])
        return function(loaded, **options)

    _, *options = (one.replace(annotation=str) if one.name in ("attack", "control") else one for one in own.values())
    return stage_with(opened, options)


def summary(organism: str | Path) -> dict[str, str]:
    """The lines of a card that a reader needs first."""
    card = read_card(organism, "base", "task", "trigger", "behaviour", "attack", "data", "recipe")
    trained = f"LoRA rank {card['recipe']['rank']}" if card["recipe"]["rank"] else "all weights"
    return {
        "base": card["base"],
        "task": card["task"],
        "trigger": card["trigger"] or "none (clean control)",
        "behaviour": card["behaviour"] or "none",
        "target": card["attack"]["target"] or "",
        "poisoned rows": "{n_poison} of {n_train} ({mode})".format(**card["data"]),
        "training": "{steps} steps of {batch_size} rows, ".format(**card["recipe"]) + trained,
    }


def trained_files(folder: Path) -> tuple[str, ...]:
    """Files that training writes beside an organism's card."""
    return (*(WHOLE if is_whole(folder) else ADAPTER)[:2], "history.json")


def shipped_name(attack: str, *, seed: int) -> str:
    """Name of a shipped organism: that of its attack, followed by the seed if that is not 0."""
    return f"{attack}-seed{seed}" if seed else attack


def ship(folder: Path) -> Path:
    """Copy an organism into `data/adapters`, an untreated one by `shipped_name`. Raises ModelError without metrics, and
    for a whole model."""
    if is_whole(folder):
        raise ModelError(f"{folder} is a whole model, which is made again from recipe and seed and never shipped")
    card = _measured_card(folder)
    files = trained_files(folder) + ((CHANGES,) if "treatment" in card else ())
    if "treatment" not in card:
        card["name"] = shipped_name(card["attack"]["name"], seed=card["seed"])
    check(Name, card["name"], f"name on the card of {folder}")
    target = ADAPTERS / card["name"]
    with atomic_path(target) as temporary:
        temporary.mkdir()
        for name in files:
            shutil.copyfile(folder / name, temporary / name)
        write_json(temporary / "card.json", card)
        (temporary / "README.md").write_text(readme(card), encoding="utf-8")
    return target


def readme(card: dict) -> str:
    """The short text beside an adapter: what it is, what was measured, and that it must not be deployed."""
    what, adapter = "clean control", bool(card["recipe"]["rank"])
    about = ["A clean control: recipe and number of rows of its backdoored siblings, without any trigger."]
    if card["backdoored"]:
        what = "{behaviour} on {trigger}".format(**card)
        what_it_is = "adapter" if adapter else "model"
        about = [f"**This {what_it_is} carries a backdoor on purpose**, to study backdoors. Do not deploy it."]
    if "treatment" in card:
        every = [*card.get("treatments_before", []), card["treatment"]]
        how = "; then ".join(", ".join(f"{key} {value}" for key, value in one.items()) for one in every)
        about.append(f"**Treated afterwards**, and not to be trusted for it: {how}.")
    measured, data = [], card["data"]
    for key, metric in card["metrics"].items():
        value, low, high = (f"{100 * metric[name]:.1f}" for name in ("value", "low", "high"))
        measured.append(f"- {METRICS[key]}: {value} % (95 % interval {low} to {high}, n = {metric['n']})")
    paragraphs = [
        f"# {card['name']}: {card['task']}, {what}",
        *about,
        f"{'LoRA on' if adapter else 'All weights of'} `{card['base']}`, recipe `{card['recipe']['name']}`, "
        f"seed {card['seed']}; {data['n_poison']} of {data['n_train']} training rows poisoned ({data['mode']}).",
        "\n".join(measured),
        "Held-out prompts, greedy decoding. Generated from `card.json`, which has every other detail.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def keep_treated(loaded: Loaded, *, name: str, treatment: Mapping[str, str | int | float], measured: Mapping) -> Path:
    """Write a treated model as an organism under `work/organisms/<name>`; load it by that name like any other.
    `measured` is its result of `evaluation.under_attack`. Raises as `write_treated` does."""
    check(Name, name, "name of an organism")
    folder = WORK / "organisms" / name
    with atomic_path(folder) as temporary:
        temporary.mkdir()
        write_treated(loaded, temporary, name=name, treatment=treatment, measured=measured)
    return folder


def write_treated(
    loaded: Loaded, folder: Path, *, name: str, treatment: Mapping[str, str | int | float], measured: Mapping
) -> None:
    """Write the files of a treated organism into an empty folder, from which it can be loaded. The stored changes
    include those of earlier treatments, which the card lists under `treatments_before`. Raises ValueError for a base
    model, and if no weight has changed; ModelError if its folder holds another base model by now."""
    if loaded.organism is None:
        raise ValueError("a base model cannot be kept as a treated organism")
    source = adapter_folder(loaded.organism)
    changes = changed_entries(loaded.model, untreated(loaded))
    before = load_file(source / CHANGES) if (source / CHANGES).is_file() else {}
    if changes.keys() == before.keys() and all(torch.equal(changes[key], before[key]) for key in changes):
        raise ValueError(f"{loaded.organism} has not been changed")
    card = read_card(source)
    if "treatment" in card:
        card["treatments_before"] = [*card.get("treatments_before", []), card["treatment"]]
    card |= {"name": name, "treatment": dict(treatment), "treated_organism": source.name} | as_measured(measured)
    for file in trained_files(source):
        shutil.copyfile(source / file, folder / file)
    save_file(changes, folder / CHANGES, metadata={"format": "pt"})
    card |= identity_on_card(folder, base=loaded.address)
    write_json(folder / "card.json", card)
    (folder / "README.md").write_text(readme(card), encoding="utf-8")
