"""Run notebooks with papermill, strictly: what papermill lets pass in silence is an error here.

A run succeeds when its last cell was reached in the right interpreter, not when papermill says so: papermill reports
success after `sys.exit()`, and the copy it saves after a killed kernel shows every cell as completed.
"""

import ctypes
import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import nbformat
import psutil
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from bkd_utils import notebooks
from bkd_utils.files import DATA, FIGURES, ROOT, WORK, atomic_path, sha256_file, write_json
from bkd_utils.models import DEFAULT_MODEL
from bkd_utils.notebooks import NotebookError

log = logging.getLogger(__name__)
PROFILES = ("smoke", "laptop", "paper")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Run:
    """What became of one notebook."""

    name: str
    minutes: float
    peak_gib: float
    status: str
    reason: str = ""
    figures: list[str] = field(default_factory=list)


def profile_parameters(profile: str, paths: list[Path]) -> tuple[dict[str, dict[str, Any]], int]:
    """Parameters and limit in seconds per notebook. Raises NotebookError for any that does not fit."""
    table = tomllib.loads((DATA / "profiles.toml").read_text(encoding="utf-8"))
    if profile not in table:
        raise NotebookError(f"unknown profile {profile!r}; known: {', '.join(table)}")
    chosen = dict(table[profile])
    limit = chosen.pop("minutes_per_notebook") * 60
    names = {path.stem for path in notebooks.all_notebooks()}
    if unknown := sorted(set(chosen) - names):
        raise NotebookError(f"profiles.toml, {profile}: no notebook {', '.join(unknown)}")
    for path in paths:
        notebooks.check_parameters(path, chosen.get(path.stem, {}))
    return {path.stem: chosen.get(path.stem, {}) for path in paths}, limit


def run_notebook(
    path: Path,
    *,
    parameters: dict[str, Any],
    folder: Path,
    limit: float,
    environment: dict[str, str] | None = None,
    on_cell: Callable[[int, int], None] | None = None,
) -> Run:
    """Execute one notebook into `folder`/<name>.ipynb; a failed one is kept as <name>.failed.ipynb.

    Raises NotebookError before anything runs if the notebook or a parameter is unfit. A failure while running is
    reported in the result, with its reason. Nothing of it runs on after this returns or after Ctrl-C.
    """
    notebooks.check_parameters(path, parameters)
    token, started = secrets.token_hex(8), time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bkd-run-") as scratch:
        source, target, given = (Path(scratch) / name for name in ("in.ipynb", "out.ipynb", "parameters.json"))
        nbformat.write(notebooks.with_sentinel(notebooks.read(path), token), source)
        given.write_text(json.dumps(parameters), encoding="utf-8")
        command = [sys.executable, "-m", "bkd_utils.execute", str(source), str(target), str(given)]
        code, errors = _supervise(
            command, environment or {}, target, limit=limit, scratch=Path(scratch), on_cell=on_cell
        )
        minutes = (time.monotonic() - started) / 60
        reason, peak = _verdict(target, token, code, errors, limit=limit)
        kept = folder / (f"{path.stem}.ipynb" if not reason else f"{path.stem}.failed.ipynb")
        if target.is_file():
            with atomic_path(kept) as temporary:
                shutil.copyfile(target, temporary)
    if not reason:
        (folder / f"{path.stem}.failed.ipynb").unlink(missing_ok=True)
    return Run(path.stem, round(minutes, 2), round(peak, 2), "failed" if reason else "ok", reason)


def _supervise(
    command: list[str],
    environment: dict[str, str],
    target: Path,
    *,
    limit: float,
    scratch: Path,
    on_cell: Callable[[int, int], None] | None,
) -> tuple[int | None, str]:
    """Exit code (None when the limit ended it) and stderr; ends the whole process tree in every case."""
    errors = scratch / "stderr"
    # Any other backend than the kernel's own would leave the figures out of the executed notebook.
    inherited = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    with errors.open("wb") as stream:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | environment,
            stdout=stream,
            stderr=stream,
            stdin=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )
        try:
            deadline = time.monotonic() + limit
            while process.poll() is None and time.monotonic() < deadline:
                if on_cell:
                    on_cell(*_cells_done(target))
                try:
                    process.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    continue
            code = process.poll()
        finally:
            _end_tree(process.pid)
            process.wait()
    return code, errors.read_text(encoding="utf-8", errors="replace")


def _end_with_parent() -> None:
    """Called in the child: when the runner is killed outright, Linux ends papermill, and the kernel notices that.

    Otherwise the old notebook would run on beside the next run and write to the same checkpoints.
    """
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _end_tree(pid: int) -> None:
    try:
        root = psutil.Process(pid)
        tree = [*root.children(recursive=True), root]
    except psutil.NoSuchProcess:
        return
    for process in tree:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
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
    try:
        cells = notebooks.read(target).cells
    except NotebookError:  # never written, or ended in the middle of writing it
        cells = []
    for cell in cells:
        for output in cell.get("outputs", []):
            if output.output_type == "error":
                return f"{output.ename}: {output.evalue}"[:2000], 0.0
    if code is None:
        return f"ran into its limit of {limit / 60:.1f} minutes", 0.0
    if code != 0:
        last = [line for line in errors.splitlines() if line.strip()]
        return f"{last[-1] if last else 'no message'} (exit status {code})", 0.0
    said = _sentinel(cells, token)
    if said is None:
        return "its last cell was never reached (sys.exit in a cell, or a cell that did not complete)", 0.0
    if said["prefix"] != sys.prefix:
        return f"its kernel ran in {said['prefix']}, not in {sys.prefix}", 0.0
    return "", said["peak"] * (1 if sys.platform == "darwin" else 1024) / 2**30


