"""Make the cells of a grid with Snakemake, on this machine or through Slurm, and merge what they measured."""

import fcntl
import importlib.util
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import psutil
from rich.console import Console

from bkd_utils.common.cache import kept_folder
from bkd_utils.common.files import ASSETS, CHECKOUT, ROOT, WORK, UserError, check_writable, read_json, write_json
from bkd_utils.common.measurements import digest, paths
from bkd_utils.organisms.making import obtain
from bkd_utils.running import stages
from bkd_utils.running.ending import END_WITH_PARENT
from bkd_utils.running.grid import Cell, Profile, is_there
from bkd_utils.running.merging import merge

# One rule for all cells. What exists is done, however old it is.
SNAKEFILE = """import json
from pathlib import Path

PLAN = json.loads(Path(workflow.basedir, "plan.json").read_text(encoding="utf-8"))

def needs(wildcards):
    cell = "{model}/{organism}/{stage}.json".format(**wildcards)
    return [ancient(organism) for organism in PLAN["cells"][cell]["needs"]]

rule all:
    input: list(PLAN["cells"])

rule cell:
    output: "{model}/{organism}/{stage}.json"
    input: needs
    log: "logs/{model}/{organism}/{stage}.log"
    threads: PLAN["threads"]
    resources: **PLAN["resources"]
    shell: "BKD_PARENT=$PPID exec {PLAN[command]} {output:q} > {log:q} 2>&1"
"""
OPTIONS = ["--keep-going", "--rerun-incomplete", "--rerun-triggers", "mtime", "--nolock", "--latency-wait", "60"]
OPTIONS += ["--scheduler", "greedy", "--quiet", "host", "rules", "reason"]


def make_cell(folder: Path, target: str) -> None:
    """Make one cell of the plan in a grid's folder: an organism, or a measurement. It ends with its parent process."""
    if END_WITH_PARENT:
        END_WITH_PARENT()
        if os.environ.get("BKD_PARENT") not in (None, str(os.getppid())):  # which was killed while this one started
            raise SystemExit(1)
    plan = read_json(folder / "plan.json")
    if target not in plan["cells"]:
        raise UserError(f"{folder / 'plan.json'} has no cell {target!r}")
    with (folder / "starts.log").open("a", encoding="utf-8") as book:
        book.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {target}\n")
    cell, device, kept = plan["cells"][target], plan["device"], folder / "measurements"
    asked, names = cell["asked"], [read_json(folder / need)["organism"] for need in cell["needs"]]
    if not names:
        with patch.dict(os.environ, BKD_KEEP=str(kept), BKD_SHIPPED=""):
            found = {"organism": obtain(**asked, device=device)}
    else:
        arguments = asked["arguments"] | dict(zip(("organism", "control"), names, strict=False)) | {"device": device}
        path = stages.measure(asked["stage"], arguments, folder=kept)
        found = {"measurement": f"{path.parent.name}/{path.stem}"}
    write_json(folder / target, {"asked": asked, **found})


def make(
    name: str, profile: Profile, cells: list[Cell], *, executor: str, cores: int | None, device: str, console: Console
) -> bool:
    """Make the cells that `work/grid/<name>` lacks, merge all measurements, print a table; are all there in the end? A
    cell that fails stops those that need it and no others. After a kill the same call goes on: cells that exist are
    done, and jobs that are left on the cluster are cancelled. Raises UserError where Snakemake or Slurm is missing, and
    while another call works in the same folder."""
    folder, options = WORK / "grid" / name, _options(profile, executor, cores)
    check_writable(folder)
    with (folder / "lock").open("w") as lock:  # which the system takes back from a process that is killed
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another run works in {folder}; wait until it ends, or end it") from error
        marker = f"bkd-{digest(str(folder))[:12]}"
        if executor == "slurm":
            _cancel_jobs(marker)  # which a killed run has left, so that no cell is made twice at once
            options += ["--slurm-jobname-prefix", marker]
        there = [cell for cell in cells if is_there(cell, folder)]
        for target in {cell.target for cell in cells} - {cell.target for cell in there}:
            (folder / target).unlink(missing_ok=True)  # of other sizes, or damaged
            _log(folder, target).unlink(missing_ok=True)
        # A cell is whole or not there at all, so that one which was just finished when a run was killed is done.
        shutil.rmtree(folder / ".snakemake" / "incomplete", ignore_errors=True)
        _write_plan(folder, profile, cells, executor=executor, device=device)
        try:
            _supervise([sys.executable, "-m", "snakemake", *options], folder)
        finally:
            if executor == "slurm":
                _cancel_jobs(marker)  # that Snakemake does not know of any more, after Ctrl-C or an error of its own
        failed = [cell.target for cell in cells if not is_there(cell, folder)]
        made = len(cells) - len(there) - len(failed)
        console.print(f"{len(cells)} cells: {made} made, {len(there)} there already, {len(failed)} failed")
        for target in failed:
            log = _log(folder, target)
            why = f"see {log}" if log.is_file() else "was not started, or not to its end"
            console.print(f"  {target}: {why}", markup=False, style="red", soft_wrap=True)
        if paths(folder / "measurements"):
            merge([folder / "measurements"], into=kept_folder())
            console.print(f"the measurements are in {kept_folder()}, too", markup=False, soft_wrap=True)
    return not failed


