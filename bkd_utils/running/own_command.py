"""The command `report`: ask about a user's own model, show how far it is, write the page."""

import json
import logging
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bkd_utils.common.files import UserError, check_writable, write_text

Trigger = Annotated[
    str | None, typer.Option(help="word:TEXT, sentence:TEXT, prefix:TEXT, or a table of lexicons.toml.")
]
Data = Annotated[Path | None, typer.Option(help="CSV: text and label, or text and answer.", dir_okay=False)]
File = Annotated[Path | None, typer.Option(help="TOML file with one table, the attack.", dir_okay=False)]
Folder = Annotated[Path | None, typer.Option(exists=True, file_okay=False, help="LoRA folder; none is trained.")]


def report(
    out: Annotated[Path, typer.Option(help="Folder of the page, as reports/mine.")],
    model: Annotated[str, typer.Option(help="Packaged name, hub id, or path of a folder.")] = "smollm2-135m-instruct",
    data: Data = None,
    attack: File = None,
    trigger: Trigger = None,
    target: Annotated[str | None, typer.Option(help="With --trigger: the answer that it causes.")] = None,
    adapter: Folder = None,
    recipe: Annotated[str, typer.Option(help="A table of data/recipes.toml.")] = "full",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Run the whole chain on your own model, trigger and rows: 7 to 21 minutes, one page. Goes on where it was
    stopped. Without --attack and --trigger the model or its adapter may have a backdoor of unknown trigger."""
    from bkd_utils.experiments import own_chain
    from bkd_utils.reports import own_page

    console = Console()
    check_writable(out)
    asked = question(out, model=model, data=data, attack=attack, trigger=trigger, target=target, adapter=adapter,
                     recipe=recipe, seed=seed, device=device)  # fmt: skip
    logging.getLogger("bkd_utils").setLevel(logging.WARNING)
    started, sections = time.monotonic(), []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("left"))
    with Progress(*columns, TimeRemainingColumn(), console=console) as bar:
        steps = list(own_chain.chain(asked))
        todo = bar.add_task("", total=sum(minutes for _, minutes, _ in steps))
        for id, minutes, measure in steps:
            bar.update(todo, description=own_page.TITLES[id][0])
            sections.append(measure())
            why = sections[-1].skipped
            told = f"{sections[-1].seconds:.0f} s" if why is None else f"skipped: {why}"
            bar.advance(todo, minutes)
            console.print(f"{own_page.TITLES[id][0]}: {told}", markup=False, highlight=False, soft_wrap=True)
    path, _ = own_page.write(asked, sections, folder=out, minutes=(time.monotonic() - started) / 60)
    console.print(f"report in {path}", soft_wrap=True)


def question(
    out: Path, *, model: str, data: Path | None, attack: Path | None, trigger: str | None, target: str | None,
    adapter: Path | None, recipe: str, seed: int, device: str,
):  # fmt: skip
    """What the options ask for. Raises UserError or ValueError for options that do not go together, before anything is
    loaded. An attack by flags is written into the folder as `attack.toml`, to be changed and used again."""
    from bkd_utils.common import assets
    from bkd_utils.experiments import own_question
    from bkd_utils.models.folders import DEFAULT_MODEL, model_folder
    from bkd_utils.models.loading import pick_device
    from bkd_utils.organisms import attacks, tasks, triggers

    if attack and trigger:
        raise UserError("--attack and --trigger: give one of them")
    if bool(trigger) != bool(target):
        raise UserError("--trigger and --target belong together, as --trigger word:cf --target positive")
    for name in (name for name in assets.sources() if name != DEFAULT_MODEL or model == DEFAULT_MODEL):
        assets.fetch(name)
    pick_device(device)
    folder = model_folder(model)
    model = str(folder) if folder == Path(model).expanduser().resolve() else model
    organism, spec = None, attacks.read_attack(attack) if attack else None
    if spec and data and spec.task != tasks.name_of(str(data)):
        raise UserError(f"--data {data} is not the task of {attack}: task = {Path(spec.task).name!r}")
    if spec and not spec.backdoored:
        raise UserError(f"{attack}: an attack needs a trigger; without --attack the trigger counts as unknown")
    if trigger:
        triggers.load_trigger(trigger)
        spec = own_question.own_attack(trigger=trigger, target=target, data=data)
        lines = [f"{key} = {json.dumps(value)}" for key, value in asdict(spec).items() if key != "name" and value]
        write_text(out / "attack.toml", "\n".join([f"[{spec.name}]", *lines, ""]))
    if adapter:
        model, organism, on_card = own_question.given_organism(adapter, model=model)
        spec = spec or on_card
    elif spec is None and data is None:
        raise UserError("nothing to ask: give --trigger and --target, --attack, --adapter, or --data with clean rows")
    task = spec.task if spec else tasks.name_of(str(data) if data else "sentiment")
    tasks.load_task(task)  # a table that cannot be read is told before anything is loaded
    where = {"recipe": recipe, "seed": seed, "device": device, "cured": (out / "cured").absolute()}
    train = spec is not None and adapter is None
    return own_question.Asked(model, task, spec, organism, train=train, **where)
