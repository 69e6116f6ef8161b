"""Check what ships and was measured by other code, and renew the mark of what agrees."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from bkd_utils.common import cache, measurements, spot_checks
from bkd_utils.common.files import UserError, check_writable, read_json, write_json
from bkd_utils.running import stages
from bkd_utils.running.progress import one_line, shown
from bkd_utils.running.remeasuring import paths_in


@dataclass
class Restamped:
    """Marks that were renewed, measurements that are of this code anyway, those that differ, and those not checked."""

    renewed: int = 0
    current: int = 0
    differing: list[spot_checks.Checked] = field(default_factory=list)
    unchecked: dict[str, str] = field(default_factory=dict)


def restamp(console: Console) -> Restamped:
    """Spot-check every measurement of other code or libraries; of those that agree renew code, libraries and commit.
    Nothing else in a file changes. Raises ValueError for a damaged file, before anything is checked, and UserError
    where nothing ships or where it cannot be written to."""
    found, paths = Restamped(), paths_in(measurements.shipped_folder())
    stale = _stale(paths, found)
    check_writable(paths[0].parents[1])
    with shown(console, "checking", [seconds for _, seconds, _ in stale]) as pace:
        for path, _, asked in stale:
            one = measurements.read(path)
            try:
                check = spot_checks.check(one)
            except Exception as error:
                found.unchecked[one.id] = one_line(error)
            else:
                if check.agrees:
                    mark = {"code": asked["code"], "libraries": asked["libraries"], "commit": measurements.commit()}
                    write_json(path, measurements.sealed(read_json(path) | mark))
                    found.renewed += 1
                else:
                    found.differing.append(check)
                    console.print(str(check), style="red", markup=False, soft_wrap=True)
            pace.finished(failed=one.id in found.unchecked)
    for name, reason in found.unchecked.items():
        console.print(f"{name} could not be checked: {reason}", markup=False, soft_wrap=True)
    counts = f"{len(found.differing)} differ, {len(found.unchecked)} could not be checked"
    console.print(f"{found.renewed} renewed, {found.current} are of this code, {counts}", highlight=False)
    return found


def _stale(paths: list[Path], found: Restamped) -> list[tuple[Path, float, dict[str, Any]]]:
    """File, seconds on record and question of each measurement of other code; others are noted in `found`."""
    stale = []
    for path in paths:
        one = measurements.read(path)
        try:
            asked = stages.question(one.stage, one.arguments)
            if cache.place(path.parents[1], asked) != path:
                raise UserError("what its names stand for has changed, so that it is measured again where needed")
        except Exception as error:  # a stage or an organism that is gone, too
            found.unchecked[one.id] = one_line(error)
            continue
        if cache.is_of_this_code(one, asked):
            found.current += 1
        else:
            stale.append((path, one.seconds, asked))
    return stale
