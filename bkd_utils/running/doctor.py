"""Says what a machine and its environment lack, in one sentence each; works where packages are missing, too.

At its top this module imports what comes with Python and nothing else. An examination that fails is a finding."""

import importlib.metadata
import json
import os
import platform
import shutil
import sys
import tomllib
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from bkd_utils.common.files import ASSETS, CHECKOUT, FIGURES, ON_REQUEST, ROOT, WORK, read_json

GIB = 2**30
LEAST, ENOUGH = 1, 3  # GiB of disk: to unpack the model at all; for model, data and results
SLOW, PATIENCE = 10, 120  # minutes: of a notebook that is called slow; of a whole run that is still recommended
LARGE = 16  # GiB of a graphics card on which the profile with more prompts is recommended
FOLDERS = {"results": WORK, "model and data": ASSETS}
GROUP = Path("/sys/fs/cgroup")  # where Linux tells a container its limits
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}  # from best to worst
FIELDS = ("what", "status", "found", "advice")
Told = tuple[str, str, str]  # status (a key of COLOURS), what was found, one sentence of advice


def report(console: Any = None, *, as_json: bool = False) -> int:
    """Print all findings: a table on a rich console, plain lines without one, or JSON. Returns 1 if one is `fail`."""
    with console.status("looking, half a minute") if console and not as_json else nullcontext():
        findings = list(examine())
    worst = max((status for _, status, *_ in findings), key=list(COLOURS).index)
    if as_json:
        told = [dict(zip(FIELDS, one, strict=True)) for one in findings]
        print(json.dumps({"status": worst, "findings": told}, indent=2))
    elif console:
        from rich import table, text

        shown = table.Table("", "", "found", "advice")
        for what, status, *told in findings:
            shown.add_row(what, text.Text(status, COLOURS[status]), *map(text.Text, told))
        console.print(shown)
    else:
        print(*map(": ".join, findings), sep="\n")
    return int(worst == "fail")


def examine() -> Iterator[tuple[str, str, str, str]]:
    """FIELDS of each thing that is looked at. Paths, which name users, are left out: people paste this into issues."""
    for look in (python, packages, assets, disk, memory, graphics_card, jupyterlab, git, speed):
        what = look.__name__.replace("_", " ")
        try:
            yield what, *look()
        except Exception as error:  # whatever it is: to tell it is what this is for
            said = " ".join(f"{type(error).__name__}: {error}".replace(str(Path.home()), "~").split())
            yield what, "fail", said, "This could not be examined."


def python() -> Told:
    own = installed("bkd-utils") or "is not installed"
    found = f"{platform.python_version()}, {platform.system()} {platform.machine()}, bkd_utils {own}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return "fail", found, "Make an environment with Python 3.11, 3.12 or 3.13."
    if sys.prefix == sys.base_prefix and "CONDA_PREFIX" not in os.environ:
        return "warn", found, "This is no environment of its own; ./run_all.sh makes one in .venv."
    return "ok", found, ""


def packages() -> Told:
    """Installed versions against the lock; without a checkout, against the pins of the package itself."""
    if CHECKOUT:
        needed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
        lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    else:
        needed = lines = importlib.metadata.requires("bkd-utils") or []
    if missing := ", ".join(name for name in pinned(needed) if installed(name) is None):
        return "fail", f"missing: {missing}", "Nothing runs without these; ./run_all.sh installs what is pinned."
    here = {name: (installed(name), version) for name, version in pinned(lines).items()}
    if other := [f"{name} {now or 'missing'} for {locked}" for name, (now, locked) in here.items() if now != locked]:
        found = ", ".join(other[:9]) + ", …" * (len(other) > 9)
        return "warn", found, "Other versions can give other last digits; ./run_all.sh installs what is pinned."
    return "ok", f"{len(here)} as pinned", ""


def pinned(lines: list[str]) -> dict[str, str]:
    """Name -> version of the lines that are pins, those of extras left out."""
    pins = [line.split("==") for line in lines if "==" in line and ";" not in line]
    return {name.replace("_", "-"): version for name, version in pins}


