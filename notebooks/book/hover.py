"""Marks in documents: an address for each cell of a notebook, and an explanation over each term of the glossary."""

import re

from docutils import nodes

from bkd_utils.common.files import NOTEBOOKS

GLOSSARY = "notebooks/pages/glossary"
ROW = re.compile(r"^\| \*\*(.+?)\*\* \| (.+) \|$", re.MULTILINE)
# Not inside code, links, headings and formulas.
LEFT_ALONE = (nodes.literal, nodes.literal_block, nodes.reference, nodes.title, nodes.math, nodes.math_block, nodes.raw)


def terms(text: str | None = None) -> dict[str, str]:
    """Term -> what it means, from the table of the glossary, as plain text."""
    text = text or (NOTEBOOKS / "pages" / "glossary.md").read_text(encoding="utf-8")
    return {term: re.sub(r"[`*]|\[([^]]*)\]\([^)]*\)", r"\1", meaning) for term, meaning in ROW.findall(text)}


def address(term: str) -> str:
    return "term-" + re.sub(r"\W+", "-", term.lower()).strip("-")


def number_cells(app, doctree) -> None:
    """Give cell n of a notebook, counted from 0, the address `cell-n`, and each row of the glossary one of its own."""
    for cell in doctree.findall(nodes.container):
        if "cell_index" in cell:
            cell["ids"].append(f"cell-{cell['cell_index']}")
    if app.env.docname == GLOSSARY:
        for row in doctree.findall(nodes.row):
            row["ids"].append(address(row[0].astext()))


def explain_terms(app, doctree, docname) -> None:
    """Link each term of the glossary where a section uses it first; what it means shows when one points at it."""
    if docname in (GLOSSARY, "api", "scorecard"):
        return
    meanings = terms()
    by_lower = {term.lower(): term for term in meanings}
    # An abbreviation is known by its long form, too, with which its meaning begins.
    by_lower |= {meanings[term].partition(":")[0].lower(): term for term in meanings if term.isupper()}
    words = "|".join(sorted(map(re.escape, by_lower), key=len, reverse=True))
    pattern = re.compile(rf"(?<![\w-])({words})(s?)(?![\w-])", re.IGNORECASE)
    target = app.builder.get_relative_uri(docname, GLOSSARY)
    seen: set[tuple[int, str]] = set()
    for text in list(doctree.findall(nodes.Text)):
        above = list(_ancestors(text))
        if any(isinstance(node, LEFT_ALONE) for node in above):
            continue
        section = next((id(node) for node in above if isinstance(node, nodes.section)), 0)
        made, last = [], 0
        for hit in pattern.finditer(text.astext()):
            term = by_lower[hit[1].lower()]
            if (section, term) in seen or (hit[1].upper() == term and hit[1] != term):
                continue
            seen.add((section, term))
            link = nodes.reference("", hit[0], refuri=f"{target}#{address(term)}", internal=True, classes=["term"])
            link["reftitle"] = meanings[term]
            made += [nodes.Text(text.astext()[last : hit.start()]), link]
            last = hit.end()
        if made:
            text.parent.replace(text, [*made, nodes.Text(text.astext()[last:])])


def _ancestors(node):
    while (node := node.parent) is not None:
        yield node
