"""Every figure with what the book says of it, from the JSON beside it and the notebook that saves it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bkd_utils.common.files import FIGURES, NOTEBOOKS, UserError, read_json
from bkd_utils.running import notebooks

FINDING = re.compile(r"\*\*(?:Finding|What (?:it|the figure) shows)\.\*\*\s+(.*)", re.DOTALL)
SENTENCE = re.compile(r"(?:\([^)]*\.\)\s+)?(.+?[.!?])(?=\s+[A-Z*`(\d]|\s*$)", re.DOTALL)  # a remark in front is skipped


@dataclass(frozen=True)
class Card:
    """A figure in the gallery. `sizes`: the lowest and the highest n behind its numbers; `cell` counts all from 0."""

    id: str
    title: str
    finding: str
    sizes: tuple[int, ...]
    claims: tuple[str, ...]
    notebook: str
    cell: int


def cards(*, figures: Path = FIGURES, folder: Path = NOTEBOOKS) -> list[Card]:
    """Every figure, in the order of the notebooks. Raises UserError for one without a picture, a cell that saves it or
    a finding behind it, and for numbers of another notebook."""
    found = []
    for path in notebooks.all_notebooks(folder=folder):
        cells, own = notebooks.read(path).cells, []
        for file in sorted(figures.glob(f"{path.stem[:2]}_*.json")):
            place, name, given = f"{path.name}, figure {file.stem}", file.stem, read_json(file)
            saving = [i for i, cell in enumerate(cells) if "style.save(" in cell.source and _names(cell.source, name)]
            if (given["id"], given["notebook"]) != (name, path.stem):
                raise UserError(f"{place}: its JSON is that of {given['id']} in {given['notebook']}")
            if not saving or not file.with_suffix(".png").is_file():
                raise UserError(f"{place}: no {'PNG' if saving else 'cell saves it'}")
            counted = sorted({*_sizes(given["parameters"])} or {*_sizes(given["numbers"])})
            sizes = tuple(dict.fromkeys([*counted[:1], *counted[-1:]]))
            own.append(Card(name, given["title"], "", sizes, tuple(given["claims"]), path.stem, saving[0]))
        for card in sorted(own, key=lambda card: card.cell):
            end = min((other.cell for other in own if other.cell > card.cell), default=len(cells))
            behind = (cell.source for cell in cells[card.cell : end] if cell.cell_type == "markdown")
            if not (said := finding("\n\n".join(behind))):
                raise UserError(f"{path.name}, figure {card.id}: no finding before the next figure")
            found.append(replace(card, finding=said))
    return found


def _names(source: str, name: str) -> bool:
    """Does code have the name of a figure in quotes, in whole or with a part in braces?"""
    patterns = (re.sub(r"\\{\w+\\}", r"\\w+", re.escape(one)) for one in re.findall(r'"(\d\d_[\w{}]+)"', source))
    return any(re.fullmatch(pattern, name) for pattern in patterns)


def finding(text: str) -> str | None:
    """The first sentence behind the mark of a finding in Markdown; tables, and what announces one, are left out."""
    if not (marked := FINDING.search(text)):
        return None
    parts = [part for part in marked[1].split("\n\n") if not part.startswith("|") and not part.rstrip().endswith(":")]
    sentence = SENTENCE.match(parts[0].strip()) if parts else None
    return " ".join(sentence[1].split()) if sentence else None


def _sizes(value: Any) -> Iterator[int]:
    """Every number that is called n, however deep, and those in a table of this name."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else []):
        if key == "n":
            yield from inner.values() if isinstance(inner, dict) else [inner]
        else:
            yield from _sizes(inner)
