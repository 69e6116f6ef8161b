"""Merge measurements that were made in several folders, on several machines, say, into one folder."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import psutil

from bkd_utils.common import measurements
from bkd_utils.common.files import UserError, atomic_path, check_writable
from bkd_utils.common.measurements import path_of

ABSENT = object()


@dataclass(frozen=True)
class Merged:
    """How many measurements were copied, and how many were there already with the same result."""

    copied: int
    already: int


def merge(folders: Sequence[Path], *, into: Path) -> Merged:
    """Copy the measurements of several folders into one. Everything is read and checked before anything is written.

    Where results are equal, what is in `into` stays, else the first of the folders counts, so that the same command
    again gives the same bytes. Raises UserError for a folder that is missing or has no measurement and for two
    different results of one key, ValueError for a file that is damaged; then nothing is written.
    """
    chosen: dict[str, tuple[Path, str]] = {}
    for folder in folders:
        found = measurements.paths(folder) if folder.is_dir() else []
        if not found:
            raise UserError(f"{folder} {'holds no measurements' if folder.is_dir() else 'is no folder'}")
        for path in found:
            one = measurements.read(path)
            if one.id not in chosen:
                chosen[one.id] = (path, one.digest)
            _check_equal(chosen[one.id], path, one.digest)
    missing = []
    for path, digest in chosen.values():
        there = path_of(into, path.parent.name, path.stem)
        if there.is_file():
            _check_equal((path, digest), there, measurements.read(there).digest)
        else:
            missing.append((path, there))
    check_writable(into)
    for path, target in missing:
        _copy(path, target)
    return Merged(copied=len(missing), already=len(chosen) - len(missing))


def _copy(path: Path, target: Path) -> None:
    """Arrays first, so that a JSON file always finds its arrays, also after a kill between the two."""
    for ending in (".safetensors", ".json"):
        source, copy = path.with_suffix(ending), target.with_suffix(ending)
        for left in target.parent.glob(f".{copy.name}.*.part"):  # of a process that was killed
            number = left.name.split(".")[-2]
            if not (number.isdecimal() and psutil.pid_exists(int(number))):
                left.unlink(missing_ok=True)
        if source.is_file():
            with atomic_path(copy) as temporary:
                shutil.copyfile(source, temporary)
        else:
            copy.unlink(missing_ok=True)


def _check_equal(first: tuple[Path, str], path: Path, digest: str) -> None:
    if first[1] == digest:
        return
    one = measurements.read(first[0])
    place, *values = next(differences(one.result, measurements.read(path).result))
    told = " and ".join("nothing" if value is ABSENT else f"{json.dumps(value):.60}" for value in values)
    raise UserError(f"two results of {one.id}: {first[0]} and {path} differ at {place}: {told}; nothing was merged")


def differences(first: Any, second: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each place where two JSON values differ, as `layers/3/acie`, with both values."""
    if isinstance(first, dict) and isinstance(second, dict):
        both = [(name, first.get(name, ABSENT), second.get(name, ABSENT)) for name in {**first, **second}]
    elif isinstance(first, list) and isinstance(second, list):
        both = [(number, *pair) for number, pair in enumerate(zip_longest(first, second, fillvalue=ABSENT))]
    else:
        if type(first) is not type(second) or first != second:
            yield place or "the result", first, second
        return
    for name, one, other in both:
        yield from differences(one, other, f"{place}/{name}" if place else str(name))
