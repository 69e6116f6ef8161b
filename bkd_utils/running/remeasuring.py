"""Measure again what ships, all of it or one part of several: each stage is called with the arguments in its file."""

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bkd_utils.common import cache, measurements
from bkd_utils.common.files import WORK, UserError, canonical_json, check_writable
from bkd_utils.running import stages
from bkd_utils.running.progress import duration, one_line, shown


@dataclass(frozen=True)
class Cell:
    """A call of a stage, with the seconds on record. `problem` says why its file cannot be read, if it cannot."""

    id: str
    stage: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    problem: str | None = None


@dataclass(frozen=True)
class Remeasured:
    """How many cells were measured now, were there already by the code that is here, and failed."""

    measured: int
    already: int
    failed: int


def parse_shard(text: str) -> tuple[int, int]:
    """Number and count of a part such as "2/8". Raises UserError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return int(found[1]), int(found[2])
    raise UserError(f"shard {text!r}: a shard is K/N with K from 1 to N, as 2/8 for the second of eight")


def remeasure(
    ids: Iterable[str] | None = None,
    *,
    source: Path | None = None,
    folder: Path | None = None,
    shard: str = "1/1",
    device: str | None = None,
    console: Console | None = None,
) -> Remeasured:
    """Call the stages of shipped measurements again and keep the results in `folder` (`work/remeasured`).

    `ids` are all in `source` by default, which is where measurements ship. What is in the folder by the code that is
    here is not measured again. A cell that fails is named and the others go on. `device` replaces the one in the files.
    Raises UserError for a shard that is none, for a source without measurements, and for a folder that cannot be
    written to.
    """
    (number, parts), console, folder = parse_shard(shard), console or Console(), folder or WORK / "remeasured"
    cells = dict(enumerate(split(read_cells(ids, source=source, device=device), parts), start=1)).get(number, [])
    check_writable(folder)
    todo = [cell for cell in cells if not _is_there(cell, folder)]
    already, whole = len(cells) - len(todo), sum(cell.seconds for cell in todo)
    told = f"{len(todo)} to measure, {already} there already; {duration(whole)} when they were measured last"
    console.print(f"{len(cells)} measurements: {told}", highlight=False)
    with shown(console, "measuring", [cell.seconds for cell in todo]) as pace:
        for cell in todo:
            check_writable(folder)  # what cannot be kept need not be measured
            pace.finished(failed=not _measured(cell, folder, console))
    ended = Remeasured(measured=pace.done - pace.failed, already=already, failed=pace.failed)
    console.print(f"{ended.measured} measured, {already} there already, {ended.failed} failed", highlight=False)
    return ended


def shipped(source: Path | None = None) -> list[Path]:
    """The files of a folder of measurements, by default the one that ships. Raises UserError if there are none."""
    source = source or measurements.shipped_folder()
    if source is None:
        raise UserError("nothing ships: BKD_SHIPPED is empty")
    if paths := measurements.paths(source):
        return paths
    raise UserError(f"{source} {'holds no measurements' if source.is_dir() else 'is no folder'}")


def read_cells(ids: Iterable[str] | None, *, source: Path | None = None, device: str | None = None) -> list[Cell]:
    """The calls behind shipped measurements, by default behind all, in order. Two files of one call are one cell, as
    when an organism was made anew between them. Raises UserError if the folder has no measurement."""
    known = {f"{path.parent.name}/{path.stem}": path for path in shipped(source)}
    cells: dict[str, Cell] = {}
    for name in sorted(known if ids is None else set(ids)):
        try:
            if name not in known:
                raise ValueError("there is no such file among those that ship")
            one = measurements.read(known[name])
        except (OSError, ValueError) as error:
            cells[name] = Cell(name, problem=str(error))
            continue
        given = one.arguments | ({"device": device} if device and "device" in one.arguments else {})
        asked = {key: value for key, value in given.items() if key != "device"}
        cells.setdefault(canonical_json([one.stage, asked]), Cell(name, one.stage, given, one.seconds))
    return list(cells.values())


def split(cells: Sequence[Cell], parts: int) -> list[list[Cell]]:
    """The cells in parts of about the same seconds on record, at most one part per cell; the same on every machine."""
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
        if not _is_there(cell, folder):
            raise UserError(f"its result is not in {folder}: the disk is full, or code was edited in the meantime")
    except Exception as error:
        console.print(f"  {cell.id} failed: {one_line(error)}", style="red", markup=False, soft_wrap=True)
        return False
    return True
