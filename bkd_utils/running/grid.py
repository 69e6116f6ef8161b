"""The cells of a grid: the organisms and measurements that a profile of `data/grid.toml` asks for, and their cost."""

import inspect
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field
from rich.table import Table as Shown

from bkd_utils.common.files import ADAPTERS, DATA, UserError, canonical_json, read_json
from bkd_utils.common.measurements import paths, shipped_folder
from bkd_utils.common.results import plain
from bkd_utils.common.validation import Count, Name, Seed, Table, Text, check, read_tables
from bkd_utils.models.folders import DEFAULT_MODEL, ModelError
from bkd_utils.models.identity import short_name
from bkd_utils.models.loading import adapter_folder, read_card
from bkd_utils.organisms.attacks import control_of, first_attack, load_attack
from bkd_utils.organisms.cards import shipped_name
from bkd_utils.organisms.training import load_recipe
from bkd_utils.running import stages

T = TypeVar("T")
# What a cell is about. All other arguments of a stage are sizes, which a profile may set.
ABOUT = ("organism", "attack", "control", "task", "model", "seed", "device")
CORES = 2  # on which seconds are estimated, and were measured for what ships


def _each_once(given: list) -> list:
    if twice := [one for one in given if given.count(one) > 1]:
        raise ValueError(f"{twice[0]!r} is there twice")
    return given


Seconds = Annotated[float, Field(gt=0, le=1e7)]
Each = Annotated[list[T], Field(min_length=1), AfterValidator(_each_once)]


class Organisms(Table):
    """Held-out prompts per number on a card; estimated seconds of training and measuring an organism."""

    n: Count
    seconds: Seconds


class Stage(Table):
    """Estimated seconds of a cell, sizes by the stage's own names, and the attacks, if not all of the profile."""

    seconds: Seconds
    sizes: dict[str, Any] = Field(default_factory=dict)
    attacks: Each[Name] | None = None


class Profile(Table):
    """A table of `data/grid.toml`. `threads`, `memory_gib` and `minutes` are those that one cell is given."""

    models: Each[Text]
    attacks: Each[Name]
    seeds: Each[Seed]
    recipe: Name
    threads: Count
    memory_gib: Count
    minutes: Count
    organism: Organisms
    stages: Annotated[dict[str, Stage], Field(min_length=1)]


@dataclass(frozen=True)
class Cell:
    """One file of a grid. `asked` is all that decides it, `needs` are the files of the organisms that it is made on,
    and `known` says where its `seconds` come from: a record, an estimate, or "shipped" for what is not made."""

    target: str
    asked: dict[str, Any]
    needs: tuple[str, ...]
    seconds: float
    known: str

    @property
    def stage(self) -> str:
        return Path(self.target).stem


def read_profile(name: str, *, path: Path = DATA / "grid.toml") -> Profile:
    """A profile of a grid. Raises UserError or ValueError, which names the place and what is allowed, for an unknown
    profile, key, stage, attack, recipe or size, for an empty list and for what is listed twice."""
    tables = read_tables(path)
    if name not in tables:
        raise UserError(f"unknown profile {name!r} of {path.name}; known: {', '.join(tables)}")
    profile = check(Profile, tables[name], f"{path.name}, [{name}]")
    try:
        for attack in profile.attacks:
            load_recipe(profile.recipe, task=load_attack(attack).task)
        for stage, given in profile.stages.items():
            _check_stage(stage, given, profile.attacks)
    except (ValueError, UserError) as error:
        raise UserError(f"{path.name}, [{name}]: {error}") from None
    return profile


def _check_stage(name: str, given: Stage, attacks: list[str]) -> None:
    parameters = inspect.signature(stages.stage(name)).parameters
    if "organism" not in parameters:
        raise UserError(f"stages.{name}: not a stage that is measured on one organism")
    if other := [attack for attack in given.attacks or () if attack not in attacks]:
        raise UserError(f"stages.{name}.attacks: {other[0]!r} is none of the profile's: {', '.join(attacks)}")
    sizes = {key: one for key, one in parameters.items() if key not in ABOUT}
    if unknown := [key for key in given.sizes if key not in sizes]:
        raise UserError(f"stages.{name}.sizes: unknown: {', '.join(unknown)}; known: {', '.join(sizes)}")
    for key, one in sizes.items():
        if key in given.sizes:
            check(Count if key == "n" else one.annotation, given.sizes[key], f"stages.{name}.sizes.{key}")
        elif one.default is one.empty:
            raise UserError(f"stages.{name}.sizes.{key} is missing, and the stage has no default for it")


