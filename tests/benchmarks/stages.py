"""Seconds of stages that generate or compare heads, by this code and by that of another checkout, in one run.

    python tests/benchmarks/stages.py FOLDER        # FOLDER: another checkout, e.g. by `git worktree add FOLDER COMMIT`

Every case is a process of its own, in which an organism was loaded before; the checkouts take turns, and nothing kept
or shipped is read. Results must be the same but for the last digits: the largest difference of two numbers is written
down, and another outcome (another hit, text or count) is an error. Written to `tests/benchmarks/results/stages.json`.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bkd_utils.common.cache import installed_versions
from bkd_utils.common.files import ROOT, UserError, write_json
from bkd_utils.common.measurements import read
from bkd_utils.models.loading import load
from bkd_utils.running import stages

CASES = [
    ("measure_organism", {"organism": "harmful-word", "n": 80}),
    ("measure_attacked", {"organism": "instructions-clean", "attack": "instructions-prefix", "n": 80}),
    ("guard_inputs", {"organism": "sentiment-word", "attack": "sentiment-word", "n": 12, "n_reference": 24}),
    ("head_safety_scores", {"organism": "sentiment-word", "attack": "sentiment-word", "n": 12}),
]


def differences(one: Any, other: Any, place: str = "") -> float:
    """Largest difference of two results' decimal numbers; `one` may hold more. Raises UserError for any other one."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() >= other.keys():
        return max((differences(one[key], other[key], f"{place}/{key}") for key in other), default=0.0)
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = enumerate(zip(one, other, strict=True))
        return max((differences(*pair, f"{place}/{i}") for i, pair in pairs), default=0.0)
    if isinstance(one, float) and isinstance(other, float):
        return abs(one - other)
    if one != other:
        raise UserError(f"{place}: {one!r} here, {other!r} there")
    return 0.0


def measured(checkout: Path, case: int) -> dict[str, Any]:
    """One case by the code of a checkout, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        where = {"BKD_WORK": folder, "BKD_KEEP": folder, "BKD_SHIPPED": "", "PYTHONPATH": str(checkout)}
        command = [sys.executable, __file__, "--case", str(case), str(checkout)]
        told = subprocess.run(command, env=os.environ | where, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(told.stdout.splitlines()[-1])


def main(
    other: Annotated[Path, typer.Argument(help="The other checkout.")],
    case: Annotated[int, typer.Option(hidden=True, help="Measure one case in this process.")] = -1,
    first: Annotated[int, typer.Option(help="Only so many of the cases.")] = len(CASES),
) -> None:
    if case >= 0:
        load(organism="sentiment-word")  # which tests this kind of model, once per process
        name, arguments = CASES[case]
        found = read(stages.measure(name, arguments, folder=Path(os.environ["BKD_KEEP"])))
        print(json.dumps({"seconds": found.seconds, "result": found.result}))
        return
    rows = []
    for number, (name, arguments) in enumerate(CASES[:first]):
        there, here = (measured(checkout.resolve(), number) for checkout in (other, ROOT))
        row = {"case": f"{name} {' '.join(map(str, arguments.values()))}", "seconds": here["seconds"]}
        row |= {"baseline": "before", "baseline_seconds": there["seconds"]}
        row["ratio"] = round(there["seconds"] / here["seconds"], 2)
        row["max_abs_diff"] = differences(here["result"], there["result"])
        rows.append(row)
        print(row, flush=True)
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    found = {"machine": machine, "versions": installed_versions(), "rows": rows}
    write_json(ROOT / "tests" / "benchmarks" / "results" / "stages.json", found)


if __name__ == "__main__":
    typer.run(main)
