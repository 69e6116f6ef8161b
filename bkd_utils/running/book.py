"""The book: HTML of all that is committed, by Sphinx; what configures it and writes its pages is in notebooks/book."""

import importlib.util
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from bkd_utils.common.files import CHECKOUT, NOTEBOOKS, WORK, UserError, atomic_path

CONFIGURATION = NOTEBOOKS / "book"
NEEDED = ("sphinx", "myst_nb", "sphinx_book_theme", "sphinx-mathjax-offline", "plotly")


def cards() -> list:
    """Every figure with what the gallery says of it; see `cards` of notebooks/book, which is no part of the package."""
    return runpy.run_path(str(CONFIGURATION / "cards.py"))["cards"]()


def book(out: Annotated[Path, typer.Option(help="Folder of the book, which is replaced.")] = WORK / "book") -> None:
    """Write the committed notebooks, pages and figures as HTML to read, offline; nothing is run."""
    build(out)
    print(f"open {out / 'index.html'}")


def build(out: Path) -> None:
    """Write the book to `out`. Raises UserError without a checkout or without what Sphinx needs, where `out` is another
    folder's content and would be lost, and where Sphinx finds a fault."""
    if not CHECKOUT:
        raise UserError("the book is made of notebooks and figures, which come with a checkout, not with the package")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"the book needs {', '.join(missing)}: ./run_all.sh book, or pip install -e '.[book]'")
    if out.exists() and not (out / "gallery.html").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is no book; name another folder with --out")
    with tempfile.TemporaryDirectory(prefix="bkd-book-") as source, atomic_path(out.absolute()) as target:
        trees = f"{source}/trees"  # outside of the book, which is read from a disk or a server
        options = ["--quiet", "--fail-on-warning", "--keep-going", "-b", "html", "-c", str(CONFIGURATION), "-d", trees]
        if subprocess.call([sys.executable, "-m", "sphinx", *options, source, str(target)]):
            raise UserError("Sphinx could not make the book; the lines above say why")
