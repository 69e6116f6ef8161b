"""The book: every figure with what is said about it, and HTML of all that is committed, by Sphinx."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bkd_utils.common.files import CHECKOUT, FIGURES, NOTEBOOKS, WORK, UserError, atomic_path, read_json

CONFIGURATION = NOTEBOOKS / "book"
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline", "plotly")
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
    from bkd_utils.running import notebooks  # takes a second, which each command would pay

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


def book(out: Annotated[Path, typer.Option(help="Folder of the book, which is replaced.")] = WORK / "book") -> None:
    """Write the committed notebooks, pages and figures as HTML to read, offline; nothing is run."""
    build(out)
    print(f"open {out / 'index.html'}")


def build(out: Path) -> None:
    """Write the book to `out`. Raises UserError without a checkout or without what Sphinx needs, where `out` is another
    folder's content and would be lost, and where Sphinx finds a fault."""
    if not CHECKOUT:
        raise UserError(
            "the book is made of notebooks and figures, which come with a checkout and not with the package"
        )
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"the book needs {', '.join(missing)}: ./run_all.sh book, or pip install -e '.[book]'")
    if out.exists() and not (out / "gallery.html").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no book; name another folder with --out")
    with tempfile.TemporaryDirectory(prefix="bkd-book-") as source, atomic_path(out.absolute()) as target:
        trees = f"{source}/trees"  # outside of the book, which is read from a disk or a server
        options = ["--quiet", "--fail-on-warning", "--keep-going", "-b", "html", "-c", str(CONFIGURATION), "-d", trees]
        if subprocess.call([sys.executable, "-m", "sphinx", *options, source, str(target)]):
            raise UserError("Sphinx could not make the book; the lines above say why")
