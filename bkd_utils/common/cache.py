"""Keep the result of an expensive stage as a measurement, and read it where it is there already.

What is kept in the work folder counts for the same question, code, libraries and arithmetic only: a rerun after a kill
repeats the stage that was running and no other. What ships in `data/measurements` counts for the same question; if it
was measured by other code, that is said. BKD_KEEP names another folder to keep results in, BKD_SHIPPED another one that
ships, or none if it is empty; with BKD_REPLAY nothing is measured; BKD_LEDGER names a file that gets a line per result.
"""

import contextlib
import functools
import importlib.metadata
import inspect
import json
import logging
import os
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

from bkd_utils.common import measurements
from bkd_utils.common.code_key import code_key
from bkd_utils.common.files import WORK, UserError, canonical_json, sha256_text
from bkd_utils.common.measurements import Measurement, digest, machine_of
from bkd_utils.common.results import plain, restored

LIBRARIES = ("torch", "transformers", "peft")
P = ParamSpec("P")
R = TypeVar("R")
Resolved = Callable[[dict[str, Any]], dict[str, Any]]
STAGES: dict[str, Callable] = {}  # every stage by its name, once its module has been imported
used: list[dict[str, Any]] = []  # what was asked for in this process, in order, and where it came from
# Is a stage running that asked for this one? Only what a notebook asked for itself is written into the ledger.
_inside: ContextVar[bool] = ContextVar("inside a stage", default=False)
log = logging.getLogger(__name__)


def stage(function: Callable[P, R], *, resolved: Resolved | None = None) -> Callable[P, R]:
    """Keep what a function of JSON values returns: JSON values or Results (`results.Result`). A kept result is read as
    what the function's return annotation says. `resolved` turns the arguments into `{"inputs": what their names stand
    for, "arithmetic": what the last digits depend on}`. Raises TypeError for arguments that are not JSON values (pass
    names, not paths or models), ValueError for a result with NaN, UserError in a replay for what was not measured. A
    result that cannot be written, as on a full disk, is returned all the same, with a warning."""
    kind = get_type_hints(function).get("return")
    name = function.__name__

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        asked = question(run, *args, **kwargs)
        one, how = kept(asked, kept_folder()), "kept here"
        if one is None:
            one, how = _shipped(asked, kind)
        if one is None:
            if os.environ.get("BKD_REPLAY"):
                raise UserError(f"no measurement of {name} ships for {canonical_json(asked['arguments'])}")
            one, how = _measured(asked, function, *args, **kwargs), "measured here"
        if not _inside.get():  # for spot checks in this process, and for the ledger
            used.append({"stage": one.stage, "how": how})
            note({"id": one.id, "how": how, "commit": one.commit, "seconds": one.seconds})
        return restored(kind, one.result)

    run.resolved = resolved or (lambda _: {})
    STAGES[name] = run
    return run


def here(stage: Callable, *args: Any, **kwargs: Any) -> Measurement:
    """A call of a stage as measured on this machine, now or earlier by the same code, whatever ships. Other stages that
    it needs may come from what ships."""
    asked = question(stage, *args, **kwargs)
    return kept(asked, kept_folder()) or _measured(asked, stage.__wrapped__, *args, **kwargs)


