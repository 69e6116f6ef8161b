"""Measure a drawn sample of what ships anew, and say how far the numbers of each stage lie apart."""

import math
import random
import statistics
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bkd_utils.common import measurements
from bkd_utils.common.files import WORK, UserError
from bkd_utils.common.measurements import Measurement
from bkd_utils.common.spot_checks import compare, difference, leaves, spots
from bkd_utils.running.remeasuring import paths_in, remeasure

Pair = tuple[Measurement, Measurement]  # one that ships, and the same one measured now


def sample(paths: Sequence[Path], *, share: float, seed: int) -> list[Path]:
    """A share of the measurements of every stage, at least one of each, drawn by the seed; none for a share of 0."""
    by_stage: dict[str, list[Path]] = {}
    for path in sorted(paths):
        by_stage.setdefault(path.parent.name, []).append(path)
    draw = random.Random(seed)
    drawn = [draw.sample(every, max(1, round(share * len(every))) if share else 0) for every in by_stage.values()]
    return [path for some in drawn for path in sorted(some)]


def measure_again(*, share: float, seed: int, device: str, console: Console) -> list[Pair]:
    """Measure a sample of what ships into `work/verified`, from where the same call goes on after it was stopped.
    Raises UserError, after all, if some could not be measured."""
    there, folder = paths_in(measurements.shipped_folder()), WORK / "verified"
    drawn = [measurements.read(path) for path in sample(there, share=share, seed=seed)]
    if failed := remeasure([one.id for one in drawn], folder=folder, device=device, console=console):
        raise UserError(f"{failed} of {len(drawn)} measurements could not be made anew")
    paths = [folder / f"{one.id}.json" for one in drawn]
    if other := [one.id for one, path in zip(drawn, paths, strict=True) if not path.is_file()]:
        raise UserError(f"{other[0]}: other models, attacks or tables are here than those it was measured on")
    return list(zip(drawn, map(measurements.read, paths), strict=True))


def apart(pair: Pair) -> dict[str, float]:
    """Place of every value of the two results -> their distance; infinite where one of them lacks it."""
    one, other = (dict(leaves(each.result)) for each in pair)
    both = one.keys() & other.keys()
    return {place: difference(one[place], other[place]) if place in both else math.inf for place in one | other}


def report(done: Sequence[Pair], console: Console) -> int:
    """Print how far the numbers of each stage lie apart, and which measurements lie beyond the tolerance that
    `data/spots.toml` has for their stage; returns how many these are."""
    table = Table("stage", "measured anew", "numbers", "equal to the bit", "median difference", "largest", "where")
    faults = []
    for stage in sorted({one.stage for one, _ in done}):
        every = [pair for pair in done if pair[0].stage == stage]
        found = {f"{pair[0].key}, {place}": value for pair in every for place, value in apart(pair).items()}
        worst, equal = max(found, key=found.__getitem__), sum(value == 0 for value in found.values())
        differ = [f"{value:.2g}" for value in (statistics.median(found.values()), found[worst])]
        table.add_row(stage, str(len(every)), str(len(found)), str(equal), *differ, worst if found[worst] else "")
        if (spot := spots().get(stage)) and not spot.none:
            faults += [str(check) for check in (compare(*pair, spot) for pair in every) if not check.agrees]
    console.print(table)
    for fault in faults:
        console.print(fault, style="red", markup=False, highlight=False, soft_wrap=True)
    console.print(f"{len(done) - len(faults)} measurements agree, {len(faults)} do not")
    return len(faults)
