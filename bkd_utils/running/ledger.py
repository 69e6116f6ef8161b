"""What the notebooks of a run used: which measurements ship, were made here, were checked. Read from their ledgers."""

import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bkd_utils.common import measurements
from bkd_utils.common.spot_checks import spots

OWN = ("measured here", "kept here")
FINISHED = "finished"


@dataclass(frozen=True)
class Used:
    """Lines of one notebook's ledger: a measurement each, the last time it was used, and spot checks."""

    measurements: dict[str, dict[str, Any]] = field(default_factory=dict)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished: bool = False

    @property
    def shipped(self) -> list[str]:
        return [one for one, line in self.measurements.items() if line["how"] not in OWN]

    @property
    def stale(self) -> dict[str, str | None]:
        """Id -> commit of what ships and was measured by other code."""
        lines = self.measurements.items()
        return {one: line["commit"] for one, line in lines if line["how"] == "shipped, other code"}

    @property
    def own(self) -> list[str]:
        return [one for one, line in self.measurements.items() if line["how"] in OWN]


def read(path: Path) -> Used:
    """The ledger of a notebook; an empty one where nothing was used. A line that a kill cut off is left out."""
    found, checks, finished = {}, {}, False
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line["how"] == FINISHED:
            finished = True
        else:
            (checks if line["how"] == "checked" else found)[line["id"]] = line
    return Used(found, checks, finished)


def finish(path: Path) -> None:
    """Mark the ledger of a notebook that ran to its end."""
    with path.open("a", encoding="utf-8") as handle:
        handle.write(json.dumps({"how": FINISHED}) + "\n")


def forget_finished(folder: Path, ledgers: Sequence[Path], *, others: bool) -> None:
    """Remove from a folder of measurements what these notebooks used, if all of them ran to their end. So a further
    call measures everything anew, and a call after a kill goes on where that one stopped. If there are no `others`,
    everything is removed, what stages asked of each other included."""
    every = [read(path) for path in ledgers]
    if not all(used.finished for used in every):
        return
    if not others:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for one in {one for used in every for one in used.measurements}:
        measurements.remove(folder / f"{one}.json")


def summary(every: Sequence[Used]) -> list[str]:
    """The closing lines of a run: what was used, what was checked, and what a reader should know of it."""
    shipped = {one for used in every for one in used.shipped}
    own = {one for used in every for one in used.own}
    stale = {one: commit for used in every for one, commit in used.stale.items()}
    checks = {one: line for used in every for one, line in used.checks.items()}
    agreed = sum(line["agrees"] for line in checks.values())
    counts = f"{len(checks)} checked and {agreed} agreed, {len(stale)} stale, {len(own)} measured here"
    told = [f"{len(shipped)} shipped and used, {counts}"]
    if stale:
        counts = Counter((commit or "no commit")[:12] for commit in stale.values())
        at = ", ".join(f"{count} at {commit}" for commit, count in counts.items())
        told.append(f"stale: measured by other code ({at}); python -m bkd_utils verify measures a share of them again")
    apart = {name: line["worst"] for name, line in checks.items() if line["worst"]}
    if apart:
        furthest = max(apart, key=apart.__getitem__)
        told.append(f"largest difference of a check: {apart[furthest]:.3g}, {furthest} at {checks[furthest]['place']}")
    for name in sorted({one.partition("/")[0] for one in shipped} - {one.partition("/")[0] for one in checks}):
        spot = spots().get(name)
        told.append(f"not checked: {name}: {spot.none if spot and spot.none else 'no spot check was run'}")
    return told
