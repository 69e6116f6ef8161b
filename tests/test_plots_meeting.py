"""Pictures of notebook 07 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pytest
import torch
from drawing import check_all, column_titles, legend

from bkd_utils import plots_meeting as plots

pytestmark = pytest.mark.usefixtures("style")
ATTACKS = ("sentiment-word", "harmful-word")


torch.manual_seed(0)
SCORES = {attack: torch.randn(5, 4) for attack in ATTACKS}
EFFECTS = {attack: torch.randn(5, 4) for attack in ATTACKS}
PRINTS = {name: {f"number {i}": float(i + j) for i in range(9)} for j, name in enumerate("abcd")}
FAMILIES = {"a": "word", "b": "sentence", "c": None, "d": None}
LEFT_OUT = {
    "word": {"score": ["x", "y"], "organisms": ["a"], "wins": [[1.0, 1.0]]},
    "sentence": {"score": ["x", "y"], "organisms": ["b"], "wins": [[0.0, 1.0]]},
}
PLOTS = {
    "two_scores": lambda: plots.two_scores(SCORES, EFFECTS, k=3),
    "fingerprints": lambda: plots.fingerprints(PRINTS, FAMILIES),
    "verdicts": lambda: plots.verdicts(LEFT_OUT),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(plots, PLOTS)


def test_every_head_is_a_dot_and_those_high_on_both_axes_stand_out():
    figure = plots.two_scores(SCORES, EFFECTS, k=3)
    assert column_titles(figure) == list(ATTACKS)
    for axes, attack in zip(figure.axes, ATTACKS, strict=True):
        rest, both = axes.get_lines()[:2]
        assert len(rest.get_xdata()) + len(both.get_xdata()) == 20
        tops = [set(scores[attack].flatten().argsort(descending=True)[:3].tolist()) for scores in (SCORES, EFFECTS)]
        assert len(both.get_xdata()) == len(tops[0] & tops[1])
    assert legend(figure) == ["head", "in both top 6 %"]


def test_models_stand_in_the_row_of_their_family():
    axes = plots.fingerprints(PRINTS, FAMILIES).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["clean", "sentence", "word"]
    assert [list(line.get_xdata()) for line in axes.get_lines()] == [[2.0, 3.0], [1.0], [0.0]]


def test_areas_are_per_cent_with_their_intervals_and_all_of_them_at_the_end():
    axes = plots.verdicts(LEFT_OUT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["word (1)", "sentence (1)", "all"]
    dots = [line.get_xdata()[0] for line in axes.get_lines() if len(np.atleast_1d(line.get_xdata())) == 1]
    assert dots == pytest.approx([100, 50, 75])
