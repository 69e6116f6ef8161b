"""Measure a small part of what ships again, and hold the numbers against each other.

`data/spots.toml` says for each stage which part that is, which numbers must agree, and how far they may lie apart."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

from pydantic import Field

from bkd_utils.common import cache, measurements
from bkd_utils.common.files import DATA, UserError, read_json
from bkd_utils.common.measurements import Measurement
from bkd_utils.common.validation import Table, read_tables, while_unchanged
from bkd_utils.common.validation import check as check_kind


class Spot(Table):
    """How one stage is checked. `part` replaces arguments, so that less is measured; without it the whole measurement
    is. `where` restricts which measurements are checked in a run. Of the result count places that fit a pattern in
    `fields`, or all of it; lists of tables whose rows carry the names in `rows` are compared row by row. A number may
    lie `tolerance` away, and the share `flips` of them further. `none` is the reason why a stage is not checked in a
    run. `on_cpu` is for how many seconds of two cores one on record of a graphics card stands."""

    part: dict[str, Any] = Field(default_factory=dict)
    where: dict[str, Any] = Field(default_factory=dict)
    fields: list[str] = Field(default_factory=list)
    rows: list[str] = Field(default_factory=list)
    tolerance: Annotated[float, Field(ge=0)] = 0.0
    flips: Annotated[float, Field(ge=0, le=1)] = 0.0
    on_cpu: Annotated[float, Field(gt=0)] = 1.0
    none: str | None = None


@dataclass(frozen=True)
class Checked:
    """One comparison: `numbers` were compared, `beyond` of them lie further apart than `tolerance`, and at `place` the
    difference is the largest, `worst`. Other values must be equal; `worst` is infinite if they are not."""

    id: str
    numbers: int
    beyond: int
    worst: float
    place: str
    shipped: Any
    now: Any
    tolerance: float
    agrees: bool
    seconds: float

    def __str__(self) -> str:
        here = measurements.machine_of({})
        told = f"{self.id}, {self.place}: {self.shipped!r} ships, {self.now!r} was measured here"
        many = f"{self.beyond} of {self.numbers} numbers lie further apart than {self.tolerance:g}"
        return f"{told} ({many}; {here.processor}, {here.cores} cores)"


@while_unchanged("spots.toml")
def spots() -> dict[str, Spot]:
    """Stage -> how it is checked. Raises ValueError that names table, key and value for one that is not right."""
    tables = read_tables(DATA / "spots.toml")
    return {name: check_kind(Spot, table, f"spots.toml, [{name}]") for name, table in tables.items()}


def check(one: Measurement) -> Checked:
    """Measure the small part of a measurement here and now, unless it is kept, and compare. Raises UserError for a
    stage without a spot, and where the part has no number in common with the whole."""
    spot = spots().get(one.stage)
    if spot is None or spot.none:
        raise UserError(f"{one.stage} has no spot check: {spot.none if spot else 'none is declared in spots.toml'}")
    given = one.arguments | spot.part
    if "device" in given:
        given["device"] = "auto"  # that of this machine, and not the one where it was measured first
    # Not among what is kept, where the whole of a measurement would stand in for what ships.
    with patch.dict(os.environ, BKD_KEEP=str(cache.kept_folder() / "checks")):
        now = cache.here(cache.STAGES[one.stage], **given)
    return compare(one, now, spot)


def compare(one: Measurement, now: Measurement, spot: Spot) -> Checked:
    """Hold the numbers that both results have against each other. Raises UserError if there are none."""
    shipped, found = (dict(leaves(each.result, spot.rows)) for each in (one, now))
    asked = spot.fields or ["*"]
    common = [place for place in shipped if place in found and any(fnmatchcase(place, each) for each in asked)]
    if not common:
        raise UserError(f"{one.id}: the part in spots.toml has no number in common with what ships")
    apart = {place: difference(shipped[place], found[place]) for place in common}
    worst = max(apart, key=apart.__getitem__)
    beyond = sum(value > spot.tolerance for value in apart.values())
    largest = {"worst": apart[worst], "place": worst, "shipped": shipped[worst], "now": found[worst]}
    judged = {"tolerance": spot.tolerance, "agrees": beyond <= spot.flips * len(common)}
    return Checked(one.id, numbers=len(common), beyond=beyond, **largest, **judged, seconds=now.seconds)


def difference(one: Any, other: Any) -> float:
    """Distance of two numbers; 0 for equal other values, and infinity for different ones."""
    numbers = all(isinstance(value, int | float) for value in (one, other))
    return abs(one - other) if numbers else 0.0 if one == other else math.inf


def leaves(value: Any, rows: Sequence[str] = (), place: str = "") -> Iterator[tuple[str, Any]]:
    """Every single value inside a result, with its place, such as `hits.asr.3f2` or `[k=8, draw=0].asr.value`. Raises
    UserError for a list in which two rows have the same values under the names in `rows`."""
    if isinstance(value, Mapping):
        inside = ((f"{place}.{name}" if place else str(name), one) for name, one in value.items())
    elif isinstance(value, list):
        names = [_row(number, one, rows) for number, one in enumerate(value)]
        if len(set(names)) < len(names):
            twice = max(names, key=names.count)
            raise UserError(f"{place}[{twice}]: two rows have this name; `rows` in spots.toml must tell them apart")
        inside = ((f"{place}[{name}]", one) for name, one in zip(names, value, strict=True))
    else:
        yield place, value
        return
    for where, one in inside:
        yield from leaves(one, rows, where)


def _row(number: int, value: Any, rows: Sequence[str]) -> str:
    named = rows and isinstance(value, Mapping) and all(name in value for name in rows)
    return ", ".join(f"{name}={value[name]}" for name in rows) if named else str(number)


_done: set[str] = set()


def run(*names: str) -> list[Checked]:
    """Check one shipped measurement of each stage that this notebook has used so far, or of the stages named. Of all
    that ship it is the one that took the fewest seconds, so that two notebooks check the same one. A stage is checked
    once. Nothing is checked where nothing that ships was used. Raises UserError, after all checks, that lists the
    numbers which do not agree."""
    known, done = spots(), []
    for name in sorted({one["stage"] for one in cache.used if one["how"].startswith("shipped")}):
        spot = known.get(name)
        if name in _done or (names and name not in names) or spot is None or spot.none:
            continue
        if (chosen := _cheapest(name, spot)) is not None:
            found = check(measurements.read(chosen))
            _done.add(name)
            done.append(found)
            cache.note({"how": "checked"} | asdict(found) | ({} if math.isfinite(found.worst) else {"worst": None}))
    if faults := [str(found) for found in done if not found.agrees]:
        raise UserError("what was measured here is not what ships: " + "; ".join(faults))
    return done


def _cheapest(stage: str, spot: Spot) -> Path | None:
    """The shipped measurement of a stage that took the fewest seconds, of those with the arguments in `where`."""
    known = [(read_json(path), path) for path in (measurements.shipped_folder() / stage).glob("*.json")]
    found = [(one["seconds"], path) for one, path in known if spot.where.items() <= one["arguments"].items()]
    return min(found, default=(0.0, None))[1]
