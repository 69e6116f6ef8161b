"""The README and the pages behind it: which generated table stands on which page."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from bkd_utils.common.files import FIGURES, ON_REQUEST, ROOT, read_json, write_text
from bkd_utils.reports import scorecard, tables

# The claims that the README shows; notebooks/pages/scorecard.md shows all of them.
KEY_CLAIMS = ("bkdattr-probe-backdoor", "bkdattr-ablation", "bkdattr-vector-subtract")
KEY_CLAIMS += ("asa-similarity", "asa-heads", "encoder-cure")
# A notebook's row in the README ends in its minutes; on the page of timings in its minutes and GiB.
README_ROW = re.compile(r'^\| <img src="figures/\d\d_.*\]\(notebooks/(.*)\.ipynb\) \|.*\| (\d+) \|$', re.MULTILINE)
TIMINGS_ROW = re.compile(r"^\| (\d\d) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE)


def results(entries: Sequence[Mapping]) -> str:
    """For the README: the verdicts of each paper counted, and a table of the key claims; ValueError if one lacks."""
    rows = {row["id"]: row for row in entries}
    if lacking := [name for name in KEY_CLAIMS if name not in rows]:
        raise ValueError(f"the scorecard has no line for {', '.join(lacking)}")
    papers = dict.fromkeys(row["paper"] for row in entries)
    counts = " ".join(f"**{scorecard.counts(entries, paper=paper)}.**" for paper in papers)
    cells = [[scorecard.named(row), *_judged(row, "")] for row in (rows[name] for name in KEY_CLAIMS)]
    return f"{counts}\n\n{tables.markdown(['claim', 'organisms', 'verdict'], cells)}"


def _judged(row: Mapping, root: str) -> list[str]:
    """How many organisms pass, and the verdict with a link to its figure below `root`."""
    return [scorecard.count(row), f"[{row['verdict']}]({root}figures/{row['figure']}.png)"]


def whole_scorecard(entries: Sequence[Mapping]) -> str:
    """For the page of the scorecard: one line of counts for each paper, then a row for each claim."""
    rows = scorecard.checked(entries)
    judged = {row["paper"] for row in rows}
    papers = [(paper, about["known"]) for paper, about in scorecard.papers().items() if paper in judged]
    counts = "\n".join(f"- **{scorecard.counts(rows, paper=paper)}.** {known}" for paper, known in papers)
    cells = [[scorecard.named(row), row["provenance"].partition(":")[0], *_judged(row, "../../")] for row in rows]
    return f"{counts}\n\n{tables.markdown(['claim', 'known', 'organisms', 'verdict'], cells)}"


def made() -> dict[str, dict[str, str]]:
    """Page (path from the root) -> its tables by the name in their marks, from shipped cards and the scorecard."""
    entries = read_json(FIGURES / "scorecard.json")
    return {
        "README.md": {"verdicts": results(entries)},
        "notebooks/pages/scorecard.md": {"verdicts": whole_scorecard(entries)},
        "notebooks/pages/organisms.md": {"organisms": tables.organisms_markdown()},
    }


def timings() -> dict[str, tuple[dict[str, Any], dict[str, Any]]]:
    """Page -> the minutes and GiB of notebooks that it shows, and those of the committed run, `figures/run.json`."""
    entries = read_json(FIGURES / "run.json")["notebooks"]
    readme, timings = "README.md", "notebooks/pages/timings.md"
    texts = {page: (ROOT / page).read_text(encoding="utf-8") for page in (readme, timings)}
    whole = str(round(sum(entry["minutes"] for entry in entries if entry["name"] not in ON_REQUEST)))
    said = re.findall(r"about (\d+) minutes", texts[readme])
    shown = dict(README_ROW.findall(texts[readme])) | {"all": whole if whole in said else ", ".join(said)}
    measured = {entry["name"]: str(max(1, round(entry["minutes"]))) for entry in entries} | {"all": whole}
    rows = {number: [minutes, gib] for number, minutes, gib in TIMINGS_ROW.findall(texts[timings])}
    run = {entry["name"][:2]: [f"{entry[key]:.1f}" for key in ("minutes", "peak_gib")] for entry in entries}
    return {readme: (shown, measured), timings: (rows, run)}


def write() -> None:
    """Put every table between its marks; ValueError that names the page, before anything is written, if one lacks."""
    texts = {}
    for page, parts in made().items():
        try:
            texts[ROOT / page] = tables.with_tables((ROOT / page).read_text(encoding="utf-8"), parts)
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
    for path, text in texts.items():
        write_text(path, text)
