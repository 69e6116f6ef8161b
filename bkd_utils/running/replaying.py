"""Replay notebooks: every cell that needs no model, from shipped measurements, in ordinary kernels, two at a time.

Cells tagged `live` load a model, train one or compare machines. All other cells work from results of stages, so that
they can be run again within seconds, and must give what is stored."""

import asyncio
import copy
import os
import shutil
import subprocess
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, DeadKernelError
from nbformat import NotebookNode

from bkd_utils.common.files import FIGURES, ROOT
from bkd_utils.common.measurements import shipped_folder
from bkd_utils.running import ledger, notebooks

LIVE = "live"
ADDED = "injected-parameters"  # `notebooks.published` leaves out cells with this tag
KERNELS = 2
LIMIT = 900  # seconds for one cell, or for the start of a kernel: far more than needed, for a machine with much to do


@dataclass(frozen=True)
class Replay:
    """What came out of one notebook. `notebook` is what would be published, with the stored outputs in its live cells;
    `figures` the folder of what it drew; `used` the ids of the measurements it asked for; `ran` how many of its code
    cells ran or are live; `reason` why it stopped before its end."""

    path: Path
    notebook: NotebookNode
    figures: Path
    used: list[str] = field(default_factory=list)
    ran: int = 0
    reason: str = ""


def is_live(cell: NotebookNode) -> bool:
    return LIVE in cell.metadata.get("tags", [])


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The code cells in order; a reader sees their numbers, from 1, in brackets beside them."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


async def replay(paths: Sequence[Path], *, folder: Path, parameters: Mapping[str, Mapping[str, Any]]) -> list[Replay]:
    """Replay notebooks into `folder`. The last one draws the scorecard that is committed, not one of this replay.
    `parameters` has the values of each notebook by its stem. A notebook that raises an error stops there, with a
    reason, and the others go on."""
    folder.mkdir(parents=True, exist_ok=True)
    if (committed := FIGURES / "scorecard.json").is_file():
        (folder / paths[-1].stem).mkdir(exist_ok=True)
        shutil.copy(committed, folder / paths[-1].stem)
    managers = [_manager(folder / f"kernel-{number}.json") for number in range(KERNELS)]
    # The largest first, so that no kernel is alone with a long one in the end.
    todo, done = deque(sorted(paths, key=lambda path: path.stat().st_size, reverse=True)), []

    async def work(manager: Any) -> None:
        while todo:
            path = todo.popleft()
            done.append(await _replayed(path, parameters[path.stem], folder=folder, manager=manager))

    try:
        await asyncio.gather(*map(work, managers))
    finally:
        for manager in managers:
            if manager.has_kernel:
                await manager.shutdown_kernel(now=True)
    return sorted(done, key=lambda one: one.path)


def _manager(connection: Path) -> AsyncKernelManager:
    """A manager of one kernel, which is this interpreter, whatever kernel is registered under the notebook's name."""
    manager = AsyncKernelManager(connection_file=str(connection))  # the home folder need not be writable
    manager.kernel_spec_manager.kernel_dirs = []
    return manager


async def _replayed(path: Path, given: Mapping[str, Any], *, folder: Path, manager: Any) -> Replay:
    original, figures = notebooks.read(path), folder / path.stem
    lines = figures / "ledger.jsonl"
    figures.mkdir(parents=True, exist_ok=True)
    book = _marked(original, given, {"BKD_FIGURES": str(figures), "BKD_LEDGER": str(lines)})
    # Nothing is measured, and nothing is read that does not ship.
    own = {"BKD_REPLAY": "1", "BKD_SHIPPED": str(shipped_folder() or ""), "BKD_KEEP": str(folder / "kept")}
    environment = os.environ | own | {"IPYTHONDIR": str(folder / "ipython")}
    environment.pop("MPLBACKEND", None)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    if manager.has_kernel and not await manager.is_alive():
        await manager.shutdown_kernel(now=True)
    client, ran, reason = NotebookClient(book, km=manager, timeout=LIMIT, startup_timeout=LIMIT), 0, ""
    if not manager.has_kernel:  # not `async_setup_kernel`, which would take Ctrl-C and SIGTERM for itself
        await client.async_start_new_kernel(cwd=str(ROOT), env=environment, **quiet)
    try:
        await client.async_start_new_kernel_client()  # inside, because it may be ended while it waits for its kernel
        for index, cell in enumerate(book.cells):
            if cell.cell_type == "code":
                if not is_live(cell):
                    await client.async_execute_cell(cell, index)
                ran += ADDED not in cell.metadata.get("tags", [])
    except CellExecutionError as error:
        reason = f"{error.ename}: {error.evalue}"
    except (DeadKernelError, TimeoutError) as error:
        if asyncio.current_task().cancelling():  # which the client takes for the death of its kernel
            raise asyncio.CancelledError from None
        reason = f"{type(error).__name__}: {error}"
    finally:
        if client.kc is not None:
            client.kc.stop_channels()
    used = sorted(ledger.read(lines).measurements)
    return Replay(path, notebooks.published(book, original), figures, used, ran, reason)


def _marked(original: NotebookNode, given: Mapping[str, Any], environment: Mapping[str, str]) -> NotebookNode:
    """A copy that first clears its kernel, and gets its parameters as papermill gives them."""
    book = copy.deepcopy(original)
    first = f"%reset -f\n__import__('os').environ.update({dict(environment)!r})"
    values = "\n".join(f"{name} = {value!r}" for name, value in given.items())
    tagged = [number for number, cell in enumerate(book.cells) if "parameters" in cell.metadata.get("tags", [])]
    for place, source in ((tagged[0] + 1 if tagged else 0, values), (0, first)):
        book.cells.insert(place, nbformat.v4.new_code_cell(source, metadata={"tags": [ADDED]}))
    return book
