"""Pictures of notebook 07 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pandas as pd
import pytest
import torch
from drawing import check_all, column_titles, legend

from bkd_utils.reports import two_papers_meet

pytestmark = pytest.mark.usefixtures("style")
ATTACKS = ("sentiment-word", "harmful-word")


torch.manual_seed(0)
SCORES = {attack: torch.randn(5, 4) for attack in ATTACKS}
EFFECTS = {attack: torch.randn(5, 4) for attack in ATTACKS}
FAMILIES = {"domain-word": "word", "harmful-sentence": "sentence", "domain-clean": None, "harmful-clean": None}
PRINTS = {name: {f"number {i}": float(i + j) for i in range(9)} for j, name in enumerate(FAMILIES)}
LEFT_OUT = {
    "word": {"score": ["x", "y"], "organisms": ["domain-word"], "wins": [[1.0, 1.0]]},
    "sentence": {"score": ["x", "y"], "organisms": ["harmful-sentence"], "wins": [[0.0, 1.0]]},
}
RULES = ("similar", "similar, little needed")
OPTIONS = pd.DataFrame(
    {
        attack: {
            **{
                f"{reading}: {rule}, {source}": i / 4
                for reading in ("last row", "head outputs")
                for rule in RULES
                for source in ("clean level", "surrogates")
            },
            "importance: gate gradient": 0.5,
        }
        for i, attack in enumerate(ATTACKS)
    }
)
PLOTS = {
    "two_scores": lambda: two_papers_meet.two_scores(SCORES, EFFECTS, k=3),
    "options": lambda: two_papers_meet.options(OPTIONS, k=4, n_heads=32),
    "fingerprints": lambda: two_papers_meet.fingerprints(PRINTS, FAMILIES),
    "verdicts": lambda: two_papers_meet.verdicts(LEFT_OUT),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(two_papers_meet, PLOTS)


def test_every_head_is_a_dot_and_those_high_on_both_axes_stand_out():
    figure = two_papers_meet.two_scores(SCORES, EFFECTS, k=3)
    highest = [f"{attack}\nmax ACIE {EFFECTS[attack].max():.2g}" for attack in ATTACKS]
    assert column_titles(figure) == highest
    for axes, attack in zip(figure.axes, ATTACKS, strict=True):
        rest, both = axes.get_lines()[:2]
        assert len(rest.get_xdata()) + len(both.get_xdata()) == 20
        assert max(max(rest.get_ydata()), max(both.get_ydata(), default=0)) == pytest.approx(1)
        tops = [set(scores[attack].flatten().argsort(descending=True)[:3].tolist()) for scores in (SCORES, EFFECTS)]
        assert len(both.get_xdata()) == len(tops[0] & tops[1])
    assert legend(figure) == ["head", "in both top 3"]


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_effects_that_are_nothing_or_worse_can_be_drawn(value):
    figure = two_papers_meet.two_scores({"a": SCORES[ATTACKS[0]]}, {"a": torch.full((5, 4), value)}, k=3)
    assert all(np.isfinite(line.get_ydata()).all() for line in figure.axes[0].get_lines())


def test_options_have_a_panel_per_reading_and_rule_with_the_heads_found():
    figure = PLOTS["options"]()
    shown = figure.axes[:-1]
    assert len(shown) == 2 * len(RULES) + 1
    assert all([text.get_text() for text in axes.texts] == ["0", "1"] * 2 for axes in shown[:-1])
    assert [text.get_text() for text in shown[-1].texts] == ["2", "2"]
    assert column_titles(figure) == ["similar", "similar,\nlittle needed", "importance only"]
    assert [label.get_text() for label in shown[0].get_yticklabels()] == ["clean level", "surrogates"]
    assert [axes.get_ylabel() for axes in shown if axes.get_ylabel()] == ["last row", "head outputs"]


def test_the_colours_of_options_end_at_the_most_that_was_found_and_chance_is_marked():
    figure = PLOTS["options"]()
    assert figure.axes[0].get_images()[0].get_clim() == (0, 2)
    bar = figure.axes[-1]
    assert [list(line.get_xdata()) for line in bar.get_lines()] == [[0.5, 0.5]]  # 4 of 32 heads, 4 times
    assert bar.get_xlabel() == "heads found, of 4"


def test_options_of_one_reading_and_one_organism_can_be_drawn():
    rows = [name for name in OPTIONS.index if not name.startswith("head outputs")]
    figure = two_papers_meet.options(OPTIONS.loc[rows, [ATTACKS[1]]], k=4, n_heads=32)
    assert len(figure.axes) == len(RULES) + 2


def test_models_stand_in_the_row_of_their_family_with_the_shape_of_their_task():
    figure = PLOTS["fingerprints"]()
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["clean", "sentence", "word"]
    dots = {(line.get_xdata()[0], round(line.get_ydata()[0])): line.get_marker() for line in axes.get_lines()}
    assert dots == {(0.0, 2): "o", (1.0, 1): "s", (2.0, 0): "o", (3.0, 0): "s"}
    assert legend(figure) == ["domain", "harmful"]


def test_areas_are_shares_with_their_intervals_and_all_of_them_at_the_end():
    axes = two_papers_meet.verdicts(LEFT_OUT).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["word (1)", "sentence (1)", "all"]
    points = [line for line in axes.get_lines() if len(np.atleast_1d(line.get_xdata())) == 1]
    assert [line.get_xdata()[0] for line in points if line.get_marker() == "|"] == pytest.approx([1, 0.5, 0.75])
    own = [(line.get_xdata()[0], line.get_marker()) for line in points if line.get_marker() != "|"]
    assert own == [(1, "o"), (0.5, "s")]