def expand(profile: Profile, *, model: str | None = None) -> list[Cell]:
    """All cells of a profile, organisms first; `model` takes the place of its models."""
    record, cells = _on_record(shipped_folder()), {}
    for address, attack, seed in product([model] if model else profile.models, profile.attacks, profile.seeds):
        # A control may be one of the attacks as well.
        cells |= {cell.target: cell for cell in _of_one(profile, address, attack, seed, record)}
    return sorted(cells.values(), key=lambda cell: len(cell.needs) > 0)


def _of_one(profile: Profile, model: str, attack: str, seed: int, record: Mapping[str, float]) -> Iterator[Cell]:
    """The cells of one model, attack and seed: its organism, the clean control where one is needed, the stages."""
    spec, organism = load_attack(attack), _organism(profile, model, attack, seed)
    yield organism
    for name, stage in profile.stages.items():
        parameters, needs = inspect.signature(stages.stage(name)).parameters, [organism]
        if attack not in (stage.attacks or profile.attacks):
            continue
        if "control" in parameters:
            if not spec.backdoored:
                continue
            needs.append(_organism(profile, model, control_of(attack), seed))
            yield needs[1]
        # As everywhere, a clean control is measured under the first attack on its task.
        under = attack if spec.backdoored else first_attack(spec.task).name
        about = {"attack": under, "task": spec.task, "model": model, "seed": seed}
        arguments = {key: value for key, value in about.items() if key in parameters} | stage.sizes
        asked = {"stage": name, "arguments": arguments, "organisms": [one.asked for one in needs]}
        whole = {key: one.default for key, one in parameters.items() if one.default is not one.empty} | arguments
        found = record.get(_like(name, plain(whole)))
        target = Path(organism.target).with_name(f"{name}.json").as_posix()
        known = "on record" if found else "estimate"
        yield Cell(target, asked, tuple(one.target for one in needs), found or stage.seconds, known)


def _organism(profile: Profile, model: str, attack: str, seed: int) -> Cell:
    asked = {"attack": attack, "model": model, "recipe": profile.recipe, "seed": seed, "n": profile.organism.n}
    # A local folder may change, or be called like another one; an address of a hub says it all.
    label = short_name(model) if Path(model).expanduser().is_dir() else model.replace("/", "--")
    target = f"{label}/{attack}-seed{seed}/organism.json"
    card = ADAPTERS / shipped_name(attack, seed=seed) / "card.json"
    # As `making.obtain` has it: shipped organisms of other seeds than 0 have a shorter recipe.
    ships = model == DEFAULT_MODEL and card.is_file()
    if ships and (seed == 0 or read_card(card.parent, "recipe")["recipe"]["name"] == profile.recipe):
        return Cell(target, asked, (), 0.0, "shipped")
    return Cell(target, asked, (), profile.organism.seconds, "estimate")


def _like(stage: str, arguments: Mapping[str, Any]) -> str:
    """One text for all calls of a stage with the same sizes on the same model."""
    return canonical_json([stage, {key: one for key, one in arguments.items() if key == "model" or key not in ABOUT}])


def _on_record(folder: Path | None) -> dict[str, float]:
    """Mean seconds of the measurements in a folder that were made on a processor, by `_like`."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for one in map(read_json, paths(folder) if folder else ()):
        if one["machine"]["device"] in (None, "cpu"):
            seconds[_like(one["stage"], one["arguments"])].append(one["seconds"])
    return {like: sum(found) / len(found) for like, found in seconds.items()}


def is_there(cell: Cell, folder: Path) -> bool:
    """Does the folder of a grid hold this cell, of these sizes, and what it names?"""
    try:
        kept = read_json(folder / cell.target)
        measured = folder / "measurements" / f"{kept['measurement']}.json" if cell.needs else None
        named = measured or adapter_folder(kept["organism"])
        return kept["asked"] == cell.asked and named.exists()
    except (OSError, ValueError, KeyError, TypeError, ModelError):
        return False


def table(cells: list[Cell], there: set[str]) -> Shown:
    """Cells by stage, how many are there, and the core hours of the others."""
    shown, rows = Shown("stage", "cells", "there", "seconds per cell", "core hours left"), defaultdict(list)
    for cell in cells:
        rows[cell.stage].append(cell)
    for stage, mine in [*rows.items(), ("all", cells)]:
        left = sum(cell.seconds for cell in mine if cell.target not in there)
        known = " or ".join(sorted({f"{cell.seconds:.0f} ({cell.known})" for cell in mine if stage != "all"}))
        done = sum(cell.target in there for cell in mine)
        shown.add_row(stage, str(len(mine)), str(done), known, f"{CORES * left / 3600:.2f}")
    return shown
