"""Write the source folder of the book: laid out like the repository, so that links between documents lead on."""

import re
import shutil
from pathlib import Path

import gallery
import nbformat
import play
import public_names
import verdicts
from cards import cards

from bkd_utils.common.files import FIGURES, NOTEBOOKS, ROOT
from bkd_utils.running.notebooks import all_notebooks

PAGES = NOTEBOOKS / "pages"
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")
THUMBNAIL = 640  # pixels wide
FOLDED = {"mystnb": {"code_prompt_show": "Show the set-up", "code_prompt_hide": "Hide the set-up"}}


def write(folder: Path, config) -> None:
    """Fill the empty `folder` with documents, and point Sphinx's `config` to the files that are copied as they are."""
    kept = folder / "extra"
    (folder / "notebooks" / "pages").mkdir(parents=True)
    figures = cards()
    for path in all_notebooks():
        notebook = folded(nbformat.reads(to_index(path.read_text(encoding="utf-8")), as_version=4))
        nbformat.write(notebook, folder / "notebooks" / path.name)
        copy_linked(path.parent, "\n".join(cell.source for cell in notebook.cells), folder)
    for path in PAGES.glob("*.md"):
        text = to_index(path.read_text(encoding="utf-8"))
        (folder / "notebooks" / "pages" / path.name).write_text(text, encoding="utf-8")
        copy_linked(path.parent, text, folder)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    copy_linked(ROOT, readme, folder)
    copy_figures(figures, kept / "figures")
    play.write_data(kept / "play")
    for name, made in {
        "index": front_page(readme),
        "gallery": gallery.page(figures),
        "scorecard": verdicts.page(),
        "play": play.page(),
        "api": public_names.page(),
    }.items():
        (folder / f"{name}.md").write_text(made, encoding="utf-8")
    config.exclude_patterns = ["extra", "trees"]
    config.html_extra_path = [str(kept)]


def copy_linked(where: Path, text: str, folder: Path) -> None:
    """Copy the files of the repository that the Markdown of a document in `where` links to or shows, notebooks and
    pages aside, to the same places below `folder`."""
    for one, other in LINK.findall(text):
        path = (where / (one or other).partition("#")[0]).resolve()
        if path.is_file() and path.is_relative_to(ROOT) and path.suffix != ".ipynb" and path.parent != PAGES:
            target = folder / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix != ".md":
                shutil.copyfile(path, target)
            elif not target.is_file() and path != ROOT / "README.md":  # a document, with links of its own
                linked = to_index(path.read_text(encoding="utf-8"))
                target.write_text(linked, encoding="utf-8")
                copy_linked(path.parent, linked, folder)


def to_index(text: str) -> str:
    """The README is the front page, which a book calls index."""
    return re.sub(r"\]\(((?:\.\./)*)README\.md", r"](\1index.md", text)


def folded(notebook):
    """The notebook with its set-up folded: the cells before the second text that show nothing, and those that only save
    a figure. The parameters stay in sight."""
    texts = 0
    for cell in notebook.cells:
        texts += cell.cell_type == "markdown"
        tags = cell.metadata.setdefault("tags", [])
        if cell.cell_type != "code" or cell.outputs or "parameters" in tags:
            continue
        if texts < 2 or "style.save(" in cell.source:
            tags.append("hide-input")
            cell.metadata |= FOLDED
    return notebook


def copy_figures(figures, folder: Path) -> None:
    """Every figure whole, its numbers, and a small picture of it."""
    from PIL import Image

    folder.mkdir(parents=True)
    for card in figures:
        for suffix in ("png", "json"):
            shutil.copyfile(FIGURES / f"{card.id}.{suffix}", folder / f"{card.id}.{suffix}")
        with Image.open(FIGURES / f"{card.id}.png") as picture:
            small = picture.convert("RGB")
            small.thumbnail((THUMBNAIL, 4 * THUMBNAIL))
            small.save(folder / f"{card.id}.small.png", optimize=True)
    shutil.copyfile(FIGURES / "scorecard.json", folder / "scorecard.json")


def front_page(readme: str) -> str:
    """The README, with the way into the book behind its picture, and the list of all documents for the side."""
    way_in = (
        "**New here?** Begin with [Start here](notebooks/00_start_here.ipynb), look through all [figures](gallery.md), "
        "move a slider in the [figures to play with](play.md), or sort the [scorecard](scorecard.md)."
    )
    parts = readme.split("\n\n")
    picture = next(number for number, part in enumerate(parts) if part.startswith("!["))
    pages = sorted(f"notebooks/pages/{path.name}" for path in PAGES.glob("*.md") if path.stem != "glossary")
    lists = {
        "Look": ["play.md", "gallery.md", "scorecard.md"],
        "Read": [f"notebooks/{path.name}" for path in all_notebooks()],
        "Look up": ["notebooks/pages/glossary.md", "api.md", *pages],
    }
    trees = [
        "\n".join(["```{toctree}", ":hidden:", f":caption: {name}", "", *made, "```"]) for name, made in lists.items()
    ]
    return "\n\n".join([*parts[: picture + 1], way_in, *parts[picture + 1 :], *trees]) + "\n"
