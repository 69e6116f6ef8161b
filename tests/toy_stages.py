"""Stages of a line each, for tests of what is done with measurements: calls of them, files of them, and a kill."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path

from bkd_utils.common import cache
from bkd_utils.common.measurements import read, sealed
from bkd_utils.running import stages

# What the names of organisms stand for here.
ORGANISMS = {"first": "1", "second": "2"}


def named(arguments):
    if (name := arguments.get("organism", "first")) not in ORGANISMS:
        raise cache.UserError(f"unknown organism {name!r}")
    return {"inputs": {"organism": ORGANISMS[name]}, "arithmetic": {"device": arguments.get("device", "cpu")}}


def toy_square(*, x: int, organism: str = "first", device: str = "cpu") -> dict:
    return {"square": x * x, "rows": [{"of": i, "values": [i / 7] * 100} for i in range(3)]}


def toy_killed(*, x: int) -> int:
    """Kills its process if the file that KILL names is not there yet, as a machine does that is switched off."""
    mark = Path(os.environ.get("KILL", os.devnull))
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return x


def toy_broken(*, x: int) -> int:
    return 1 // (x - x)


@contextmanager
def known():
    """The toy stages are stages, until the end."""
    before = dict(cache.STAGES)
    try:
        for function in (toy_square, toy_killed, toy_broken):
            cache.stage(function, resolved=named)
        yield
    finally:
        cache.STAGES.clear()
        cache.STAGES.update(before)


def measure(folder, *, stage="toy_square", changed=None, **arguments):
    """The file of a measurement in a folder; `changed` replaces fields of it."""
    path = stages.measure(stage, arguments, folder=folder)
    if changed:
        change(path, **changed)
    return path


def change(path, **fields):
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | fields), indent=2) + "\n")


def tree(folder):
    """Every file of a folder, hidden ones too: path -> bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def results(folder):
    """What was measured, without when, where and how long."""
    return {path: read(folder / path).digest for path in tree(folder) if path.endswith(".json")}
