"""What figures of several notebooks share: grids, heat maps, intervals, bands, legends, and that any can be saved."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from drawing import bands, legend, share

from bkd_utils.reports import style
from bkd_utils.reports.style import COLOURS, save

pytestmark = pytest.mark.usefixtures("style")


def test_panels_share_their_scale_unless_told_otherwise():
    _, rows = style.panels(["a", "b", "c"], rows=2)
    assert rows.shape == (2, 3)
    rows[0, 0].set_ylim(0, 7)
    assert rows[0, 2].get_ylim() == (0, 7)
    assert rows[1, 0].get_ylim() != (0, 7)
    _, own = style.panels(["a", "b"], sharey=False)
    own[0, 0].set_ylim(0, 7)
    assert own[0, 1].get_ylim() != (0, 7)


def test_a_legend_has_every_label_once_and_names_intervals_and_bands():
    figure, axes = style.panels(["a", "b"])
    for panel, names in zip(axes[0], (["one", "two"], ["two", "three"]), strict=True):
        for name in names:
            panel.plot([0, 1], label=name)
    style.show_legend(figure, ncols=3, bars="95 % interval", bands=["range over draws"])
    assert legend(figure) == ["one", "two", "three", "95 % interval", "range over draws"]


def test_sizes_are_one_number_or_a_range():
    assert style.sizes([share(0.5, 12), share(0.1, 12)]) == "n = 12"
    assert style.sizes([share(0.5, 24), share(0.5, 12)]) == "n = 12 to 24"


@pytest.mark.parametrize("upright", [False, True])
def test_an_interval_is_a_dot_on_a_bar_in_per_cent(upright):
    axes = plt.subplots()[1]
    style.interval(axes, 3, share(0.5), colour="random", label="x", mfc="white", upright=upright)
    along, across = ("get_ydata", "get_xdata") if upright else ("get_xdata", "get_ydata")
    bar, dot = axes.get_lines()
    assert list(getattr(bar, along)()) == pytest.approx([40, 60])
    assert list(getattr(dot, along)()) == pytest.approx([50])
    assert {*getattr(bar, across)(), *getattr(dot, across)()} == {3}
    assert (dot.get_color(), dot.get_markerfacecolor(), dot.get_label()) == (COLOURS["random"], "white", "x")
    assert axes.get_legend_handles_labels()[1] == ["x"]


def test_an_interval_can_have_another_scale():
    axes = plt.subplots()[1]
    style.interval(axes, 0, share(0.5), colour="random", scale=1)
    assert list(axes.get_lines()[0].get_xdata()) == pytest.approx([0.4, 0.6])


def test_a_band_reaches_from_low_to_high_around_its_line():
    axes = plt.subplots()[1]
    style.band(axes, [0, 1], [[2, 3], [1, 1], [4, 5]], colour="ACIE", label="x", ls="--")
    (line,) = axes.get_lines()
    assert (list(line.get_ydata()), line.get_linestyle(), line.get_color()) == ([2, 3], "--", COLOURS["ACIE"])
    assert bands(axes) == [(1, 5)]


def test_row_0_of_a_heat_map_is_at_the_bottom_unless_it_is_a_table():
    values = np.array([[1.0, 0.25], [0.0, 0.6]])
    _, axes = style.panels(["a", "b"])
    for panel, upwards in zip(axes[0], (True, False), strict=True):
        mesh = style.heat_map(panel, values, vmin=0, vmax=2, rows=[0, 1], columns=["c", "d"], upwards=upwards)
        assert np.array_equal(mesh.get_array(), values)
        assert mesh.get_clim() == (0, 2)
    _, own = style.panels(["a", "b"], sharey=False)
    style.heat_map(own[0, 0], values, vmin=0, vmax=2, rows=[0, 1], columns=["c", "d"])
    style.heat_map(own[0, 1], values, vmin=0, vmax=2, rows=["a", "b"], columns=["c", "d"], upwards=False)
    assert [panel.get_ylim() for panel in own[0]] == [(0, 2), (2, 0)]
    assert [label.get_text() for label in own[0, 1].get_yticklabels()] == ["a", "b"]
    assert list(own[0, 1].get_yticks()) == [0.5, 1.5]


def test_of_many_layers_some_are_labelled_at_their_own_place_and_of_names_all():
    axes = plt.subplots()[1]
    names = [f"name {i}" for i in range(12)]
    style.heat_map(axes, np.zeros((30, 12)), vmin=0, vmax=1, rows=range(30), columns=names)
    labels = {label.get_text(): place for label, place in zip(axes.get_yticklabels(), axes.get_yticks(), strict=True)}
    assert labels == {"0": 0.5, "6": 6.5, "12": 12.5, "18": 18.5, "24": 24.5}
    assert [label.get_text() for label in axes.get_xticklabels()] == names


def test_a_heat_map_writes_what_it_is_told_into_its_cells():
    axes = plt.subplots()[1]
    texts = np.array([["a", "b"]])
    style.heat_map(axes, np.array([[0.0, 1.0]]), vmin=0, vmax=1, rows=["r"], columns=["x", "y"], annot=texts)
    assert [text.get_text() for text in axes.texts] == ["a", "b"]
    assert len({text.get_color() for text in axes.texts}) == 2  # light on dark, dark on light


def test_a_figure_with_a_heat_map_can_be_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_FIGURES", str(tmp_path))
    about = {"title": "A plot", "numbers": [1], "parameters": {}, "seeds": [0], "inputs": {}}
    figure, axes = plt.subplots()
    style.heat_map(axes, np.eye(2), vmin=0, vmax=1, rows=["a", "b"], columns=["c", "d"])
    path = save(figure, "plot", notebook="02_backdoor_probe", **about)
    assert len(path.read_bytes()) > 5000
    assert json.loads((tmp_path / "plot.json").read_text())["title"] == "A plot"
