"""Keep on record what cannot be made again without a model: outputs of live cells, and files that training wrote."""

import re
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any

from bkd_utils.common.files import ADAPTERS, DATA, FIGURES, read_json, sha256_file, write_json
from bkd_utils.running import notebooks
from bkd_utils.running.comparing import content
from bkd_utils.running.replaying import code_cells, is_live

LIVE_OUTPUTS = "live_outputs.json"  # in `figures`
HASHES = "hashes.json"  # in `data`
SAVES = re.compile(r"style\.save\(\s*\w+,\s*\"(\w+)\"")  # a cell that writes a figure, and the id of that


def live_outputs(path: Path) -> dict[str, Any]:
    """Number of a live cell -> its outputs; name -> content or hash of a figure that such a cell saves."""
    found: dict[str, Any] = {"cells": {}, "figures": {}}
    for number, cell in enumerate(code_cells(notebooks.read(path)), start=1):
        if is_live(cell):
            said = found["cells"][str(number)] = [content(output) for output in cell.outputs]
            for one in said:  # of pictures the hash
                one |= {m: f"sha256 {sha256(v).hexdigest()}" for m, v in one.items() if isinstance(v, bytes)}
            for file in sorted(file for name in SAVES.findall(cell.source) for file in FIGURES.glob(f"{name}.*")):
                found["figures"][file.name] = read_json(file) if file.suffix == ".json" else sha256_file(file)
    return found


def made_files() -> list[Path]:
    """Files in `data` that a program made and that do not hold a hash of themselves, as measurements do."""
    cards = [path for name in ("card.json", "history.json") for path in ADAPTERS.glob(f"*/{name}")]
    return sorted([*cards, *(DATA / "answers").glob("*.json")])


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
