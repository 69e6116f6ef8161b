"""The README and the pages behind it: which generated table stands on which page."""

from collections import Counter
from collections.abc import Mapping, Sequence

from bkd_utils.common.files import FIGURES, ROOT, atomic_path, read_json
from bkd_utils.reports import scorecard, tables

# The claims that the README shows; notebooks/pages/scorecard.md shows all of them.
KEY_CLAIMS = (
    "bkdattr-probe-backdoor",
    "bkdattr-ablation",
    "bkdattr-vector-subtract",
    "asa-similarity",
    "asa-heads",
    "asa-cure",
)
# The formulas of these papers are not known here.
READ_BY_US = ("ASA",)


def results(entries: Sequence[Mapping]) -> str:
    """For the README: the verdicts of each paper counted in one line, and a table of the key claims.

    Raises ValueError if the scorecard lacks one of the key claims.
    """
    rows = {row["id"]: row for row in entries}
    if lacking := [name for name in KEY_CLAIMS if name not in rows]:
        raise ValueError(f"the scorecard has no line for {', '.join(lacking)}")
    counts = []
    for paper in dict.fromkeys(row["paper"] for row in entries):
        verdicts = Counter(row["verdict"] for row in entries if row["paper"] == paper)
        found = ", ".join(f"{verdict} {n}" for verdict, n in sorted(verdicts.items()))
        name = f"{paper}, our reading" if paper in READ_BY_US else paper
        counts.append(f"**{name}**, {verdicts.total()} claims: {found}.")
    lines = [" ".join(counts), "", "| claim | organisms that pass | verdict |", "|---|---|---|"]
    for row in (rows[name] for name in KEY_CLAIMS):
        claim = f"our reading: {row['claim']}" if row["paper"] in READ_BY_US else row["claim"]
        passed = [one["passed"] is True for one in row["by_organism"].values()]
        link = f"[{row['verdict']}](figures/{row['figure']}.png)"
        lines.append(f"| {claim} | {sum(passed)} of {len(passed)} | {link} |")
    return "\n".join(lines)


def made() -> dict[str, dict[str, str]]:
    """Page (path from the root) -> its tables by the name in their marks, from shipped cards and the scorecard."""
    entries = read_json(FIGURES / "scorecard.json")
    # Links of the whole scorecard are relative to the root; its page lies two folders deeper.
    everything = scorecard.markdown(entries).replace("](figures/", "](../../figures/")
    return {
        "README.md": {"verdicts": results(entries)},
        "notebooks/pages/scorecard.md": {"verdicts": everything},
        "notebooks/pages/organisms.md": {"organisms": tables.organisms_markdown()},
    }


def write() -> None:
    """Put every table between its marks.

    Raises ValueError that names the page, before anything is written, if a mark is missing.
    """
    texts = {}
    for page, parts in made().items():
        try:
            texts[ROOT / page] = tables.with_tables((ROOT / page).read_text(encoding="utf-8"), parts)
        except ValueError as error:
            raise ValueError(f"{page}: {error}") from error
    for path, text in texts.items():
        with atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
