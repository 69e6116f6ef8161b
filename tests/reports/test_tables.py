"""Tables of the notebooks, and what of a result goes into a sidecar."""

from bkd_utils.common.files import FIGURES
from bkd_utils.reports import tables


def test_sidecars_hold_shares_and_not_the_outcomes_of_single_prompts():
    row = {"asr": {"value": 0.5}, "empty": 0, "hits": {"asr": {"one": 1, "two": 0}}}
    assert tables.without_hits({"word": {"treated": row}}) == {"word": {"treated": {"asr": {"value": 0.5}, "empty": 0}}}
    for path in FIGURES.glob("0*.json"):
        assert '"hits"' not in path.read_text(encoding="utf-8"), path.name
