"""Run the notebooks of a profile one after another, collect their figures, publish, and end with a table."""

import time
import timeit
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

from bkd_utils.common import cache, files
from bkd_utils.common.files import FIGURES, WORK, read_json, sha256_file, write_json
from bkd_utils.common.measurements import commit
from bkd_utils.common.validation import Seed, check
from bkd_utils.models.compute import product
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.identity import short_name
from bkd_utils.reports import scorecard
from bkd_utils.running import ledger, notebooks, publishing, recording, remeasuring
from bkd_utils.running.ledger import Used
from bkd_utils.running.notebooks import NotebookError
from bkd_utils.running.process import Run, run_notebook

RECORDED = ("name", "minutes", "peak_gib", "status", "gflops")


def run_all(
    *,
    profile: str,
    only: str | None = None,
    model: str = DEFAULT_MODEL,
    device: str = "auto",
    seed: int = 0,
    retrain: bool = False,
    remeasure: bool = False,
    publish: bool = False,
    console: Console,
) -> list[Run]:
    """Run the chosen notebooks one after another, also after one that failed, and print a table.

    Figures are written to `work/figures/<profile>/<model>`, where the name of the model ends in digits of its identity.
    Measurements that ship are used, unless `remeasure`: then everything is measured and kept in `work/remeasured`, and
    what an earlier such run finished there is removed first. With `publish`, what a notebook that ran to its end made
    and used is copied to where it is committed. Before anything runs, raises ValueError for options that are not valid,
    and UserError for a folder that cannot be written to; after the table, UserError for a record that cannot."""
    check(Seed, seed, "seed")
    paths = notebooks.select(only)
    common = {"model": model, "device": device, "seed": seed, "retrain": retrain}
    if publish and not is_published(profile, common):
        committed = "the laptop profile, default model and seed, shipped organisms"
        raise NotebookError(f"--publish is for {committed}: that is what is committed")
    table, limit = notebooks.profile_parameters(profile, paths)
    kinds = ("figures", "executed", "ledgers")
    figures, executed, ledgers = (WORK / kind / profile / short_name(model) for kind in kinds)
    kept, ledgers = (WORK / "remeasured", ledgers / "remeasured") if remeasure else (cache.kept_folder(), ledgers)
    places = (publishing.MEASUREMENTS, FIGURES, files.NOTEBOOKS) if publish else ()
    files.check_writable(WORK, figures, executed, ledgers, kept, *places)
    environment = {"BKD_FIGURES": str(figures.resolve()), "PYTHONUNBUFFERED": "1", "BKD_KEEP": str(kept.resolve())}
    if remeasure:
        environment["BKD_SHIPPED"] = ""
        ledger.forget_finished(kept, [ledgers / f"{path.stem}.jsonl" for path in paths], others=only is not None)
        ids = publishing.shipped_by([path.stem for path in paths])
        if ids and is_published(profile, common):  # with a time left, which notebooks cannot tell
            remeasuring.remeasure(ids, folder=kept, console=console)
    started, runs, used = time.strftime("%Y-%m-%dT%H:%M:%S"), [], {}
    for path in paths:
        before, gflops, began = _figures(figures), speed(), time.monotonic()
        run = Run(path.stem, 0.0, 0.0, "failed")
        try:
            declared = notebooks.parameters(path)
            given = table[path.stem] | {key: value for key, value in common.items() if key in declared}
            (book := ledgers / f"{path.stem}.jsonl").write_text("", encoding="utf-8")
            options = {"folder": executed, "limit": limit, "environment": environment | {"BKD_LEDGER": str(book)}}
            with _progress(console, path.stem) as on_cell:
                run = run_notebook(path, parameters=given, **options, on_cell=on_cell)
            after, used[path.stem] = _figures(figures), ledger.read(book)
            run = replace(run, figures=[name for name in after if before.get(name) != after[name]], gflops=gflops)
            if run.status == "ok" and publish:
                publishing.publish_notebook(executed / path.name, path, figures=figures, names=run.figures)
        except (OSError, NotebookError) as error:  # a full disk, or a notebook that was edited; the others go on
            minutes = round((time.monotonic() - began) / 60, 2)
            run = replace(run, minutes=minutes, status="failed", reason=str(error), gflops=gflops)
        runs.append(run)
    entries = [{key: asdict(run)[key] for key in RECORDED} for run in runs]
    record = {"profile": profile, "machine": machine(), "started": started, "notebooks": entries, "commit": commit()}
    report(runs, used, console, folder=executed)
    passed = [run.name for run in runs if run.status == "ok"]
    try:
        write_json(WORK / "run.json", record)
        if publish:
            publishing.publish_measurements({name: used[name] for name in passed}, kept=kept)
            write_json(FIGURES / "run.json", merged(record, FIGURES / "run.json"))
            if (figures / "scorecard.json").is_file():
                lines = scorecard.merged(read_json(figures / "scorecard.json"), FIGURES / "scorecard.json")
                write_json(FIGURES / "scorecard.json", lines)
            recording.record_live([path for path in paths if path.stem in passed])
            recording.record_hashes()
        for name in passed:
            ledger.finish(ledgers / f"{name}.jsonl")
    except OSError as error:
        raise files.UserError(f"the record of the run could not be written: {error}") from error
    return runs


