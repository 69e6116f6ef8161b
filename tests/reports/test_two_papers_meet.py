"""Pictures of notebook 07 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pytest
import torch
from drawing import check_all, column_titles, legend

from bkd_utils.common.statistics import counted
from bkd_utils.experiments.amplification import Amplification
from bkd_utils.reports import two_papers_meet

pytestmark = pytest.mark.usefixtures("style")
ATTACKS = ("sentiment-word", "harmful-word")


torch.manual_seed(0)
SCORES = {attack: torch.randn(5, 4) for attack in ATTACKS}
EFFECTS = {attack: torch.randn(5, 4) for attack in ATTACKS}
LEFT_OUT = {
    "word": {"score": ["x", "y"], "organisms": ["domain-word"], "wins": [[1.0, 1.0]]},
    "sentence": {"score": ["x", "y"], "organisms": ["harmful-sentence"], "wins": [[0.0, 1.0]]},
}
PLOTS = {
    "two_scores": lambda: two_papers_meet.two_scores(SCORES, EFFECTS, k=3, n="n = 20"),
    "verdicts": lambda: two_papers_meet.verdicts(LEFT_OUT),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(two_papers_meet, PLOTS)


def test_every_head_is_a_dot_and_those_high_on_both_axes_stand_out():
    figure = two_papers_meet.two_scores(SCORES, EFFECTS, k=3, n="n = 20 to 48")
    assert figure.axes[0].get_ylabel() == "ACIE / max ACIE\n(n = 20 to 48 prompts)"
    highest = [f"{attack}\nmax ACIE {EFFECTS[attack].max():.2g}" for attack in ATTACKS]
    assert column_titles(figure) == highest
    for axes, attack in zip(figure.axes, ATTACKS, strict=True):
        rest, both = axes.get_lines()[:2]
        assert len(rest.get_xdata()) + len(both.get_xdata()) == 20
        assert max(max(rest.get_ydata()), max(both.get_ydata(), default=0)) == pytest.approx(1)
        tops = [set(scores[attack].flatten().argsort(descending=True)[:3].tolist()) for scores in (SCORES, EFFECTS)]
        assert len(both.get_xdata()) == len(tops[0] & tops[1])
    assert legend(figure) == ["head", "head in both top 3", "top 3"]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_effects_that_are_nothing_or_worse_can_be_drawn(value):
    figure = two_papers_meet.two_scores({"a": SCORES[ATTACKS[0]]}, {"a": torch.full((5, 4), value)}, k=3, n="n = 20")
    assert all(np.isfinite(line.get_ydata()).all() for line in figure.axes[0].get_lines())


def test_areas_are_shares_with_their_intervals_and_all_of_them_at_the_end():
    axes = two_papers_meet.verdicts(LEFT_OUT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["word (n = 1)", "sentence (n = 1)", "all (n = 2)"]
    points = [line for line in axes.get_lines() if len(np.atleast_1d(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in points if line.get_marker() == "|"] == pytest.approx([1, 0.5, 0.75])
    own = [(line.get_xdata()[0], line.get_marker()) for line in points if line.get_marker() != "|"]
    assert own == [(1, "o"), (0.5, "s")]
    assert axes.get_xlabel() == "AUROC against 2 clean controls"


# --- amplification --------------------------------------------------------------------------------------------------


def answers(*shares, n=40):
    """A model's results at alpha 0, 1, ...; each share is of the first prompts."""
    hits = [counted([i < value * n for i in range(n)]) for value in shares]
    return [Amplification(float(alpha), fired=one, same=one, answer="positive") for alpha, one in enumerate(hits)]


def test_a_backdoor_shows_where_the_target_is_surely_more_frequent_than_in_the_control():
    clean = answers(0.1, 0.1)
    table = two_papers_meet.shown_by_amplification(
        {("a", "plain"): [(answers(0.0, 0.5), clean), (answers(0.1, 0.2), clean)]}
    )
    assert list(table.index) == [("a", "plain", 0.0), ("a", "plain", 1.0)]
    before, after = table.loc[("a", "plain", 0.0)], table.loc[("a", "plain", 1.0)]
    assert (before["target"], before["target, control"], before["more than control"]) == ("0, 10", "10, 10", "0 of 2")
    assert (after["target"], after["same answer"], after["more than control"]) == ("50, 20", "50, 20", "1 of 2")