def question(stage: Callable, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """All fields of the measurement that a call of a stage asks for, but for what comes out: `stage`, `arguments`,
    `inputs`, `code`, `libraries` and `machine`. Raises TypeError that names an argument which is not a JSON value."""
    function = stage.__wrapped__
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = plain(bound.arguments)
    for name, value in arguments.items():
        try:
            canonical_json(value)
        except (TypeError, ValueError) as error:
            told = f"stage {function.__name__}: argument {name} = {value!r} is not a JSON value"
            raise TypeError(told) from error
    resolved = stage.resolved(arguments)
    module = Path(inspect.getsourcefile(inspect.unwrap(function)))
    code = sha256_text(function.__qualname__ + code_key(module))  # the name, because a module can hold several stages
    asked = {"stage": function.__name__, "arguments": arguments, "inputs": resolved.get("inputs", {}), "code": code}
    return asked | {"libraries": installed_versions(), "machine": machine_of(resolved.get("arithmetic", {}))}


@functools.cache
def installed_versions(*names: str) -> dict[str, str]:
    """Versions of libraries, without their builds; by default of those on whose arithmetic a result depends."""
    return {name: importlib.metadata.version(name).split("+")[0] for name in names or LIBRARIES}


def kept_folder() -> Path:
    """Where results are kept: BKD_KEEP, or `measurements` in the work folder."""
    named = os.environ.get("BKD_KEEP")
    return Path(named or Path(os.environ.get("BKD_WORK") or WORK) / "measurements").expanduser()


def place(folder: Path, asked: dict[str, Any]) -> Path:
    """Where a folder holds the answer to a question."""
    key = measurements.key(asked["stage"], asked["arguments"], asked["inputs"])
    return folder / asked["stage"] / f"{key}.json"


def is_of_this_code(one: Measurement, asked: dict[str, Any]) -> bool:
    """Was it measured by the code and the libraries that are here now?"""
    return (one.code, one.libraries) == (asked["code"], asked["libraries"])


def kept(asked: dict[str, Any], folder: Path) -> Measurement | None:
    """The answer to a question in a folder, if it was measured by this code, these libraries and this arithmetic. A
    damaged file is put aside, with a warning."""
    path = place(folder, asked)
    if not path.is_file():
        return None
    try:
        one = measurements.read(path)
    except (OSError, ValueError) as error:
        aside = path.with_suffix(".damaged")
        with contextlib.suppress(OSError):  # another process has moved it in the meantime, or the folder is read-only
            os.replace(path, aside)
        log.warning("%s; it was moved to %s and is measured again", error, aside.name)
        return None
    arithmetic, wanted = ((machine.device, machine.fast_bf16) for machine in (one.machine, asked["machine"]))
    # A replay asks what was measured and not what would be, so that a report can be checked after an update.
    fits = is_of_this_code(one, asked) or os.environ.get("BKD_REPLAY")
    return one if fits and arithmetic == wanted else None


def _shipped(asked: dict[str, Any], kind: Any) -> tuple[Measurement | None, str]:
    """The answer to the question that ships, if one does, and whether it was measured by other code. None also for one
    whose form is no longer that of the stage's results, which are of this kind."""
    folder = measurements.shipped_folder()
    if folder is None or not (path := place(folder, asked)).is_file():
        return None, ""
    one = measurements.read(path)  # a damaged one is an error, because it is not ours to replace
    if is_of_this_code(one, asked):
        return one, "shipped"
    try:
        restored(kind, one.result)
    except ValueError as error:
        log.warning("%s: measured by code that knew another form of result: %s", path, error)
        return None, ""
    log.warning("%s was measured by other code or libraries, at commit %s", one.id, one.commit)
    return one, "shipped, other code"


def _measured(asked: dict[str, Any], function: Callable, *args: Any, **kwargs: Any) -> Measurement:
    started, token = time.monotonic(), _inside.set(True)
    try:
        result = plain(function(*args, **kwargs))
    finally:
        _inside.reset(token)
    try:  # what comes back is what a rerun will read, keys turned into texts and all
        result = json.loads(json.dumps(result, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise type(error)(f"stage {asked['stage']}: {error}") from error
    made = {"version": 1, "commit": measurements.commit(), "seconds": round(time.monotonic() - started, 2)}
    one = Measurement.model_construct(**asked, **made, digest=digest(result), arrays=None, seal="", result=result)
    try:
        measurements.write(kept_folder(), one)
    except OSError as error:
        log.warning("%s could not be kept: %s", one.id, error.strerror or error)
    log.info("%s: measured in %.1f s", one.stage, one.seconds)
    return one


def note(line: dict[str, Any]) -> None:
    """Add a line to the ledger, if there is one."""
    if path := os.environ.get("BKD_LEDGER"):
        with open(path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps(line) + "\n")