def is_published(profile: str, options: Mapping[str, Any]) -> bool:
    """Is this the run whose results are committed, by its profile and its `model`, `seed` and `retrain`?"""
    return (profile, options["model"], options["seed"], options["retrain"]) == ("laptop", DEFAULT_MODEL, 0, False)


def merged(record: dict[str, Any], published: Path) -> dict[str, Any]:
    """The record of this run, with the published entries of notebooks that it did not run."""
    kept = read_json(published)["notebooks"] if published.is_file() else []
    entries = {entry["name"]: entry for entry in [*kept, *record["notebooks"]]}
    return record | {"notebooks": [entries[name] for name in sorted(entries)]}


def _figures(folder: Path) -> dict[str, str]:
    """Figure id -> hash of its picture and of the time it was written."""
    paths = [path for path in sorted(folder.glob("*.json")) if path.with_suffix(".png").is_file()]
    return {path.stem: f"{sha256_file(path)} {path.stat().st_mtime_ns}" for path in paths}


@contextmanager
def _progress(console: Console, name: str) -> Iterator[Callable[[int, int], None]]:
    """How many cells are done: live on a terminal, elsewhere a line a minute."""
    console.print(f"running {name}")
    printed = time.monotonic()
    with console.status(name) as status:

        def tell(done: int, total: int) -> None:
            nonlocal printed
            status.update(line := f"{name}: {done} of {total} cells")
            if not console.is_terminal and time.monotonic() - printed > 60:
                printed = time.monotonic()
                console.print(f"  {line}")

        yield tell


def report(runs: list[Run], used: dict[str, Used], console: Console, *, folder: Path) -> None:
    """Print a table of notebooks with minutes, memory, measurements and figures, and the reason of every failure."""
    table = Table("notebook", "minutes", "peak GiB", "shipped", "checked", "stale", "measured", "figures", "status")
    pace = [run.gflops["bf16"] for run in runs if run.gflops]
    for run in runs:
        colour = "green" if run.status == "ok" else "red"
        own = used.get(run.name, Used())
        counts = [len(each) for each in (own.shipped, own.checks, own.stale, own.own, run.figures)]
        numbers = (f"{run.minutes:.1f}", f"{run.peak_gib:.1f}", *(str(count or "") for count in counts))
        table.add_row(run.name, *numbers, f"[{colour}]{run.status}[/]")
    console.print(table)
    for run in runs:
        if run.reason:
            console.print(f"{run.name} failed: {run.reason}", markup=False, style="red")
            if (copy := folder / f"{run.name}.failed.ipynb").is_file():
                console.print(f"  the notebook up to the error: {copy}", markup=False, soft_wrap=True)
    passed = sum(run.status == "ok" for run in runs)
    console.print(f"{passed} passed, {len(runs) - passed} failed; figures in {folder.parents[2] / 'figures'}")
    for line in ledger.summary(list(used.values())):
        console.print(line, markup=False, soft_wrap=True)
    if pace:
        console.print(f"{machine()}; bf16 products at {min(pace)} to {max(pace)} GFLOP/s, by which minutes compare")


def speed(width: int = 1024, tries: int = 5) -> dict[str, int]:
    """GFLOP/s of square products on the processor, best of several tries, by which minutes of runs can be compared."""
    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        multiply = partial(product, *torch.rand(2, width, width, dtype=kind))
        with torch.inference_mode():
            seconds = timeit.repeat(multiply, timer=time.perf_counter, repeat=tries, number=1)
        found[name] = round(2 * width**3 / min(seconds) / 1e9)
    return found


def machine() -> str:
    """Cores, memory and accelerator, without any name that would identify the machine."""
    memory = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{psutil.cpu_count()} cores, {memory:.0f} GiB, {gpu}"
