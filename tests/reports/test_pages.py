"""The README's and pages' generated tables: the right claims, counted right, and no page half written."""

import pytest

from bkd_utils.common import files
from bkd_utils.common.files import read_json
from bkd_utils.reports import pages, tables


def row(name, *, passed, verdict, paper="BkdAttr"):
    number = {"value": 0.5, "n": 9, "low": 0, "high": 1}
    organisms = {f"organism-{i}": {**number, "passed": one} for i, one in enumerate(passed)}
    return {
        "id": name, "paper": paper, "claim": f"Claim {name}.", "verdict": verdict, "by_organism": organisms,
        "figure": "03_ablation", "reading": "our reading" if paper == "ASA" else "",
    }  # fmt: skip


ENTRIES = [
    *[row(n, passed=[True, None, False], verdict="fails") for n in pages.KEY_CLAIMS if n.startswith("bkdattr")],
    row("bkdattr-other", passed=[True], verdict="holds"),
    *[row(n, passed=[None], verdict="undecided", paper="ASA") for n in pages.KEY_CLAIMS if not n.startswith("bkd")],
]


def test_the_verdicts_of_each_paper_are_counted_over_all_claims_and_not_only_over_those_shown():
    counts = pages.results(ENTRIES).splitlines()[0]
    assert counts.startswith("**BkdAttr: 4 claims; 1 holds, 3 fail.** ")
    assert counts.endswith(" **ASA: 3 claims; 3 are undecided.**")


def test_the_readme_shows_the_key_claims_and_what_their_organisms_do():
    shown = pages.results(ENTRIES).splitlines()[4:]
    assert len(shown) == len(pages.KEY_CLAIMS)
    assert (
        shown[0]
        == "| Claim bkdattr-probe-backdoor. | 1 of 3 pass, 1 fail, 1 undecided | [fails](figures/03_ablation.png) |"
    )
    assert (
        shown[-1]
        == "| our reading: Claim encoder-cure. | 0 of 1 pass, 1 undecided | [undecided](figures/03_ablation.png) |"
    )


def test_a_scorecard_without_a_key_claim_is_an_error():
    with pytest.raises(ValueError, match="no line for encoder-cure"):
        pages.results([entry for entry in ENTRIES if entry["id"] != "encoder-cure"])


def test_the_committed_pages_hold_the_tables_of_cards_and_scorecard():
    made = pages.made()
    assert set(made) == {"README.md", "notebooks/pages/scorecard.md", "notebooks/pages/organisms.md"}
    for page, parts in made.items():
        text = (files.ROOT / page).read_text(encoding="utf-8")
        assert tables.with_tables(text, parts) == text, page
    whole = made["notebooks/pages/scorecard.md"]["verdicts"]
    assert all(entry["claim"] in whole for entry in read_json(files.FIGURES / "scorecard.json"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A root with two pages in which the second lacks its marks."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(pages, "made", lambda: {"a.md": {"verdicts": "new"}, "b.md": {"organisms": "new"}})
    start, end = "<!-- verdicts: written by `python -m bkd_utils readme` -->", "<!-- end of verdicts -->"
    (tmp_path / "a.md").write_text(f"Before.\n{start}\nold\n{end}\nAfter.\n")
    (tmp_path / "b.md").write_text("No marks.\n")
    return tmp_path


def test_a_page_without_its_marks_is_an_error_and_nothing_is_written(elsewhere):
    before = {path.name: path.read_text() for path in elsewhere.iterdir()}
    with pytest.raises(ValueError, match=r"b\.md: no mark .<!-- organisms: written by"):
        pages.write()
    assert {path.name: path.read_text() for path in elsewhere.iterdir()} == before


def test_a_table_replaces_what_stood_between_its_marks_and_nothing_else(elsewhere):
    marks = "<!-- organisms: written by `python -m bkd_utils readme` --><!-- end of organisms -->"
    (elsewhere / "b.md").write_text(marks)
    pages.write()
    text = (elsewhere / "a.md").read_text()
    assert "old" not in text
    assert text.startswith("Before.\n<!-- verdicts")
    assert text.endswith("<!-- end of verdicts -->\nAfter.\n")
    assert "\n\nnew\n\n" in (elsewhere / "b.md").read_text()
