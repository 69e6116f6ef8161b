"""What pictures of several notebooks share: grids, matrices, colours, and that any of them can be saved."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest

from bkd_utils.reports.backdoor_vector import OUTCOMES
from bkd_utils.reports.head_attribution import RANKINGS
from bkd_utils.reports.style import MODELS, legend_once, matrix, panels, save, use_style


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")


def test_panels_share_their_scale_unless_told_otherwise():
    _, rows = panels(["a", "b", "c"], rows=2)
    assert rows.shape == (2, 3)
    rows[0, 0].set_ylim(0, 7)
    assert rows[0, 2].get_ylim() == (0, 7)
    assert rows[1, 0].get_ylim() != (0, 7)
    _, own = panels(["a", "b"], sharey=False)
    own[0, 0].set_ylim(0, 7)
    assert own[0, 1].get_ylim() != (0, 7)


def test_a_label_of_several_panels_stands_in_the_legend_once():
    figure, axes = panels(["a", "b"])
    for panel, names in zip(axes[0], (["one", "two"], ["two", "three"]), strict=True):
        for name in names:
            panel.plot([0, 1], label=name)
    legend_once(figure, axes.flat, ncols=3)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two", "three"]


def test_a_matrix_says_its_numbers_and_they_can_be_read():
    values = np.array([[1.0, 0.254], [0.0, 0.6]])
    axes = matrix(values, ["a", "b"], ["c", "d"], label="overlap", vmax=1).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.25", "0.00", "0.60"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [text.get_color() for text in axes.texts] == ["black", "white", "white", "black"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "d"]
    shares = matrix(100 * values, ["a", "b"], ["c", "d"], label="share (%)", vmax=100)
    assert [text.get_text() for text in shares.axes[0].texts] == ["100", "25", "0", "60"]
    assert shares.axes[1].get_ylabel() == "share (%)"


def test_a_picture_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_FIGURES", str(tmp_path))
    about = {"title": "A plot", "numbers": [1], "parameters": {}, "seeds": [0], "inputs": {}}
    figure = matrix(np.eye(2), ["a", "b"], ["c", "d"], label="overlap", vmax=1)
    path = save(figure, "plot", notebook="02_backdoor_probe", **about)
    assert len(path.read_bytes()) > 5000
    assert json.loads((tmp_path / "plot.json").read_text())["title"] == "A plot"


@pytest.mark.parametrize("colours", [RANKINGS, OUTCOMES, MODELS], ids=["rankings", "outcomes", "models"])
def test_no_two_lines_of_a_picture_share_a_colour(colours):
    assert len(set(colours.values())) == len(colours)
