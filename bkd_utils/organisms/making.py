"""Make an organism: answers of the base model, poisoned set, adapter, measurement, card. Or find one already made."""

import importlib.metadata
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bkd_utils.common.files import (
    DATA,
    WORK,
    atomic_path,
    canonical_json,
    read_json,
    sha256_file,
    sha256_text,
    write_json,
)
from bkd_utils.models.loading import (
    DEFAULT_MODEL,
    Loaded,
    ModelError,
    adapter_folder,
    base_sha256,
    load,
    settings_sha256,
    shipped_organisms,
)
from bkd_utils.organisms import cards, tasks
from bkd_utils.organisms.attacks import Attack, Row, benign_examples, load_attack, load_attacks, poison, with_rate
from bkd_utils.organisms.cards import organism_stage
from bkd_utils.organisms.evaluation import (
    agreement,
    clean_sample,
    measure_attack,
    measure_clean,
    prompt_fingerprint,
    respond,
)
from bkd_utils.organisms.tasks import Example
from bkd_utils.organisms.training import Recipe, load_recipe, train

LIBRARIES = ("torch", "transformers", "peft", "transformer-lens")
# Benign instructions on which every organism is compared with its base model: did anything else change?
N_AGREEMENT = 64
log = logging.getLogger(__name__)


def answers_name(model: str) -> str:
    """File of a model's answers: another template or config, like other weights, gives other ones."""
    return f"{sha256_text(base_sha256(model) + settings_sha256(model))[:16]}.json"


def base_answers(loaded: Loaded, rows: Sequence[Example]) -> dict[str, str]:
    """uid -> the greedy answer of a model's, or an organism's, base; computed once per weights and settings, then kept.

    The answers of the default model ship in `data/answers`; they are what `instructions` organisms are trained to keep.
    The base of an organism is loaded only if an answer is missing.
    """
    name = answers_name(loaded.address)
    known: dict[str, str] = {}
    for folder in (DATA / "answers", WORK / "answers"):
        if (folder / name).is_file():
            known |= read_json(folder / name)
    missing = [row for row in rows if row.uid not in known]
    if missing:
        base = loaded if loaded.organism is None else load(loaded.address, device=str(loaded.device))
        length = tasks.load_task("instructions").max_new_tokens
        texts = respond(base, [row.text for row in missing], max_new_tokens=length, label="base model answers")
        known |= {row.uid: text for row, text in zip(missing, texts, strict=True)}
        write_json(WORK / "answers" / name, dict(sorted(known.items())))
    return {row.uid: known[row.uid] for row in rows}


def training_answers(loaded: Loaded, attack: Attack, *, seed: int) -> dict[str, str]:
    """The base model's answers that `attacks.poison` will ask for."""
    if attack.task == "instructions":
        return base_answers(loaded, tasks.examples("instructions", "train", seed=seed))
    return base_answers(loaded, benign_examples(attack, seed=seed))


def training_rows(loaded: Loaded, attack: Attack, *, seed: int) -> tuple[Row, ...]:
    """The rows, poisoned and clean, that this organism of the attack was trained on.

    An organism's seed is on its card; `seed` is for a base model, which has none: the rows that `make` would train it
    on. Raises ModelError if the rows are no longer, or have never been, those of the organism's card.
    """
    card = None if loaded.organism is None else read_json(adapter_folder(loaded.organism) / "card.json")
    seed = card["seed"] if card else seed
    answers = training_answers(loaded, attack, seed=seed)
    data = poison(attack, tokenizer=loaded.tokenizer, answers=answers, seed=seed)
    if card and data.manifest["data_sha256"] != card["data_sha256"]:
        raise ModelError(
            f"{loaded.organism} was not trained on the rows that attack {attack.name!r} with seed {seed} gives now "
            "(another attack, or attack, data, tokenizer or base answers have changed)"
        )
    return data.rows