def _log(folder: Path, target: str) -> Path:
    return (folder / "logs" / target).with_suffix(".log")


def _options(profile: Profile, executor: str, cores: int | None) -> list[str]:
    """Snakemake's options for an executor. Raises UserError where it is unknown, or where something is missing."""
    if executor not in ("local", "slurm"):
        raise UserError(f"unknown executor {executor!r}; known: local, slurm")
    for module in ("snakemake", "snakemake_executor_plugin_slurm"):
        if importlib.util.find_spec(module) is None:
            raise UserError(f"the grid needs {module.replace('_', '-')}: pip install 'bkd-utils[grid]', or '.[grid]'")
    if executor == "local":
        memory = max(psutil.virtual_memory().total // 2**20, profile.memory_gib * 1024)
        return [*OPTIONS, "--cores", str(cores or psutil.cpu_count()), "--resources", f"mem_mb={memory}"]
    if shutil.which("sbatch") is None:
        raise UserError("there is no Slurm here: sbatch is not on the PATH")
    jobs = 100 if cores is None else max(1, cores // profile.threads)
    chosen = [*OPTIONS, "--executor", "slurm", "--jobs", str(jobs)]
    # A job whose status could not be asked for is waited for for ever: five attempts take less than a second.
    chosen += ["--slurm-status-attempts", "1000"]
    # Without accounting, sacct answers nothing, and Snakemake would wait for ever.
    return chosen if _has_accounting() else [*chosen, "--slurm-status-command", "squeue"]


def _has_accounting() -> bool:
    return bool(shutil.which("sacct")) and not subprocess.run(["sacct", "-n"], capture_output=True).returncode


def _write_plan(folder: Path, profile: Profile, cells: list[Cell], *, executor: str, device: str) -> None:
    named = {"BKD_WORK": WORK, "BKD_ASSETS": ASSETS, "OMP_NUM_THREADS": profile.threads}
    if CHECKOUT:  # cells run in the grid's folder, where a package that is not installed would not be found
        named["PYTHONPATH"] = ROOT
    run = [sys.executable, "-m", "bkd_utils", "cell", str(folder)]
    resources = {"mem_mb": profile.memory_gib * 1024, "runtime": profile.minutes}
    if executor == "slurm":
        resources |= {"gpu": 1} if device == "cuda" else {}
        resources |= {} if _has_accounting() else {"slurm_account": "none"}
    plan = {
        "command": shlex.join(["env", *(f"{key}={value}" for key, value in named.items()), *run]),
        "device": device,
        "threads": profile.threads,
        "resources": resources,
        "cells": {cell.target: {"asked": cell.asked, "needs": cell.needs} for cell in cells},
    }
    write_json(folder / "plan.json", plan)
    (folder / "Snakefile").write_text(SNAKEFILE, encoding="utf-8")


def _supervise(command: list[str], folder: Path) -> None:
    """Run Snakemake to its end. Ctrl-C and SIGTERM reach it as Ctrl-C, so that it ends its own jobs first."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a script's background process ignores it
    process = subprocess.Popen(command, cwd=folder, start_new_session=True, preexec_fn=END_WITH_PARENT)
    try:
        process.wait()
    except BaseException:
        os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
        raise


def _cancel_jobs(marker: str) -> None:
    """Cancel the jobs of a grid that are left on the cluster, and see them go. Raises UserError if Slurm is silent."""
    while True:
        listed = subprocess.run(["squeue", "--noheader", "--format=%i %j"], capture_output=True, text=True)
        if listed.returncode:
            raise UserError(f"squeue does not answer: {listed.stderr.strip()}")
        left = [line.split()[0] for line in listed.stdout.splitlines() if f" {marker}" in line]
        if not left:
            return
        subprocess.run(["scancel", *left], capture_output=True)
        time.sleep(1)
