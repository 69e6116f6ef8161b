"""Run one notebook with papermill in a separate process, and check that it ran to its end.

A run succeeds if its last cell ran in the right interpreter. The report of papermill is not enough: it is success after
`sys.exit()` too, and the copy that papermill saves after a killed kernel shows every cell as completed."""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil

from bkd_utils.common.files import ROOT, atomic_path
from bkd_utils.running import notebooks
from bkd_utils.running.ending import END_WITH_PARENT
from bkd_utils.running.notebooks import NotebookError


@dataclass(frozen=True)
class Run:
    """Result of the run of one notebook; `gflops` is the speed of the machine at that time, see `runner.speed`."""

    name: str
    minutes: float
    peak_gib: float
    status: str
    reason: str = ""
    figures: list[str] = field(default_factory=list)
    gflops: dict[str, int] = field(default_factory=dict)


def run_notebook(
    path: Path, *, parameters: dict, folder: Path, limit: float, environment: dict[str, str], on_cell: Callable
) -> Run:
    """Execute one notebook into `folder`/<name>.ipynb; a failed one is kept as <name>.failed.ipynb. `limit` is in
    seconds, and `on_cell` is told the numbers of finished and of all cells. Raises NotebookError before anything runs
    if the notebook or a parameter is not valid. A failure while running is reported in the result, with its reason. No
    process is left after this returns or after Ctrl-C."""
    notebooks.check_parameters(path, parameters)
    token, started = secrets.token_hex(8), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bkd-run-") as scratch:
        source, target = Path(scratch) / "in.ipynb", Path(scratch) / "out.ipynb"
        nbformat.write(notebooks.with_sentinel(notebooks.read(path), token), source)
        command = [sys.executable, "-m", "bkd_utils.running.execute", str(source), str(target), json.dumps(parameters)]
        code, errors = _supervise(command, environment, target, limit, on_cell)
        minutes = (time.monotonic() - started) / 60
        reason, peak = _verdict(target, token, code, errors, limit=limit)
        failed = folder / f"{path.stem}.failed.ipynb"
        if target.is_file():
            with atomic_path(failed if reason else folder / path.name) as temporary:
                shutil.copyfile(target, temporary)
    if not reason:
        failed.unlink(missing_ok=True)
    return Run(path.stem, round(minutes, 2), round(peak, 2), "failed" if reason else "ok", reason)


def _supervise(
    command: list[str], environment: dict[str, str], target: Path, limit: float, on_cell: Callable
) -> tuple[int | None, str]:
    """Exit code (None after the time limit) and stderr; ends the whole process tree in every case."""
    errors = target.with_name("stderr")
    # Any other backend than the kernel's own would leave the figures out of the executed notebook.
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    with errors.open("wb") as stream:
        how = {"stdin": subprocess.DEVNULL, "stdout": stream, "stderr": stream, "preexec_fn": END_WITH_PARENT}
        process = subprocess.Popen(command, cwd=ROOT, env=inherited | environment, **how)
        try:
            deadline = time.monotonic() + limit
            while process.poll() is None and time.monotonic() < deadline:
                on_cell(*_cells_done(target))
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.5)
            code = process.poll()
        finally:
            _end_tree(process.pid)
            process.wait()
    return code, errors.read_text(encoding="utf-8", errors="replace")


def _end_tree(pid: int) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
        for process in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(tree, timeout=10)


def _cells_done(target: Path) -> tuple[int, int]:
    try:
        cells = [cell for cell in json.loads(target.read_text())["cells"] if cell["cell_type"] == "code"]
        done = sum(cell["metadata"].get("papermill", {}).get("status") == "completed" for cell in cells)
        return done, len(cells)
    except (OSError, ValueError, KeyError):  # not there yet, or being written at this moment
        return 0, 0


def _verdict(target: Path, token: str, code: int | None, errors: str, *, limit: float) -> tuple[str, float]:
    """(reason for failure or "", peak memory of the kernel in GiB)."""
    cells = []
    with contextlib.suppress(NotebookError):  # the file does not exist or is incomplete
        cells = notebooks.read(target).cells
    raised = [output for cell in cells for output in cell.get("outputs", []) if output.output_type == "error"]
    if raised:
        return f"{raised[0].ename}: {raised[0].evalue}"[:2000], 0.0
    if code is None:
        return f"ran into its limit of {limit / 60:.1f} minutes; the same command continues from there", 0.0
    if code != 0:
        last = [line for line in errors.splitlines() if line.strip()] or ["no message"]
        # Linux ends with signal 9 what takes the last memory: the kernel, or papermill, whose code is then -9.
        killed = "was killed, as the system does when memory runs out: "
        why = f"its kernel {killed}" if "DeadKernelError" in last[-1] else f"it {killed}" if code == -9 else ""
        return f"{why}{last[-1]} (exit status {code})", 0.0
    # Threads and libraries may still print while the last cell runs, which alone knows the token.
    last = [output for cell in cells[-1:] for output in cell.get("outputs", [])]
    text = "".join(output.text for output in last if output.get("name") == "stdout")
    told = [line for line in text.splitlines() if line.startswith("{") and token in line]
    if not told:
        return "its last cell was never reached (sys.exit in a cell, or a cell that did not complete)", 0.0
    printed = json.loads(told[0])
    if printed["prefix"] != sys.prefix:
        return f"its kernel ran in {printed['prefix']}, not in {sys.prefix}", 0.0
    return "", printed["peak"] * (1 if sys.platform == "darwin" else 1024) / 2**30