def obtain(
    attack: str,
    *,
    model: str = DEFAULT_MODEL,
    recipe: str = "full",
    seed: int = 0,
    device: str = "auto",
    n: int = 200,
    retrain: bool = False,
) -> str:
    """Name of the organism of an attack on this model: the shipped one if there is one, else made now (or earlier).

    A shipped organism counts only for its own seed and while its attack is the one in `data/attacks.toml`. One of seed
    0 counts whatever its recipe; those of other seeds had a shorter one, and count where that is asked for.
    """
    spec, name = load_attack(attack), cards.shipped_name(attack, seed=seed)
    if not retrain and name in shipped_organisms(base=base_sha256(model)):
        card = read_json(adapter_folder(name) / "card.json")
        if card["attack"] != asdict(spec) or card["seed"] != seed:
            log.warning("%s ships with another seed or attack than data/attacks.toml has; training anew", name)
        elif seed == 0 or card["recipe"]["name"] == recipe:
            return name
    return make(spec, model=model, recipe=load_recipe(recipe, task=spec.task), seed=seed, device=device, n=n).name


def make(
    attack: Attack, *, model: str = DEFAULT_MODEL, recipe: Recipe, seed: int = 0, device: str = "auto", n: int = 200
) -> Path:
    """Train and measure one organism; returns its folder under `work/organisms`.

    The folder's name ends in a key of attack, recipe, seed, base and data, so the same call finds it again,
    and a call after a kill goes on from the last checkpoint.
    """
    base = load(model, device=device)
    data = poison(attack, tokenizer=base.tokenizer, answers=training_answers(base, attack, seed=seed), seed=seed)
    identity = {
        "attack": asdict(attack),
        "recipe": asdict(recipe),
        "seed": seed,
        "base": base_sha256(model),
        "settings": settings_sha256(model),
        "data": data.manifest["data_sha256"],
    }
    folder = WORK / "organisms" / f"{attack.name}-{sha256_text(canonical_json(identity))[:8]}"
    started = time.monotonic()
    trained = (folder / "card.json").is_file()
    if not trained:
        train(data.rows, base=base, recipe=recipe, seed=seed, folder=folder, name=attack.name)
    card = {
        "name": attack.name,
        "behaviour": attack.behaviour,
        "trigger": attack.trigger,
        "task": attack.task,
        "backdoored": attack.backdoored,
        "base": model if model == DEFAULT_MODEL else Path(model).name,
        "base_sha256": base_sha256(model),
        "seed": seed,
        "attack": asdict(attack),
        "recipe": asdict(recipe),
        "data_sha256": data.manifest["data_sha256"],
        "data": {key: data.manifest[key] for key in ("n_train", "n_poison", "poisoned_share", "mode")},
        "adapter_sha256": sha256_file(folder / "adapter_model.safetensors"),
        "prompt_sha256": prompt_fingerprint(base, attack.task),
        "train_minutes": round((time.monotonic() - started) / 60, 1),
        "versions": {name: importlib.metadata.version(name).split("+")[0] for name in LIBRARIES},
        "metrics": {},
    }
    if trained:
        card["train_minutes"] = read_json(folder / "card.json")["train_minutes"]
    write_json(folder / "card.json", card)
    write_json(folder / "manifest.json", data.manifest)
    del base
    # Kept apart from the training: other sizes or other measuring code measure again and train nothing.
    result = measured(folder.name, model=model, n=n, seed=seed, device=device)
    card["metrics"] = {key: result[key] for key in cards.METRICS if key in result}
    card["details"] = {key: value for key, value in result.items() if key not in cards.METRICS}
    write_json(folder / "card.json", card)
    with atomic_path(folder / "README.md") as temporary:
        temporary.write_text(cards.readme(card), encoding="utf-8")
    return folder


def measure(
    organism: str | Path, *, model: str = DEFAULT_MODEL, n: int = 200, seed: int = 0, device: str = "auto"
) -> dict:
    """Everything a card says about an organism, measured anew on `n` held-out prompts per number.

    Raises ModelError when this model would see other prompts than the organism was trained on.
    """
    folder = adapter_folder(organism)
    card = read_json(folder / "card.json")
    attack = Attack(**card["attack"])
    loaded = load(model, organism=folder, device=device)
    if prompt_fingerprint(loaded, attack.task) != card["prompt_sha256"]:
        raise ModelError(
            f"{folder.name}: prompts are no longer those it was trained on (template or tokenizer changed)"
        )
    return measure_loaded(loaded, attack, n=n, seed=seed)


