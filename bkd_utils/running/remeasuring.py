"""Measure again what ships, all of it or one part of several: each stage is called with the arguments in its file."""

import heapq
import io
import re
from collections.abc import Iterable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from bkd_utils.common import cache, measurements
from bkd_utils.common.files import WORK, UserError, canonical_json, check_writable
from bkd_utils.running import stages
from bkd_utils.running.progress import duration, one_line, shown


class Shard(NamedTuple):
    """Part `number` of `of` parts, counted from 1."""

    number: int
    of: int


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


def parse_shard(text: str) -> Shard:
    """A part such as "2/8". Raises UserError for anything else."""
    found = re.fullmatch(r"([0-9]{1,9})/([0-9]{1,9})", text)
    if found and 1 <= int(found[1]) <= int(found[2]):
        return Shard(int(found[1]), int(found[2]))
    raise UserError(f"shard {text!r}: a shard is K/N with K from 1 to N, as 2/8 for the second of eight")


def remeasure(
    ids: Iterable[str] | None = None,
    *,
    source: Path | None = None,
    folder: Path | None = None,
    shard: str | None = None,
    device: str | None = None,
    console: Console | None = None,
) -> Remeasured:
    """Call the stages of shipped measurements again and keep the results in `folder` (`work/remeasured`).

    `ids` are all in `source` by default, which is where measurements ship. What is in the folder by the code that is
    here is not measured again. A cell that fails is named and the others go on. `device` replaces the one in the files.
    Raises UserError for a shard that is none, for a source without measurements, for a folder that cannot be written
    to, and when Ctrl-C has ended it.
    """
    part, console = parse_shard(shard) if shard is not None else Shard(1, 1), console or Console()
    folder = folder or WORK / "remeasured"
    cells = split(read_cells(ids, source=source, device=device), part.of)
    cells = cells[part.number - 1] if part.number <= len(cells) else []
    check_writable(folder)
    todo, failed = [], 0
    for cell in cells:
        try:
            if cell.problem:
                raise UserError(cell.problem)
            if not _is_there(cell, folder):
                todo.append(cell)
        except Exception as error:  # an organism that is gone, other arguments, a table that was edited
            failed += 1
            _say(console, cell, error)
    already, whole = len(cells) - len(todo) - failed, sum(cell.seconds for cell in todo)
    told = f"{len(todo)} to measure, {already} there already; {duration(whole)} when they were measured last"
    console.print(f"{len(cells)} measurements: {told}", highlight=False)
    with shown(console, "measuring", [cell.seconds for cell in todo]) as pace:
        try:
            for cell in todo:
                check_writable(folder)  # what cannot be kept need not be measured
                pace.finished(failed=not _measured(cell, folder, console))
        except KeyboardInterrupt:
            done = already + pace.done - pace.failed
            raise UserError(f"stopped with {done} of {len(cells)} measured; the same command goes on") from None
    ended = Remeasured(measured=pace.done - pace.failed, already=already, failed=failed + pace.failed)
    console.print(f"{ended.measured} measured, {already} there already, {ended.failed} failed", highlight=False)
    return ended


def shipped(source: Path | None = None) -> list[Path]:
    """The files of a folder of measurements, by default the one that ships. Raises UserError if there are none."""
    source = source or measurements.shipped_folder()
    if source is None:
        raise UserError("nothing ships: BKD_SHIPPED is empty")
    if paths := measurements.paths(source):
        return paths
    raise UserError(f"{source} holds no measurements")


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
    """Is it in the folder, measured by this code and libraries and with the arithmetic that it would have now?"""
    asked = stages.question(cell.stage, cell.arguments)
    key = measurements.key(cell.stage, asked["arguments"], asked["inputs"])
    try:
        one = measurements.read(measurements.path_of(folder, cell.stage, key))
    except (OSError, ValueError):
        return False
    device = (one.machine.device, one.machine.fast_bf16)
    return cache.is_of_this_code(one, asked) and device == (asked["machine"].device, asked["machine"].fast_bf16)


def _measured(cell: Cell, folder: Path, console: Console) -> bool:
    """Measure a cell, or say why it failed."""
    try:
        with redirect_stderr(io.StringIO()):  # the bars of single stages would break up the one that is shown
            stages.measure(cell.stage, cell.arguments, folder=folder)
        if not _is_there(cell, folder):
            raise UserError(f"its result is not in {folder}: the disk is full, or code was edited in the meantime")
    except Exception as error:
        _say(console, cell, error)
        return False
    return True


def _say(console: Console, cell: Cell, error: Exception) -> None:
    console.print(f"  {cell.id} failed: {one_line(error)}", style="red", markup=False, soft_wrap=True)
