"""The grid on a real Slurm on this machine, and on this machine alone, each killed in every way and run again.

    python tests/grid/run.py [--folder FOLDER] [--only slurm]

Makes the `smoke` grid (four organisms, twelve measurements) of a tiny model three times: through Slurm, as cells on two
cores, and one cell after another in one process. On the way one job is cancelled, one worker and the command itself get
`kill -9`. In the end every cell is there once, only what was running was started twice, and all results are equal to
the bit. Needs the packages of `.[grid]` and what `slurm.sh check` asks for; exit status 3 says that it cannot run here.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT), str(HERE.parent)]
from bkd_utils.running.ending import END_WITH_PARENT  # noqa: E402

PATIENCE = float(os.environ.get("GRID_PATIENCE", 600))  # seconds until something that is waited for counts as hanging
# Slurm is asked after 2 seconds instead of 40, and ten seconds later each time that nothing has ended. Twice as many
# jobs as cores run at once, so that no core waits for an answer.
FAST = {"slurm-init-seconds-before-status-checks": 2}
AT_ONCE = {"slurm": "4", "local": "2"}
SEQUENTIAL = """
import sys
from bkd_utils.common.files import WORK
from bkd_utils.running import grid, merging, workflow
profile, folder = grid.read_profile("smoke"), WORK / "grid" / "smoke"
cells = grid.expand(profile, model=sys.argv[1])
workflow.END_WITH_PARENT = None
workflow._write_plan(folder, profile, cells, executor="local", device="cpu")
for cell in cells:
    workflow.make_cell(folder, cell.target)
merging.merge([folder / "measurements"], into=WORK / "measurements")
"""


class Grid:
    """The smoke grid of one model in a work folder of its own."""

    def __init__(self, work: Path, model: Path, *, executor: str = "local") -> None:
        self.folder, self.work, self.slurm = work / "grid" / "smoke", work, executor == "slurm"
        self.environment = os.environ | {"BKD_WORK": str(work), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        options = ["--model", str(model), "--cores", AT_ONCE[executor], "--device", "cpu", "--executor", executor]
        self.command = [sys.executable, "-m", "bkd_utils", "grid", "--profile", "smoke", *options]

    def start(self) -> subprocess.Popen:
        return subprocess.Popen(self.command, env=self.environment, cwd=ROOT, preexec_fn=END_WITH_PARENT)

    def starts(self) -> list[str]:
        path = self.folder / "starts.log"
        return [line.split()[1] for line in path.read_text().splitlines()] if path.is_file() else []

    def is_done(self, target: str) -> bool:
        return (self.folder / target).is_file()

    def workers(self) -> dict[str, psutil.Process]:
        """The processes that make measurements now, by their cells."""
        found, started = {}, set(self.starts())
        for process in psutil.process_iter(["cmdline", "environ"]):
            line, environment = process.info["cmdline"] or [], process.info["environ"] or {}
            mine = environment.get("BKD_WORK") == str(self.work) and line[1:4] == ["-m", "bkd_utils", "cell"]
            if mine and line[-1] in started and not line[-1].endswith("organism.json"):
                found[line[-1]] = process
        return found

    def next_worker(self, driver: subprocess.Popen, *, besides: set[str]) -> tuple[str, psutil.Process]:
        """Wait for a measurement that is being made and was not chosen before; its process is stopped."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until:
            if driver.poll() is not None:
                raise SystemExit("FAILED: the grid came to its end before it could be killed")
            for target, process in self.workers().items():
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.suspend()  # so that it cannot end before it is killed
                    if target not in besides and not self.is_done(target):
                        return target, process
                    process.resume()
            time.sleep(0.3)
        raise SystemExit("FAILED: no measurement was started in time")

    def interrupted(self) -> set[str]:
        """Run the grid, cancel a job, kill a worker, kill the command; the cells that may be started again."""
        driver, hit = self.start(), set()
        if self.slurm:
            target, process = self.next_worker(driver, besides=hit)
            job = process.environ()["SLURM_JOB_ID"]
            subprocess.run(["scancel", job], check=True)
            print(f"cancelled job {job}: {target}", flush=True)
            hit.add(target)
        target, process = self.next_worker(driver, besides=hit)
        process.kill()
        print(f"killed the worker of {target}", flush=True)
        hit.add(target)
        while not any(self.is_done(one) for one in self.starts() if not one.endswith("organism.json")):
            assert driver.poll() is None, "the grid came to its end without a measurement"
            time.sleep(0.3)
        _, process = self.next_worker(driver, besides=hit)
        done = {one for one in self.starts() if self.is_done(one)}
        driver.kill()
        driver.wait()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.resume()  # jobs of the cluster outlive the command
        # On the cluster a job may have been started that had not come to its cell yet.
        running = set(self.starts()) - done - hit | self.queued()
        print(f"killed the command while {len(running)} cells were being made", flush=True)
        return hit | running

    def queued(self) -> set[str]:
        if not self.slurm:
            return set()
        listed = subprocess.run(["squeue", "--noheader", "--format=%k"], capture_output=True, text=True).stdout
        cells = json.loads((self.folder / "plan.json").read_text())["cells"]
        return {one for one in cells if any(one[: -len(".json")].replace("/", "_") in line for line in listed.split())}

    def measured(self) -> dict[str, tuple[str, str]]:
        """Digest and result of every merged measurement, by its stage and key; large arrays count by their hash."""
        from bkd_utils.common import measurements

        read = map(measurements.read, measurements.paths(self.work / "measurements"))
        return {one.id: (one.digest, json.dumps([one.result, one.arrays])) for one in read}


