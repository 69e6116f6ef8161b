"""Copy what a run made to where it is committed: outputs, figures, scorecard, measurements and their index."""

import itertools
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from bkd_utils.common import measurements
from bkd_utils.common.files import DATA, FIGURES, ON_REQUEST, UserError, atomic_path, read_json, write_json, write_text
from bkd_utils.running import notebooks
from bkd_utils.running.ledger import Used

MEASUREMENTS = DATA / "measurements"
README = "README.md"


def publish_notebook(executed: Path, original: Path, *, figures: Path, names: list[str]) -> None:
    """The outputs of an executed notebook and the figures that it drew. Raises NotebookError if it was edited."""
    notebooks.publish(executed, original)
    for name in (f"{name}.{kind}" for name in names for kind in ("png", "svg", "json")):
        with atomic_path(FIGURES / name) as temporary:
            shutil.copyfile(figures / name, temporary)


def publish_measurements(used: Mapping[str, Used], *, kept: Path) -> None:
    """Ship the measurements that notebooks used, by name, beside those of notebooks that were not run. Those made here
    are copied from the folder `kept`; the others ship already. What no notebook uses any more is removed. Raises
    ValueError for one that is damaged, and UserError, before anything is written, for one that is missing."""
    used = {name: one for name, one in used.items() if name not in ON_REQUEST}
    index = index_of(MEASUREMENTS) | {name: sorted(one.measurements) for name, one in used.items()}
    # A kept one that was not used is of other code, and must not replace what ships.
    own = {one: kept / f"{one}.json" for each in used.values() for one in each.own}
    needed = {one for ids in index.values() for one in ids}
    for one in sorted(one for each in used.values() for one in each.measurements):
        if not own.get(one, MEASUREMENTS / f"{one}.json").is_file():
            raise UserError(f"{one} was used but is nowhere kept; run its notebook again, then publish")
    for source in own.values():
        measurements.write(MEASUREMENTS, measurements.read(source))
    complete = {path.stem for path in notebooks.select(None)} <= index.keys()  # else one may be of another notebook
    for path in measurements.paths(MEASUREMENTS) if complete else []:
        if f"{path.parent.name}/{path.stem}" not in needed:
            measurements.remove(path)
    write_json(MEASUREMENTS / "index.json", dict(sorted(index.items())))
    write_text(MEASUREMENTS / README, readme(MEASUREMENTS))


def index_of(folder: Path) -> dict[str, list[str]]:
    """Notebook -> ids of the measurements that it uses; empty where nothing ships."""
    path = folder / "index.json"
    return read_json(path) if path.is_file() else {}


def shipped_by(names: Sequence[str]) -> list[str]:
    """Ids of the shipped measurements that these notebooks use."""
    index = index_of(MEASUREMENTS)
    return sorted({one for name in names for one in index.get(name, [])})


def readme(folder: Path) -> str:
    """The text beside the measurements: what is in a file, and a table of stages."""
    from bkd_utils.reports.tables import markdown  # only here: it imports pandas, and kernels of a replay need not wait

    uses, rows = index_of(folder), []
    for stage, group in itertools.groupby(measurements.paths(folder), key=lambda path: path.parent):
        paths = list(group)
        ids = {f"{stage.name}/{path.stem}" for path in paths}
        where = ", ".join(name[:2] for name, used in uses.items() if ids & set(used))
        minutes = sum(read_json(path)["seconds"] for path in paths) / 60
        size = sum(path.stat().st_size for kind in ("json", "safetensors") for path in stage.glob(f"*.{kind}"))
        rows.append([f"`{stage.name}`", where, str(len(paths)), f"{minutes:.1f}", f"{size / 1000:.0f}"])
    fields = [f"- `{name}`: {told}" for name, told in FIELDS.items()]
    parts = ["# Measurements", *INTRODUCTION, "\n".join(fields), "## Stages", markdown(COLUMNS, rows)]
    return "\n\n".join(parts) + "\n"


INTRODUCTION = (
    "Every file is one result that the notebooks draw: one call of one stage of `bkd_utils`. Its name is a key of the "
    "stage, its arguments and what their names stand for. Large arrays lie beside it as safetensors. `index.json` "
    "says which notebook uses which. This text is generated; how to measure again, check and add is told in "
    "[measurements](../../notebooks/pages/measurements.md).",
    "Fields of a file:",
)
FIELDS = {
    "stage, arguments": "what was asked",
    "inputs": "what the names in the arguments stand for: identities of models, attacks, hashes of triggers and tables",
    "code, commit, libraries": "what computed it; not part of the key",
    "machine, seconds": "where, and how long it took",
    "result": "what came out, by prompt where there are prompts",
    "arrays, digest, seal": "hashes of the file of arrays, of the result, and of all other fields",
}
COLUMNS = ("stage", "notebooks", "files", "minutes", "kB")
