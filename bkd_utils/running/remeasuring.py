"""Measure again what ships, all of it or one part of several: each stage is called with the arguments in its file."""

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bkd_utils.common import cache, measurements
from bkd_utils.common.files import UserError, check_writable
from bkd_utils.common.spot_checks import spots
from bkd_utils.running import stages
from bkd_utils.running.progress import duration, one_line, shown


@dataclass(frozen=True)
class Cell:
    """A call of a stage, its expected seconds on two cores, whether a card made it, and why its file cannot be read."""

    id: str
    stage: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    on_gpu: bool = False
    problem: str | None = None


def parse_shard(text: str) -> tuple[int, int]:
    """Number and count of a part such as "2/8". Raises UserError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    raise UserError(f"shard {text!r}: a shard is K/N with K from 1 to N, as 2/8 for the second of eight")


def remeasure(
    ids: Iterable[str], *, folder: Path, console: Console, shard: str = "1/1", device: str | None = None
) -> int:
    """Call the stages of shipped measurements again, keep the results in a folder; returns how many failed. What is in
    the folder by the code that is here is not measured again. A cell that fails is named and the others go on. `device`
    replaces the one in the files. Raises UserError for a shard that is none, where nothing ships, and for a folder that
    cannot be written to."""
    todo, already = expect(ids, folder=folder, console=console, shard=shard, device=device)
    check_writable(folder)
    with shown(console, [cell.seconds for cell in todo]) as pace:
        for cell in todo:
            check_writable(folder)  # what cannot be kept need not be measured
            pace.finished(failed=not _measured(cell, folder, console))
    console.print(f"{pace.done - pace.failed} measured, {already} there already, {pace.failed} failed", highlight=False)
    return pace.failed


def expect(
    ids: Iterable[str], *, folder: Path, console: Console, shard: str = "1/1", device: str | None = None
) -> tuple[list[Cell], int]:
    """Print how many measurements `remeasure` would make and how long that takes; returns these and how many are there
    already. A second on record of a graphics card counts for `on_cpu` seconds (`data/spots.toml`) of two cores."""
    number, parts = parse_shard(shard)
    cells = dict(enumerate(split(read_cells(ids, device=device), parts), start=1)).get(number, [])
    todo = [cell for cell in cells if not _is_there(cell, folder)]
    already, expected = len(cells) - len(todo), duration(sum(cell.seconds for cell in todo))
    told = f"{len(todo)} to measure, {already} there already; about {expected} on two cores by the record"
    if on_gpu := sum(cell.on_gpu for cell in todo):
        told += f", {on_gpu} of them on a graphics card"
    console.print(f"{len(cells)} measurements: {told}", highlight=False)
    return todo, already


def paths_in(folder: Path | None) -> list[Path]:
    """The files of a folder of measurements. Raises UserError if there are none."""
    if folder is None:
        raise UserError("nothing ships: BKD_SHIPPED is empty")
    if paths := measurements.paths(folder):
        return paths
    raise UserError(f"{folder} {'holds no measurements' if folder.is_dir() else 'is no folder'}")


def read_cells(ids: Iterable[str], *, device: str | None = None) -> list[Cell]:
    """The calls behind shipped measurements, in order. Raises UserError where nothing ships."""
    known = {f"{path.parent.name}/{path.stem}": path for path in paths_in(measurements.shipped_folder())}
    cells = []
    for name in sorted(set(ids)):
        try:
            if name not in known:
                raise ValueError("there is no such file among those that ship")
            one = measurements.read(known[name])
        except (OSError, ValueError) as error:
            cells.append(Cell(name, problem=str(error)))
        else:
            given = one.arguments | ({"device": device} if device and "device" in one.arguments else {})
            on_gpu, spot = one.machine.device == "cuda", spots().get(one.stage)
            slower = spot.on_cpu if spot and on_gpu else 1.0
            cells.append(Cell(name, one.stage, given, slower * one.seconds, on_gpu=on_gpu))
    return cells


def split(cells: Sequence[Cell], parts: int) -> list[list[Cell]]:
    """The cells in parts that should take about as long, at most one part per cell; the same on every machine."""
    heap: list[tuple[float, int, list[Cell]]] = [(0.0, number, []) for number in range(min(parts, max(1, len(cells))))]
    for cell in sorted(cells, key=lambda cell: (-cell.seconds, cell.id)):
        seconds, number, mine = heap[0]
        mine.append(cell)
        heapq.heapreplace(heap, (seconds + cell.seconds, number, mine))
    return [sorted(mine, key=lambda cell: cell.id) for _, _, mine in sorted(heap, key=lambda one: one[1])]


def _is_there(cell: Cell, folder: Path) -> bool:
    try:
        return cell.problem is None and cache.kept(stages.question(cell.stage, cell.arguments), folder) is not None
    except Exception:  # a stage or an organism that is gone; measuring the cell says so
        return False


def _measured(cell: Cell, folder: Path, console: Console) -> bool:
    """Measure a cell, or say why it failed."""
    try:
        if cell.problem:
            raise UserError(cell.problem)
        stages.measure(cell.stage, cell.arguments, folder=folder)
    except Exception as error:
        console.print(f"  {cell.id} failed: {one_line(error)}", style="red", markup=False, soft_wrap=True)
        return False
    return True