def killed_and_run_again(grid: Grid) -> None:
    may_repeat = grid.interrupted()
    before = {target: (grid.folder / target).stat().st_mtime_ns for target in grid.starts() if grid.is_done(target)}
    assert grid.start().wait(timeout=PATIENCE * 3) == 0, "the second run did not end well"
    cells = json.loads((grid.folder / "plan.json").read_text())["cells"]
    found = {path.relative_to(grid.folder).as_posix() for path in grid.folder.glob("*/*-seed*/*.json")}
    assert found == set(cells), f"other cells than planned: {found ^ set(cells)}"
    started = Counter(grid.starts())
    again = {target: n for target, n in started.items() if n > 1}
    assert set(started) == set(cells)
    assert set(again) <= may_repeat, f"started again: {again}; running when something was killed: {may_repeat}"
    assert set(again.values()) <= {2}, again
    changed = {target for target, time_ns in before.items() if (grid.folder / target).stat().st_mtime_ns != time_ns}
    assert changed <= may_repeat, f"finished cells were written again: {changed}"
    print(f"{len(cells)} cells, {len(before)} of them from before the kill; started twice: {len(again)}", flush=True)
    if not grid.slurm:
        assert grid.start().wait(timeout=PATIENCE) == 0, "the third run did not end well"
        assert Counter(grid.starts()) == started, "the third run has started cells"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="keep everything in this new folder")
    parser.add_argument("--only", choices=("slurm", "local"))
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that Slurm is stopped all the same
    if given.only != "local" and subprocess.call([HERE / "slurm.sh", "check"]):
        raise SystemExit(3)
    kept, results, began = given.folder or Path(tempfile.mkdtemp(prefix="bkd-grid-")), {}, time.monotonic()
    kept = kept.resolve()
    profile = kept / "profile"
    profile.mkdir(parents=True)
    (profile / "config.yaml").write_text("".join(f"{key}: {value}\n" for key, value in FAST.items()))
    os.environ["SNAKEMAKE_PROFILE"] = str(profile)
    try:
        if given.only != "local":
            starting = subprocess.Popen([HERE / "slurm.sh", "start", kept / "slurm"])
        from tiny import save_tiny  # seconds of imports, while Slurm starts

        model = save_tiny(kept / "tiny", "llama")
        one = Grid(kept / "sequential", model)
        one.command = [sys.executable, "-c", SEQUENTIAL, str(model)]
        sequential = one.start()
        assert given.only == "local" or starting.wait() == 0, "Slurm did not start"
        for name in ("slurm", "local"):
            if given.only in (None, name):
                results[name] = Grid(kept / f"on_{name}", model, executor=name)
                killed_and_run_again(results[name])
                print(f"{name}: {time.monotonic() - began:.0f} s so far", flush=True)
    finally:
        if given.only != "local":
            subprocess.run([HERE / "slurm.sh", "stop", kept / "slurm"])
    assert sequential.wait(timeout=PATIENCE) == 0, "the sequential run failed"
    expected = one.measured()
    assert len(expected) >= 16, f"{len(expected)} measurements"
    for name, grid in results.items():
        assert grid.measured() == expected, f"{name}: not the results of the sequential run"
        print(f"{name}: {len(expected)} measurements, each equal to that of the sequential run", flush=True)
    print(f"passed in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
