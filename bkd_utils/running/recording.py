"""Keep on record what cannot be made again without a model: outputs of live cells, and files that training wrote."""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from bkd_utils.common.files import ADAPTERS, DATA, FIGURES, read_json, sha256_file, write_json
from bkd_utils.running import notebooks
from bkd_utils.running.comparing import content
from bkd_utils.running.replaying import code_cells, is_live

LIVE_OUTPUTS = "live_outputs.json"  # in `figures`
HASHES = "hashes.json"  # in `data`


def live_outputs(path: Path) -> dict[str, Any]:
    """Number of a live cell -> its outputs; name -> content or hash of a figure that such a cell saves."""
    found: dict[str, Any] = {"cells": {}, "figures": {}}
    for number, cell in enumerate(code_cells(notebooks.read(path)), start=1):
        if is_live(cell):
            found["cells"][str(number)] = [_output(one) for one in cell.outputs]
            for name in _saved(cell.source):
                found["figures"] |= {file.name: _file(file) for file in sorted(FIGURES.glob(f"{name}.*"))}
    return found


def _output(output: NotebookNode) -> dict[str, Any]:
    """Format -> text, or the hash of a picture."""
    return {
        kind: value if isinstance(value, str) else f"sha256 {hashlib.sha256(value).hexdigest()}"
        for kind, value in content(output).items()
    }


def _saved(source: str) -> list[str]:
    """Ids of the figures that a cell writes, known by the call."""
    return re.findall(r"style\.save\(\s*\w+,\s*\"(\w+)\"", source)


def _file(path: Path) -> Any:
    return read_json(path) if path.suffix == ".json" else sha256_file(path)


def made_files() -> list[Path]:
    """Files in `data` that a program made and that do not hold a hash of themselves, as measurements do."""
    cards = [path for name in ("card.json", "history.json") for path in ADAPTERS.glob(f"*/{name}")]
    return sorted([*cards, *(DATA / "answers").glob("*.json")])


def record() -> None:
    """Put on record everything that is stored now: `record_live` of all notebooks, and `record_hashes`."""
    record_live(notebooks.all_notebooks())
    record_hashes()


def record_live(paths: Iterable[Path]) -> None:
    """Write the live outputs of these notebooks, as they are stored now, into `figures/live_outputs.json`. Those of
    other notebooks stay on record."""
    target = FIGURES / LIVE_OUTPUTS
    known = read_json(target) if target.is_file() else {}
    known |= {path.stem: live_outputs(path) for path in paths}
    write_json(target, dict(sorted(known.items())))


def record_hashes() -> None:
    """Write the hashes of `made_files` into `data/hashes.json`."""
    write_json(DATA / HASHES, {path.relative_to(DATA).as_posix(): sha256_file(path) for path in made_files()})
