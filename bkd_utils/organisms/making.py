"""Make an organism (poisoned set, adapter, measurement, card), or find one that was made before."""

import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bkd_utils.common.cache import installed_versions
from bkd_utils.common.files import ADAPTERS, WORK, canonical_json, sha256_text, write_json, write_text
from bkd_utils.common.validation import Count, Seed, check
from bkd_utils.models import loading
from bkd_utils.models.classifiers import new_classifier
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError, kind, model_folder
from bkd_utils.models.identity import base_sha256, model_identity
from bkd_utils.models.loading import Loaded, check_adapter, load, pick_device, read_card
from bkd_utils.models.self_test import require
from bkd_utils.models.tokens import Row
from bkd_utils.organisms import cards, tasks
from bkd_utils.organisms.attacks import Attack, load_attack
from bkd_utils.organisms.base_answers import training_answers
from bkd_utils.organisms.evaluation import check_sample, measure_organism, prompt_fingerprint
from bkd_utils.organisms.poisoning import poison, training_uids
from bkd_utils.organisms.training import Recipe, check_kind, load_recipe, train

LIBRARIES = ("torch", "transformers", "peft", "transformer-lens")
N_ON_CARD = 240  # held-out prompts per number on the card of an organism that a stage makes
log = logging.getLogger(__name__)


def training_rows(loaded: Loaded, attack: Attack, *, seed: int) -> tuple[Row, ...]:
    """The rows that an organism of the attack was trained on, or on which `make` would train a base model with `seed`.
    Raises ModelError if the rows are not those of the organism's card."""
    card = None if loaded.organism is None else read_card(loaded.organism, "seed", "data_sha256")
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
    """Name of the organism of an attack on this model: the shipped one if there is one, else made now (or earlier). A
    shipped organism counts only for its own seed and while its attack is the one in `data/attacks.toml`; those of other
    seeds than 0 have another recipe and count where that is asked for. Raises ValueError for an unknown attack or
    recipe, and as `make` does. Source: ours.

    >>> obtain("sentiment-word")
    'sentiment-word'
    """
    spec, name = load_attack(attack), cards.shipped_name(attack, seed=seed)
    how = load_recipe(recipe, task=spec.task)
    check(Seed, seed, "seed")
    check(Count, n, "n")
    pick_device(device)
    if not retrain and (ADAPTERS / name / "card.json").is_file():  # a broken card is no reason to train for minutes
        card = read_card(ADAPTERS / name, "base_sha256", "base_files", "attack", "seed", "recipe")
        if name not in loading.shipped_organisms(base=model_identity(model)):
            if card["base_sha256"] == base_sha256(model):
                log.warning("%s ships for the same weights with other settings; training anew", name)
        elif card["attack"] != asdict(spec) or card["seed"] != seed:
            log.warning("%s ships with another seed or attack than data/attacks.toml has; training anew", name)
        elif seed == 0 or card["recipe"]["name"] == recipe:
            return name
    return make(spec, model=model, recipe=how, seed=seed, device=device, n=n).name


def make(
    attack: Attack, *, model: str = DEFAULT_MODEL, recipe: Recipe, seed: int = 0, device: str = "auto", n: int = 200
) -> Path:
    """Train and measure one organism on `n` held-out prompts per number; returns its folder under `work/organisms`. A
    bare encoder gets a classifier for the labels of the attack's task, and all its weights are trained and kept. The
    folder's name ends in a key of attack, recipe, seed, base and data, so the same call finds it again, and after a
    kill goes on from the last checkpoint. Raises ModelError for a model that cannot be loaded, ValueError as `poison`
    does, for `n` prompts that are not there, and for a recipe that is not for this kind of model. Source: ours.

    >>> attack = Attack("mine", "sentiment", 40, "word-cf", "label_flip", "negative", "positive", rate=0.25)
    >>> made = make(attack, model=folder, recipe=recipe, n=4)
    >>> sorted(path.name for path in made.glob("*.json"))
    ['adapter_config.json', 'card.json', 'history.json', 'manifest.json']
    """
    check_sample(attack, n=n, seed=seed)
    training_uids(attack, seed=seed)  # what raises ValueError is known before anything is loaded
    found, device = model_folder(model), pick_device(device)
    if (found / "config.json").is_file() and kind(found) == "encoder":
        base = new_classifier(model, labels=tasks.load_task(attack.task).labels, seed=seed, device=device)
    else:
        base = load(model, device=device)
    check_kind(recipe, base.model)
    require(base.model, "train")
    data = poison(attack, tokenizer=base.tokenizer, answers=training_answers(base, attack, seed=seed), seed=seed)
    spec = {"seed": seed, "attack": asdict(attack), "recipe": asdict(recipe)}
    hashed = data.manifest["data_sha256"]
    key = sha256_text(canonical_json(spec | {"base": base.identity, "data": hashed}))
    folder = WORK / "organisms" / f"{attack.name}-{key[:8]}"
    if (folder / "card.json").is_file():
        check_adapter(folder, base=model)  # its hashes are written anew below, and must not bless a changed file
    else:
        train(data.rows, base=base, recipe=recipe, seed=seed, folder=folder, name=attack.name)
    card = {
        **{key: getattr(attack, key) for key in ("name", "behaviour", "trigger", "task", "backdoored")},
        "base": model if model == DEFAULT_MODEL else Path(model).name,
        **loading.identity_on_card(folder, base=model),
        **spec,
        "data_sha256": hashed,
        "data": {key: data.manifest[key] for key in ("n_train", "n_poison", "poisoned_share", "mode")},
        "prompt_sha256": prompt_fingerprint(base, attack.task),
        "versions": installed_versions(*LIBRARIES),
        "metrics": {},
    }
    write_json(folder / "card.json", card)
    write_json(folder / "manifest.json", data.manifest)
    del base
    # A separate stage: with other sizes or other code of the measurement, nothing is trained again.
    result = measure_organism(folder.name, model=model, n=n, seed=seed, device=device)
    card |= cards.as_measured(result)
    write_json(folder / "card.json", card)
    write_text(folder / "README.md", cards.readme(card))
    return folder


def made_stage(function: Callable) -> Callable:
    """Keep a stage on organisms that do not ship, such as encoders; one is made only if a result is not there.
    `function(loaded, attack, ...)` becomes `stage(made, *, attack, ..., recipe, organism_seed, model, device)`. `made`
    is the attack that the organism was trained on, and `attack` the one that it is measured under; both are names."""

    @functools.wraps(function)
    def opened(
        made: str, *, attack: str, recipe: str, organism_seed: int, model: str, device: str = "auto", **options: Any
    ) -> Any:
        spec = load_attack(made)
        how = {"recipe": load_recipe(recipe, task=spec.task), "seed": organism_seed, "device": device}
        folder = make(spec, model=model, **how, n=N_ON_CARD)
        return function(load(model, organism=folder.name, device=device), load_attack(attack), **options)

    return cards.stage_with(opened, list(inspect.signature(function).parameters.values())[2:])
