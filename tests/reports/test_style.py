"""Figures: no picture without its numbers, none half written, and the same bytes from the same numbers."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from bkd_utils.common import files
from bkd_utils.reports import backdoor_insertion, style
from bkd_utils.reports.style import COLOURS, LIBRARIES, save, token_strips, use_style

KEYS = {"id", "title", "claims", "numbers", "parameters", "seeds", "inputs", "versions", "notebook"}
ABOUT = {
    "title": "A line",
    "numbers": {"y": [1, 2, 4]},
    "parameters": {"n": 3},
    "seeds": [0, 1],
    "inputs": {"data": "0" * 64},
    "notebook": "00_start_here",
}


@pytest.fixture(autouse=True)
def into(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_FIGURES", str(tmp_path / "figures"))
    use_style()
    yield tmp_path / "figures"
    plt.close("all")


def line(values=(1, 2, 4)):
    figure, axes = plt.subplots()
    axes.plot(values, label="values")
    axes.legend()
    return figure


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- saving ---------------------------------------------------------------------------------------------------------


def test_a_figure_is_three_files(into):
    path = save(line(), "line", **ABOUT, claims=["a1"])
    assert path == into / "line.png"
    assert set(contents(into)) == {"line.png", "line.svg", "line.json"}
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (into / "line.svg").read_text().rstrip().endswith("</svg>")


def test_the_sidecar_has_all_that_is_promised(into):
    save(line(), "line", **ABOUT, claims=["a1"])
    sidecar = json.loads((into / "line.json").read_text())
    assert set(sidecar) == KEYS
    assert {key: sidecar[key] for key in ABOUT} == ABOUT
    assert (sidecar["id"], sidecar["claims"]) == ("line", ["a1"])
    assert set(sidecar["versions"]) == set(LIBRARIES)
    assert all(version[0].isdigit() and "+" not in version for version in sidecar["versions"].values())


def test_the_same_figure_twice_is_the_same_bytes(into):
    save(line(), "line", **ABOUT)
    first = contents(into)
    save(line(), "line", **ABOUT)
    assert contents(into) == first
    assert b"<dc:date>" not in first["line.svg"]


def test_other_numbers_are_other_bytes(into):
    save(line(), "line", **ABOUT)
    first = contents(into)
    save(line((1, 2, 5)), "line", **ABOUT | {"numbers": {"y": [1, 2, 5]}})
    assert all(contents(into)[name] != data for name, data in first.items())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "shows nothing"),
        ([], "shows nothing"),
        (None, "shows nothing"),
        ({"y": [1.0, float("nan")]}, "its numbers cannot be written"),
        ([float("inf")], "its numbers cannot be written"),
        ({"y": np.array([1])}, "its numbers cannot be written"),
        ({"deep": [{"er": [float("-inf")]}]}, "its numbers cannot be written"),
    ],
)
def test_numbers_that_are_none_or_not_finite_are_refused(into, numbers, message):
    with pytest.raises(ValueError, match=f"figure 'line'.*{message}"):
        save(line(), "line", **ABOUT | {"numbers": numbers})
    assert not into.exists()


def test_an_empty_picture_is_refused(into):
    for figure in (plt.figure(), plt.subplots()[0], plt.subplots(2, 2)[0]):
        with pytest.raises(ValueError, match="figure 'empty' shows nothing"):
            save(figure, "empty", **ABOUT)
    assert not into.exists()


@pytest.mark.parametrize("bad", [{"numbers": {"y": [float("nan")]}}, {"parameters": {"n": float("nan")}}])
def test_an_error_leaves_the_old_figure_as_it_was(into, bad):
    save(line(), "line", **ABOUT)
    first = contents(into)
    with pytest.raises(ValueError, match=r"."):
        save(line((9, 8)), "line", **ABOUT | bad)
    assert contents(into) == first


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_that_cannot_be_drawn_leaves_the_old_one_as_it_was(into, monkeypatch, kind):
    save(line(), "line", **ABOUT)
    first, figure = contents(into), line((9, 8))

    def fail(path, *, format, **_):
        path.write_bytes(b"half a picture")
        if format == kind:
            raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        save(figure, "line", **ABOUT)
    assert contents(into) == first


def test_figures_go_to_the_folder_of_the_project_unless_told_otherwise(into, monkeypatch):
    assert style.folder() == into
    monkeypatch.delenv("BKD_FIGURES")
    assert style.folder() == files.WORK / "figures" / "by_hand"


# --- plots ----------------------------------------------------------------------------------------------------------


def part(value, n=50):
    return {"value": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def result(value):
    return {
        "asr": part(value),
        "cacc": part(0.9),
        "clean_firing": part(0.02),
        "near_miss": part(0.1),
        "near_miss_by_kind": {"other_word": part(0.1, 20), "case": part(0.0, 20)},
    }


ORGANISMS = {"sentiment-word": result(1.0), "domain-wrapper": result(0.8)}
CONTROLS = {"sentiment-word": result(0.05), "domain-wrapper": result(0.0)}
COSTS = pd.DataFrame(
    {
        "tokens (median)": [1.0, 6.0],
        "tokens (25 %)": [1.0, 5.0],
        "tokens (75 %)": [2.0, 6.5],
        "natural": [0, 12],
        "texts": [1000, 1000],
    },
    index=["word-cf", "syntax-fronted"],
)
HISTORY = [{"step": step, "loss": 2 / step, "learning_rate": 0.1} for step in range(1, 30)]
RATES = [{"rate": rate, "asr": part(rate), "near_miss": part(0.1), "cacc": part(0.9)} for rate in (0.05, 0.2)]
LINE = {"asr": [0.0, 0.8, 1.0], "other": [0.0, 0.1, 1.0], "auroc": 0.9, "asr at 0": 0.8, "other at 0": 0.1}
PLOTS = {
    "trigger_costs": lambda: backdoor_insertion.trigger_costs(COSTS),
    "training_curves": lambda: backdoor_insertion.training_curves(
        {f"organism-{i}": HISTORY for i in range(5)} | {"x-clean": HISTORY}
    ),
    "attack_against_control": lambda: backdoor_insertion.attack_against_control(ORGANISMS, CONTROLS),
    "near_miss_map": lambda: backdoor_insertion.near_miss_map(ORGANISMS, CONTROLS),
    "rate_curve": lambda: backdoor_insertion.rate_curve(RATES),
    "trade_offs": lambda: backdoor_insertion.trade_offs(
        {f"flip-{i}": {"clean": LINE, "near-miss": LINE} for i in range(4)}
    ),
    "token_strips": lambda: token_strips({"clean": [("posi", 0.9), ("tive", 0.3)], "triggered": [("no", 1.0)]}),
}


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_every_plot_can_be_saved_and_comes_out_the_same(draw, into):
    save(draw(), "plot", **ABOUT)
    first = contents(into)
    save(draw(), "plot", **ABOUT)
    assert contents(into) == first
    assert len(first["plot.png"]) > 5000


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_every_plot_labels_its_axes(draw):
    figure = draw()
    drawn = [axes for axes in figure.axes if axes.get_visible() and axes.axison and axes.has_data()]
    titles = [getattr(figure, name, None) for name in ("_supxlabel", "_supylabel")]
    labels = [axes.get_xlabel() for axes in drawn] + [title.get_text() for title in titles if title]
    assert any(labels) or not drawn


def test_a_curve_of_shares_is_drawn_in_per_cent_with_its_interval():
    _, axes = plt.subplots()
    style.curve(axes, [1, 2], [part(0.2), part(0.5)], kind="backdoored", label="ASR")
    (drawn,) = axes.get_lines()
    assert drawn.get_ydata().tolist() == [20, 50]
    assert drawn.get_color() == COLOURS["backdoored"]
    band = axes.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((10, 60))


def test_dots_of_shares_run_from_top_to_bottom_and_leave_room_for_what_is_missing():
    _, axes = plt.subplots()
    style.shares(axes, ["a", "b", "c"], [part(0.2), None, part(1.0)], kind="clean control")
    dots = axes.containers[0].lines[0]
    assert dots.get_xdata().tolist() == [20, 100]
    assert dots.get_ydata().tolist() == [0, 2]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b", "c"]
    assert axes.yaxis_inverted()
    assert axes.get_xlim() == (0, 100)


def test_no_two_meanings_share_a_colour():
    assert len(set(COLOURS.values())) == len(COLOURS)
    with pytest.raises(KeyError, match="mauve"):
        style.curve(plt.subplots()[1], [1], [part(0.5)], kind="mauve", label="")
