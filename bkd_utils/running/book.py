"""The book: every figure with what is said about it, and static HTML of what is committed, which Sphinx makes.

Nothing is executed. `notebooks/book` holds Sphinx's configuration, what writes the pages, and their look."""

import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bkd_utils.common.files import CHECKOUT, FIGURES, NOTEBOOKS, UserError, atomic_path, read_json
from bkd_utils.running import notebooks

CONFIGURATION = NOTEBOOKS / "book"
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline", "plotly")
FINDING = re.compile(r"\*\*(?:Finding|What (?:it|the figure) shows)\.\*\*\s+(.*)", re.DOTALL)
SENTENCE = re.compile(r"(?:\([^)]*\.\)\s+)?(.+?[.!?])(?=\s+[A-Z*`(\d]|\s*$)", re.DOTALL)  # a remark in front is skipped


@dataclass(frozen=True)
class Card:
    """A figure as the gallery shows it. `sizes` are the lowest and the highest number of prompts, rows or models behind
    a number of it, or nothing where it draws no shares; `cell` counts all cells of the notebook from 0."""

    id: str
    title: str
    finding: str
    sizes: tuple[int, ...]
    claims: tuple[str, ...]
    notebook: str
    cell: int


def cards(*, figures: Path = FIGURES, folder: Path = NOTEBOOKS) -> list[Card]:
    """Every figure that a notebook saves, in the order of the notebooks. Raises UserError for one without a picture,
    numbers or a finding, and for numbers that name another notebook."""
    found = []
    for path in notebooks.all_notebooks(folder=folder):
        cells = notebooks.read(path).cells
        saved = [(number, name) for number, cell in enumerate(cells) for name in notebooks.SAVES.findall(cell.source)]
        for (number, name), (end, _) in zip(saved, [*saved[1:], (len(cells), "")], strict=True):
            place = f"{path.name}, figure {name}"
            for file in (figures / f"{name}.json", figures / f"{name}.png"):
                if not file.is_file():
                    raise UserError(f"{place}: {file} is missing")
            given = read_json(figures / f"{name}.json")
            if (given["id"], given["notebook"]) != (name, path.stem):
                raise UserError(f"{place}: its JSON says {given['id']!r} of {given['notebook']!r}")
            said = finding("\n\n".join(one.source for one in cells[number + 1 : end] if one.cell_type == "markdown"))
            if said is None:
                raise UserError(f"{place}: no '**Finding.**' or '**What it shows.**' before the next figure")
            counted = sorted({*_sizes(given["numbers"])} or {*_sizes(given["parameters"])})
            ends = tuple(dict.fromkeys([*counted[:1], *counted[-1:]]))
            found.append(Card(name, given["title"], said, ends, tuple(given["claims"]), path.stem, number))
    return found


def finding(text: str) -> str | None:
    """The first sentence behind the mark of a finding in Markdown, without tables and what only announces one."""
    if not (marked := FINDING.search(text)):
        return None
    parts = [part for part in marked[1].split("\n\n") if not part.startswith("|") and not part.rstrip().endswith(":")]
    sentence = SENTENCE.match(parts[0].strip()) if parts else None
    return " ".join(sentence[1].split()) if sentence else None


def _sizes(value: Any) -> Iterator[int]:
    """Every whole number that is called n, however deep, and every one in a table that is."""
    if isinstance(value, dict):
        for key, inner in value.items():
            if key == "n":
                yield from (one for one in (inner.values() if isinstance(inner, dict) else [inner]) if one)
            else:
                yield from _sizes(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _sizes(inner)


def build(out: Path) -> None:
    """Write the book to the folder `out`, which it replaces. Raises UserError where there is no checkout, where Sphinx
    or what it needs is not installed, where `out` holds something that is no book, and where Sphinx finds a fault."""
    if not CHECKOUT:
        raise UserError("the book is made of notebooks and figures, which come with a checkout and not with the package")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"the book needs {', '.join(missing)}: ./run_all.sh book, or pip install -e '.[book]'")
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not (out / "gallery.html").is_file():
        raise UserError(f"{out} exists and is no book; name another folder with --out")
    with tempfile.TemporaryDirectory(prefix="bkd-book-") as folder, atomic_path(out.absolute()) as temporary:
        source, trees = (Path(folder, name) for name in ("source", "trees"))
        source.mkdir()
        options = ["--quiet", "--fail-on-warning", "--keep-going", "-b", "html", "-c", CONFIGURATION, "-d", trees]
        if subprocess.call([sys.executable, "-m", "sphinx", *map(str, options), str(source), str(temporary)]):
            raise UserError("Sphinx could not make the book; the lines above say why")