def _sentinel(cells: list, token: str) -> dict | None:
    if not cells or notebooks.SENTINEL not in cells[-1].metadata.get("tags", []):
        return None
    # Threads and libraries may still be talking while the last cell runs.
    printed = "".join(output.text for output in cells[-1].outputs if output.get("name") == "stdout")
    for line in printed.splitlines():
        if line.startswith("{") and token in line:
            return json.loads(line)
    return None


def run_all(
    *,
    profile: str,
    only: str | None = None,
    model: str = DEFAULT_MODEL,
    device: str = "auto",
    seed: int = 0,
    retrain: bool = False,
    force: bool = False,
    publish: bool = False,
    console: Console | None = None,
) -> list[Run]:
    """Run the chosen notebooks one after another, a failed one not stopping the next, and print the table.

    Figures go to `figures/` with `publish`, else to `work/figures/<profile>`, so that a smoke run or a run of another
    model never replaces the published ones. Raises NotebookError for unfit options before anything runs.
    """
    console = console or Console()
    paths = notebooks.select(only)
    if publish and (profile != "laptop" or model != DEFAULT_MODEL or seed != 0):
        raise NotebookError("--publish is for the laptop profile, default model and seed: that is what is committed")
    table, limit = profile_parameters(profile, paths)
    common = {"model": model, "device": device, "seed": seed, "retrain": retrain}
    figures = FIGURES if publish else WORK / "figures" / profile
    environment = {"BKD_FIGURES": str(figures), "PYTHONUNBUFFERED": "1"}
    if force:
        environment["BKD_FORCE_SINCE"] = str(time.time())
    started, runs = time.strftime("%Y-%m-%dT%H:%M:%S"), []
    for path in paths:
        declared = notebooks.parameters(path)
        given = table[path.stem] | {key: value for key, value in common.items() if key in declared}
        before = _figures(figures)
        with _progress(console, path.stem) as on_cell:
            run = run_notebook(
                path,
                parameters=given,
                folder=WORK / "executed" / profile,
                limit=limit,
                environment=environment,
                on_cell=on_cell,
            )
        after = _figures(figures)
        run = replace(run, figures=[name for name in after if before.get(name) != after[name]])
        if run.status == "ok" and publish:
            run = _published(run, WORK / "executed" / profile / path.name, path)
        runs.append(run)
    record = {
        "profile": profile,
        "machine": machine(),
        "started": started,
        "notebooks": [{key: asdict(run)[key] for key in ("name", "minutes", "peak_gib", "status")} for run in runs],
        "commit": commit(),
    }
    write_json(WORK / "run.json", record)
    if publish and only is None:
        write_json(FIGURES / "run.json", record)
    report(runs, console, folder=WORK / "executed" / profile)
    return runs


def _published(run: Run, executed: Path, original: Path) -> Run:
    """Publish; a notebook that was edited while it ran is one failed notebook, not the end of the run."""
    try:
        notebooks.publish(executed, original)
    except NotebookError as error:
        return replace(run, status="failed", reason=str(error))
    return run


def _figures(folder: Path) -> dict[str, str]:
    """Figure id -> hash of its picture and of the time it was written."""
    return {
        path.stem: f"{sha256_file(path)} {path.stat().st_mtime_ns}"
        for path in sorted(folder.glob("*.json"))
        if path.with_suffix(".png").is_file()
    }


class _progress:
    """A bar of cells on a terminal; elsewhere a line at the start and one a minute."""

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name, self.spoke = console, name, time.monotonic()
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} cells"))
        self.bar = Progress(*columns, TimeElapsedColumn(), console=console, transient=True)

    def __enter__(self) -> Callable[[int, int], None]:
        self.console.print(f"running {self.name}")
        if self.console.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task(self.name, total=None)
        return self.step

    def step(self, done: int, total: int) -> None:
        if self.console.is_terminal:
            self.bar.update(self.task, completed=done, total=total or None)
        elif time.monotonic() - self.spoke > 60:
            self.spoke = time.monotonic()
            self.console.print(f"  {self.name}: {done} of {total} cells")

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:  # elsewhere the bar that never started would still print an empty line
            self.bar.stop()


def report(runs: list[Run], console: Console, *, folder: Path) -> None:
    """The closing table: notebooks, minutes, memory, figures, and below it why any of them failed."""
    table = Table("notebook", "minutes", "peak GiB", "figures written", "status")
    for run in runs:
        colour = "green" if run.status == "ok" else "red"
        names = ", ".join(run.figures) or "none"
        table.add_row(run.name, f"{run.minutes:.1f}", f"{run.peak_gib:.1f}", names, f"[{colour}]{run.status}[/]")
    console.print(table)
    for run in runs:
        if run.reason:
            console.print(f"{run.name} failed: {run.reason}", markup=False, style="red")
            if (copy := folder / f"{run.name}.failed.ipynb").is_file():
                console.print(f"  as far as it came: {copy}", markup=False, soft_wrap=True)
    passed = sum(run.status == "ok" for run in runs)
    console.print(f"{passed} passed, {len(runs) - passed} failed")


def machine() -> str:
    """Cores, memory and accelerator, without any name that would identify the machine."""
    import torch

    memory = psutil.virtual_memory().total / 2**30
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    return f"{psutil.cpu_count()} cores, {memory:.0f} GiB{gpu}"


def commit() -> str | None:
    """The commit of this checkout, or None where there is no git."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()