def installed(package: str) -> str | None:
    """Version of a package without the mark of its build, as in 2.13.0+cpu; None if it is missing."""
    try:
        return importlib.metadata.version(package).partition("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def assets() -> Told:
    from bkd_utils.common import assets

    state: dict[str, list[str]] = {"damaged": [], "missing": [], "verified": []}
    for name in assets.sources():
        try:
            assets.verify(name, into=ASSETS)
            state["verified"].append(name)
        except assets.AssetError:
            state["damaged" if (ASSETS / name).is_dir() else "missing"].append(name)
    found = "; ".join(f"{how}: {', '.join(names)}" for how, names in state.items() if names)
    if state["damaged"]:
        return "fail", found, "Delete the folders of these and fetch them again: python -m bkd_utils fetch."
    advice = "The first run fetches these, for which it needs a network." if state["missing"] else ""
    return "warn" if advice else "ok", found, advice


def disk() -> Told:
    there = {name: next(one for one in (path, *path.parents) if one.exists()) for name, path in FOLDERS.items()}
    free = {name: shutil.disk_usage(path).free / GIB for name, path in there.items()}
    shut = [name for name, path in there.items() if not os.access(path, os.W_OK)]
    found = ", ".join(f"{size:.1f} GiB free for {name}" for name, size in free.items())
    found += f"; no permission to write {' and '.join(shut)}" if shut else ""
    status = "fail" if shut or min(free.values()) < LEAST else "warn" if min(free.values()) < ENOUGH else "ok"
    return status, found, "Make room, or name other folders by BKD_WORK and BKD_ASSETS." if status != "ok" else ""


def memory() -> Told:
    import psutil

    free, limit = psutil.virtual_memory().available, GROUP / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()).isdecimal():
        free = min(free, int(most) - int((GROUP / "memory.current").read_text()))
    hungry = ", ".join(name for name, one in recorded().items() if one["peak_gib"] > free / GIB)
    advice = f"Close other programs: notebooks {hungry} need more." if hungry else ""
    return "warn" if advice else "ok", f"{free / GIB:.1f} GiB available", advice


def recorded() -> dict[str, Any]:
    """The notebooks of the committed run by number; none without a checkout."""
    return {one["name"][:2]: one for one in read_json(FIGURES / "run.json")["notebooks"]} if CHECKOUT else {}


def graphics_card() -> Told:
    import torch

    if torch.cuda.is_available():
        return "ok", f"{torch.cuda.get_device_name()}, {torch.cuda.mem_get_info()[1] / GIB:.0f} GiB", ""
    if shutil.which("nvidia-smi"):
        return "warn", f"one that torch {torch.__version__} cannot use", "Install the CUDA build of torch."
    return "ok", "none, and none is needed", ""


def jupyterlab() -> Told:
    """Notebooks name the kernel python3; a user's own of that name can come before that of the environment."""
    from jupyter_client.kernelspec import KernelSpecManager

    command = KernelSpecManager().get_kernel_spec("python3").argv[0]
    if command != "python" and Path(command).resolve() != Path(sys.executable).resolve():
        return "warn", "kernel python3 is another Python", "Remove it: jupyter kernelspec remove python3."
    return "ok", f"{installed('jupyterlab')}, kernel python3 is this Python", ""


def git() -> Told:
    from bkd_utils.common.measurements import commit

    if (now := commit()) is None:
        return "ok", "no checkout", ""
    advice = "Code or tables were changed since that commit, so numbers may differ." if now.endswith("+") else ""
    return "warn" if advice else "ok", f"commit {now[:12]}", advice


def speed() -> Told:
    """Matrix products as in the record of the committed run, by whose minutes those of a run here are told."""
    import torch

    from bkd_utils.running import runner

    pace, threads, cores = runner.speed(), torch.get_num_threads(), os.cpu_count() or 1
    found = f"{threads} threads on {cores} cores, GFLOP/s: {', '.join(f'{kind} {rate}' for kind, rate in pace.items())}"
    run = {name: one for name, one in recorded().items() if one["name"] not in ON_REQUEST}
    minutes = {name: one["minutes"] * one["gflops"]["fp32"] / pace["fp32"] for name, one in run.items()}
    if not minutes:
        return "ok", found, "Notebooks come with a checkout only."
    slow = ", ".join(f"{name} ({taken:.0f})" for name, taken in minutes.items() if taken > SLOW)
    found += f"; all notebooks in about {sum(minutes.values()):.0f} minutes, slow: {slow or 'none'}"
    idle = threads < cores and "OMP_NUM_THREADS" in os.environ
    card = torch.cuda.mem_get_info()[1] / GIB if torch.cuda.is_available() else 0
    options = " --device cuda" if card else " --profile smoke" if sum(minutes.values()) > PATIENCE else ""
    options = " --profile paper --device cuda" if card >= LARGE else options
    advice = f"Run ./run_all.sh{options}"
    if "smoke" in options:
        advice += ", or look again when no other program is busy"
    if idle:
        advice = "Unset OMP_NUM_THREADS, which keeps cores idle, and look again"
    return "warn" if idle or "smoke" in options else "ok", found, f"{advice}."
