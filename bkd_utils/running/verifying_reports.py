"""Verify reports on a user's own model: page and numbers are made again of what was kept when they were measured.

No model is loaded. What takes seconds to import is imported by the check that needs it."""

import html
import os
import re
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

from bkd_utils.common.files import FIGURES, NOTEBOOKS, read_json
from bkd_utils.running import notebooks
from bkd_utils.running.comparing import Comparison, named, outputs, short
from bkd_utils.running.replaying import code_cells


def check_own_notebook() -> Comparison:
    """The tables of notebook 08 show the numbers beside its figure, which have the ranges of what ships today."""
    from bkd_utils.reports import own_page

    found, path = Comparison("numbers of notebook 08"), FIGURES / "08_own_heads.json"
    with named(found, path):
        card, cells = read_json(path), code_cells(notebooks.read(NOTEBOOKS / f"{read_json(path)['notebook']}.ipynb"))
        tables = re.sub(r">\s+<", "><", "".join(part.get("text/html", "") for cell in cells for part in outputs(cell)))
        for id, numbers in card["numbers"].items():
            for one in numbers:
                place, beside = f"{short(path)}, {id}, {one['name']}", own_page.beside(one["key"], card["parameters"])
                found.values(one["shipped"], beside, place=place, source="cards, scorecard and measurements")
                name, *told = map(html.escape, own_page.shown(one))
                row = f"<th>{name}</th><td>{'</td><td>'.join(told)}</td>"
                if row not in tables and one["unit"] != "yes/no":  # of these it has a table of its own
                    found.wrong(place, f"no table of the notebook has {told}")
    return found


def check_reports(folders: Sequence[Path]) -> Comparison:
    """Every number, word and picture of these reports is what their kept measurements give. Measurements of an earlier
    version of the code count, because a report is about what was measured then."""
    found = Comparison("reports")
    for folder in folders:
        with named(found, folder):
            _check(found, folder)
    return found


def _check(found: Comparison, folder: Path) -> None:
    from bkd_utils.experiments import own_chain, own_question
    from bkd_utils.reports import own_page

    stored, known = read_json(folder / own_page.NUMBERS), read_json(folder / own_page.QUESTION)
    asked, text = own_question.Asked.from_json(known["asked"]), (folder / own_page.PAGE).read_text(encoding="utf-8")
    with patch.dict(os.environ, BKD_REPLAY="1"):
        sections = [measure() for _, _, measure in own_chain.chain(asked, able=known.get("able"))]
    made = own_page.made(asked, sections, minutes=stored["minutes"]) | {"versions": stored["versions"]}
    for old, new in zip(stored["sections"], made["sections"], strict=True):
        new["seconds"] = old["seconds"]
    pictures, words = own_page.pictures_of(text), own_page.IMAGE.sub("", text)
    found.values(stored, made, place=short(folder / own_page.NUMBERS), source="what was measured")
    found.values(words, own_page.page(stored, {}), place=short(folder / own_page.PAGE), source=own_page.NUMBERS)
    found.values(pictures, own_page.pictures(sections), place=f"pictures of {short(folder)}", source="measurements")