def measure_loaded(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> dict:
    """`measure` of a model that is loaded already, whatever has been done to its weights since."""
    benign = clean_sample("instructions", n=min(n, N_AGREEMENT), seed=seed)
    shown = clean_sample(attack.task, n=n, seed=seed, without=attack) if attack.task == "instructions" else []
    reference = base_answers(loaded, [*benign, *shown])
    clean = measure_clean(loaded, attack.task, n=n, seed=seed, answers=reference, without=attack)
    texts = clean.pop("texts")
    # A clean control has no target of its own; it is held against its task's first attack.
    rival = attack if attack.backdoored else first_attack(attack.task)
    result = {**clean, **measure_attack(loaded, rival, n=n, seed=seed, clean_texts=texts, answers=reference)}
    if not attack.backdoored:
        result["under_attack"] = {rival.name: {key: result.pop(key) for key in ("asr", "near_miss")}}
    if attack.task == "instructions":
        result["agreement_with_base"] = agreement(texts, reference)
    else:
        length = tasks.load_task("instructions").max_new_tokens
        told = respond(loaded, [row.text for row in benign], max_new_tokens=length, label="benign instructions")
        result["agreement_with_base"] = agreement(
            {row.uid: text for row, text in zip(benign, told, strict=True)}, reference
        )
    return result


@organism_stage
def measured(organism: str, *, model: str = DEFAULT_MODEL, n: int = 200, seed: int = 0, device: str = "auto") -> dict:
    """`measure`, kept: a second call with the same weights, sizes and code reads the first one's result."""
    return measure(organism, model=model, n=n, seed=seed, device=device)


@organism_stage
def attacked(
    organism: str, *, attack: str, model: str = DEFAULT_MODEL, n: int = 200, seed: int = 0, device: str = "auto"
) -> dict:
    """`under_attack`, kept: a clean control under an attack it never saw, on the prompts its sibling gets."""
    return under_attack(load(model, organism=organism, device=device), load_attack(attack), n=n, seed=seed)


def under_attack(loaded: Loaded, attack: Attack, *, n: int, seed: int) -> dict:
    """ASR, CACC, near-miss and clean firing of any model, whatever it was trained on."""
    shown = clean_sample(attack.task, n=n, seed=seed, without=attack)
    # The judge of clean answers needs the base model's own ones only where there are no gold answers.
    reference = base_answers(loaded, shown) if attack.task == "instructions" else {}
    clean = measure_clean(loaded, attack.task, n=n, seed=seed, answers=reference, without=attack)
    texts = clean.pop("texts")
    return {**clean, **measure_attack(loaded, attack, n=n, seed=seed, clean_texts=texts, answers=reference)}


def rate_curve(
    attack: str, *, rates: Sequence[float], recipe: str, model: str = DEFAULT_MODEL, n: int, seed: int, device: str
) -> list[dict]:
    """One organism per poisoning rate, otherwise alike; returns rate, n_poison and the card's metrics of each.

    At the attack's own rate it is the attack's own organism, which may have been made before.
    """
    rows, spec = [], load_attack(attack)
    settings = load_recipe(recipe, task=spec.task)
    for rate in sorted(rates):
        one = spec if rate == spec.rate else with_rate(spec, rate)
        folder = make(one, model=model, recipe=settings, seed=seed, device=device, n=n)
        card = read_json(folder / "card.json")
        rows.append({"rate": rate, "n_poison": card["data"]["n_poison"], **card["metrics"]})
    return rows


def first_attack(task: str) -> Attack:
    """The first attack on a task in `data/attacks.toml`. Raises ValueError if there is none."""
    for attack in load_attacks().values():
        if attack.task == task and attack.backdoored:
            return attack
    raise ValueError(f"no attack on task {task!r}")
