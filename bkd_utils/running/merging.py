"""Merge measurements that were made in several folders, on several machines, say, into one folder."""

import json
from collections.abc import Sequence
from pathlib import Path

from bkd_utils.common import measurements
from bkd_utils.common.files import UserError, check_writable, sweep
from bkd_utils.common.measurements import Measurement
from bkd_utils.common.spot_checks import leaves
from bkd_utils.running.remeasuring import paths_in


def merge(folders: Sequence[Path], *, into: Path) -> tuple[int, int]:
    """Copy the measurements of several folders into one; returns how many were copied, and how many were there already.
    Everything is read and checked before anything is written. Where results are equal, what is in `into` stays, else
    the first of the folders counts, so that the same command again gives the same bytes. Raises UserError for a folder
    that is missing or has no measurement and for two different results of one key, ValueError for a file that is
    damaged; then nothing is written."""
    chosen: dict[str, Path] = {}
    for path in [path for folder in folders for path in paths_in(folder)]:
        one = measurements.read(path)
        _check_equal(chosen.setdefault(one.id, path), one, path)
    there = {path: into / path.parent.name / path.name for path in chosen.values()}
    for path, target in there.items():
        if target.is_file():
            _check_equal(path, measurements.read(target), target)
    check_writable(into)
    sweep(into.glob("*/.*.part"))
    missing = [path for path, target in there.items() if not target.is_file()]
    for path in missing:
        measurements.write(into, measurements.read(path))
    return len(missing), len(there) - len(missing)


def _check_equal(first: Path, one: Measurement, path: Path) -> None:
    """Raise UserError that names a place where two results of one question differ."""
    if first == path or (other := measurements.read(first)).digest == one.digest:
        return
    ours, theirs = ({place: json.dumps(value) for place, value in leaves(each.result)} for each in (other, one))
    differ = (place for place in ours | theirs if ours.get(place) != theirs.get(place))
    place = next(differ, "a part that is empty")
    told = " and ".join(f"{values.get(place, 'nothing'):.60}" for values in (ours, theirs))
    raise UserError(f"two results of {one.id}: {first} and {path} differ at {place}: {told}; nothing was merged")
