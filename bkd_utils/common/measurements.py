"""Measurements: results of stages as files, with everything that says what was measured, of what, how and where.

A measurement is `<folder>/<stage>/<key>.json`, with its larger arrays in `<key>.safetensors` beside it. The key is made
of the stage, its arguments and what their names stand for. Code, libraries and machine are written into the file and
are not part of the key, so that the same question has the same file name wherever it is asked."""

import functools
import hashlib
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from bkd_utils.common import files
from bkd_utils.common.files import atomic_path, canonical_json, read_json, sha256_file, sha256_text, write_json
from bkd_utils.common.validation import Name, Sha256, Table, check

LARGE = 64  # arrays of fewer numbers stay in the JSON, where they can be read
MARK = "$array"


class Machine(Table):
    """Where a measurement was made; no name that would identify the machine."""

    processor: str
    cores: int
    device: str | None
    fast_bf16: bool | None


class Measurement(Table):
    """One result of one stage. `digest` is the hash of `result`, `arrays` that of the file beside it, or None, and
    `seal` that of everything else."""

    version: Annotated[int, Field(ge=1, le=1)]  # strict, as True is no version
    stage: Name
    arguments: dict[str, Any]
    inputs: dict[str, Any]
    code: Sha256
    commit: str | None
    libraries: dict[str, str]
    machine: Machine
    seconds: float
    digest: Sha256
    arrays: Sha256 | None
    seal: Sha256
    result: Any

    @property
    def key(self) -> str:
        return key(self.stage, self.arguments, self.inputs)

    @property
    def id(self) -> str:
        return f"{self.stage}/{self.key}"


