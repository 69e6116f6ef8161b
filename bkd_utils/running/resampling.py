"""Measure a drawn sample of what ships anew, and say how far the numbers of each stage lie apart."""

import math
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bkd_utils.common import measurements
from bkd_utils.common.files import WORK, UserError
from bkd_utils.common.measurements import Measurement
from bkd_utils.common.spot_checks import compare, difference, leaves, spots
from bkd_utils.running import stages


@dataclass(frozen=True)
class Again:
    """A measurement that ships, and the same one measured now."""

    shipped: Measurement
    now: Measurement

    def apart(self) -> dict[str, float]:
        """Place of every value of the result -> the distance of the two; infinite where one of them lacks."""
        one, other = (dict(leaves(each.result)) for each in (self.shipped, self.now))
        both = one.keys() & other.keys()
        return {place: difference(one[place], other[place]) if place in both else math.inf for place in one | other}


def sample(paths: Sequence[Path], *, share: float, seed: int) -> list[Path]:
    """A share of the measurements of every stage, at least one of each, drawn by the seed; none for a share of 0."""
    by_stage: dict[str, list[Path]] = {}
    for path in sorted(paths):
        by_stage.setdefault(path.parent.name, []).append(path)
    draw = random.Random(seed)
    return [
        path
        for every in by_stage.values()
        for path in sorted(draw.sample(every, max(1, round(share * len(every))) if share else 0))
    ]


def measure_again(*, share: float, seed: int, device: str = "auto", say: Callable[[str], None] = print) -> list[Again]:
    """Measure a sample of what ships into `work/verified`, from where the same call goes on after it was stopped."""
    folder = measurements.shipped_folder()
    drawn = [
        measurements.read(path) for path in sample(measurements.paths(folder) if folder else [], share=share, seed=seed)
    ]
    minutes, done = sum(one.seconds for one in drawn) / 60, []
    say(f"measuring {len(drawn)} measurements anew; where they were made it took {minutes:.0f} minutes")
    for number, one in enumerate(drawn, start=1):
        say(f"{number} of {len(drawn)}: {one.id}")
        given = one.arguments | ({"device": device} if "device" in one.arguments else {})
        path = stages.place(WORK / "verified", one.stage, given)
        if path.stem != one.key:
            raise UserError(f"{one.id}: other models, attacks or tables are here than those it was measured on")
        stages.measure(one.stage, given, folder=WORK / "verified")
        done.append(Again(one, measurements.read(path)))
    return done


def beyond(again: Again) -> str | None:
    """What `data/spots.toml` does not tolerate about a measurement, in a line."""
    spot = spots().get(again.shipped.stage)
    if spot is None or spot.none:
        return None
    found = compare(again.shipped, again.now, spot)
    return None if found.agrees else str(found)


def report(done: Sequence[Again], console: Console) -> int:
    """Print how far the numbers of each stage lie apart; returns how many measurements lie beyond the tolerance."""
    table = Table("stage", "measured anew", "numbers", "equal to the bit", "median difference", "largest", "where")
    for stage in sorted({one.shipped.stage for one in done}):
        every = [one for one in done if one.shipped.stage == stage]
        apart = {f"{one.shipped.key}, {place}": value for one in every for place, value in one.apart().items()}
        worst, equal = max(apart, key=apart.__getitem__), sum(value == 0 for value in apart.values())
        differ = [f"{value:.2g}" for value in (statistics.median(apart.values()), apart[worst])]
        table.add_row(stage, str(len(every)), str(len(apart)), str(equal), *differ, worst if apart[worst] else "")
    console.print(table)
    faults = [fault for fault in map(beyond, done) if fault]
    for fault in faults:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(done) - len(faults)} measurements agree, {len(faults)} do not")
    return len(faults)