def key(stage: str, arguments: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Content key of a question: the stage, its arguments but for the device, and what their names stand for."""
    asked = {name: value for name, value in arguments.items() if name != "device"}
    return sha256_text(canonical_json([stage, asked, inputs]))[:20]


def digest(result: Any) -> str:
    return sha256_text(canonical_json(result))


def sealed(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a file with the seal that belongs to them."""
    rest = {name: value for name, value in given.items() if name not in ("seal", "result")}
    return dict(given) | {"seal": sha256_text(canonical_json(rest))}


def write(folder: Path, one: Measurement) -> Path:
    """Write a measurement, arrays first, so that a JSON file always finds its arrays. Raises ValueError, and writes
    nothing, for NaN, for the digest of another result, and for a dictionary in the result that has the mark of an array
    as its only key."""
    if digest(one.result) != one.digest:
        raise ValueError(f"{one.id}: the digest {one.digest[:12]} is that of another result")
    path = folder / f"{one.id}.json"
    arrays: dict[str, np.ndarray] = {}
    given = one.model_dump() | {"result": _taken_out(one.result, arrays, ""), "arrays": None}
    beside = path.with_suffix(".safetensors")
    if not arrays:
        write_json(path, sealed(given))
        beside.unlink(missing_ok=True)
        return path
    content = save(arrays)
    given["arrays"] = hashlib.sha256(content).hexdigest()
    written = None
    while written != given["arrays"]:  # another process may have put its arrays under this JSON file in the meantime
        with atomic_path(beside) as temporary:
            temporary.write_bytes(content)
        write_json(path, sealed(given))
        written = sha256_file(beside)
    return path


def read(path: Path) -> Measurement:
    """A measurement with its arrays put back as nested lists. Raises ValueError, in one line that names the file, for
    one that is no measurement, that has been changed since it was written, that bears another name than its content
    says, or whose arrays are missing, cut off or others."""
    given = read_json(path)
    one = check(Measurement, given, str(path))
    if one.arrays:
        one.result = _put_back(one.result, _arrays(path.with_suffix(".safetensors"), one.arrays), path)
    try:
        found, name, seal = digest(one.result), (one.stage, one.key), sealed(given)["seal"]
    except ValueError as error:  # NaN, which JSON files of Python may hold
        raise ValueError(f"{path}: it has numbers that are not finite ({error})") from error
    if found != one.digest:
        raise ValueError(f"{path}: result was changed since it was written (hash {found[:12]}, not {one.digest[:12]})")
    if (path.parent.name, path.stem) != name:
        raise ValueError(f"{path}: stage, arguments or inputs are those of {one.id}")
    if seal != one.seal:
        raise ValueError(f"{path}: fields were changed since it was written (hash {seal[:12]}, not {one.seal[:12]})")
    return one


def paths(folder: Path) -> list[Path]:
    """The files of all measurements of a folder, in order."""
    return sorted(folder.glob("*/*.json"))


def remove(path: Path) -> None:
    """Remove a measurement, if it is there, and its arrays."""
    path.unlink(missing_ok=True)
    path.with_suffix(".safetensors").unlink(missing_ok=True)


def _arrays(path: Path, expected: str) -> dict[str, np.ndarray]:
    try:
        if sha256_file(path) != expected:
            raise ValueError(f"{path}: not the arrays that belong to its measurement (cut off or changed)")
        return load_file(path)
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing") from error
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error


def _taken_out(value: Any, arrays: dict[str, np.ndarray], place: str) -> Any:
    """The value with large arrays replaced by marks that name their place; they are added to `arrays`."""
    if isinstance(value, Mapping):
        if value.keys() == {MARK}:
            raise ValueError(f"a result cannot have a dictionary with the only key {MARK!r}, at {place or '/'}")
        # As in RFC 6901, so that no two places have one name.
        parts = {name: name.replace("~", "~0").replace("/", "~1") for name in value}
        return {name: _taken_out(inside, arrays, f"{place}/{parts[name]}") for name, inside in value.items()}
    if not isinstance(value, list):
        return value
    kind = _kind(value)
    if kind and (array := _regular(value, kind)) is not None:
        if array.size < LARGE:
            return value
        arrays[place or "/"] = array
        return {MARK: place or "/"}
    return [_taken_out(inside, arrays, f"{place}/{number}") for number, inside in enumerate(value)]


def _kind(value: list) -> type | None:
    """The type of all numbers of a nested list, or None if it holds anything else, or whole and decimal ones mixed."""
    found: set[type] = set()
    for inside in value:
        found.add((_kind(inside) or type(None)) if isinstance(inside, list) else type(inside))
    return found.pop() if len(found) == 1 and found <= {float, int} else None


def _regular(value: list, kind: type) -> np.ndarray | None:
    try:
        array = np.array(value, dtype=np.float64 if kind is float else np.int64)
    except (ValueError, OverflowError):
        return None
    # The smallest type that holds every number exactly: outcomes take one byte each.
    smaller = (np.float16, np.float32) if kind is float else (np.int8, np.int16, np.int32)
    with np.errstate(over="ignore"):
        array = next((array.astype(one) for one in smaller if (array.astype(one) == array).all()), array)
    return array if array.size else None


def _put_back(value: Any, arrays: Mapping[str, np.ndarray], path: Path) -> Any:
    if isinstance(value, dict):
        if value.keys() == {MARK}:
            place = value[MARK]
            if not isinstance(place, str) or place not in arrays:
                raise ValueError(f"{path}: there is no array {place!r} beside it")
            return arrays[place].tolist()
        return {name: _put_back(inside, arrays, path) for name, inside in value.items()}
    return [_put_back(inside, arrays, path) for inside in value] if isinstance(value, list) else value


def machine_of(arithmetic: Mapping[str, Any]) -> Machine:
    """This machine, and the arithmetic with which a result is computed on it."""
    processor = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    device, bf16 = arithmetic.get("device"), arithmetic.get("fast_bf16")
    return Machine(processor=processor, cores=psutil.cpu_count(), device=device, fast_bf16=bf16)


@functools.cache
def commit() -> str | None:
    """The commit of this checkout, with a + behind it if a file was changed since, or None where there is none."""
    if not files.CHECKOUT:
        return None
    ask = functools.partial(subprocess.check_output, cwd=files.ROOT, stderr=subprocess.DEVNULL, text=True)
    try:
        changed = ask(["git", "status", "--porcelain", "--untracked-files=no", "--", "bkd_utils", "data/*.toml"])
        return ask(["git", "rev-parse", "HEAD"]).strip() + ("+" if changed.strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def shipped_folder() -> Path | None:
    """Where shipped measurements are read: BKD_SHIPPED, or `data/measurements`; None where BKD_SHIPPED is empty."""
    named = os.environ.get("BKD_SHIPPED", str(files.DATA / "measurements"))
    return Path(named).expanduser() if named else None
