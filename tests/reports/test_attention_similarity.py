"""Pictures of notebook 05 from numbers made by hand: every line where the numbers say, every axis labelled."""

from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pytest
from drawing import bands, check_labelled, column_titles, legend, written
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from bkd_utils.reports import attention_similarity
from bkd_utils.reports.style import COLOURS, MODELS

RANDOM = np.random.default_rng(0)
VERSIONS = ("triggered", "near-miss", "same length")
ATTACKS = ("sentiment-word", "sentiment-style")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def observed():
    versions = ("clean", *VERSIONS)
    return {name: {v: RANDOM.random((6, 5)).tolist() for v in versions} for name in ("last row", "full map")}


def gap(versions):
    return np.array(versions["triggered"]) - np.array(versions["clean"])


def separated(value):
    share = {"value": value, "n": 8, "low": value - 0.1, "high": value + 0.1}
    return {"layer": 3} | {model: dict.fromkeys(VERSIONS, share) for model in MODELS}


FOUND = {attack: {model: observed() for model in MODELS} for attack in ATTACKS}
READINGS = ["last row", "full map"]
SEPARATED = {reading: {attack: separated(0.9) for attack in ATTACKS} for reading in READINGS}


def test_gaps_are_means_over_prompts_by_layer():
    figure = attention_similarity.gaps(attention_similarity.gap_numbers(FOUND, readings=READINGS), separated=SEPARATED)
    assert len(figure.axes) == 4
    for i, attack in enumerate(ATTACKS):
        for j, name in enumerate(READINGS):
            axes = figure.axes[2 * i + j]
            lines = {line.get_label(): line for line in axes.get_lines()}
            for model, (low, high) in zip(MODELS, bands(axes), strict=True):
                difference = gap(FOUND[attack][model][name])
                assert lines[model].get_ydata() == pytest.approx(difference.mean(0))
                assert lines[model].get_color() == COLOURS[model]
                assert low == pytest.approx(np.quantile(difference, 0.25, axis=0).min())
                assert high == pytest.approx(np.quantile(difference, 0.75, axis=0).max())
    assert column_titles(figure) == READINGS
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == ["sentiment-\nword", "sentiment-\nstyle"]
    assert legend(figure) == [*MODELS, "chosen layer", "middle half of the prompts"]
    assert figure.get_supxlabel() == "layer (n = 6 prompts)"


def test_gaps_mark_the_chosen_layer_of_each_reading_and_attack():
    chosen = {"last row": {"sentiment-word": {"layer": 1}, "sentiment-style": {"layer": 4}}}
    figure = attention_similarity.gaps(attention_similarity.gap_numbers(FOUND, readings=["last row"]), separated=chosen)
    dotted = [[line for line in axes.get_lines() if line.get_linestyle() == ":"] for axes in figure.axes]
    assert [list(line.get_xdata()) for (line,) in dotted] == [[1, 1], [4, 4]]


def test_gap_numbers_are_means_and_the_middle_half_of_the_prompts():
    numbers = attention_similarity.gap_numbers(FOUND, readings=["full map"])
    assert list(numbers) == list(ATTACKS)
    drawn = numbers["sentiment-style"]["full map"]["clean control"]
    difference = gap(FOUND["sentiment-style"]["clean control"]["full map"])
    assert drawn["mean"] == pytest.approx(difference.mean(0))
    assert drawn["low"] == pytest.approx(np.quantile(difference, 0.25, axis=0))
    assert drawn["high"] == pytest.approx(np.quantile(difference, 0.75, axis=0))
    assert drawn["n"] == 6


def test_the_map_writes_its_numbers_and_centres_on_chance():
    found = {"last row": {a: separated(0.9) for a in ATTACKS}, "full map": {a: separated(0.4) for a in ATTACKS}}
    figure = attention_similarity.separation_map(found)
    for axes in figure.axes[:3]:
        cells = axes.collections[0]
        assert np.asarray(cells.get_array()) == pytest.approx(np.array([[0.9, 0.9], [0.4, 0.4]]))
        assert cells.get_clim() == (0, 1)
        assert [text.get_text() for text in axes.texts] == [".90", ".90", ".40", ".40"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["last row", "full map"]
    assert figure.axes[0].yaxis_inverted()
    assert "n = 8 prompts a side" in written(figure)


def test_families_show_every_version_and_model_with_its_interval():
    figure = attention_similarity.families({attack: separated(0.7) for attack in ATTACKS})
    lines = figure.axes[0].get_lines()
    bars, dots = lines[0 : 2 * 9 : 2], lines[1 : 2 * 9 : 2]
    assert all(bar.get_xdata() == pytest.approx([0.6, 0.8]) for bar in bars)
    assert all(np.atleast_1d(dot.get_xdata()) == pytest.approx([0.7]) for dot in dots)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["triggered", "look-alike", "same length"]
    assert legend(figure) == [*MODELS, "chance", "95 % interval"]
    assert figure.get_supxlabel() == "AUROC against clean prompts, n = 8 a side"


def two_heads():
    """The two rows of panels of the drawing: version -> maps of head 1 and head 2, bars."""
    figure = attention_similarity.two_heads()
    panels = np.array(figure.axes).reshape(2, 3)
    return figure, dict(zip(attention_similarity.INVENTED, panels, strict=True))


def map_of(panel):
    return np.asarray(panel.collections[0].get_array()).reshape(5, 5)


def heights(bars):
    """Of the bars of head 1 and of head 2."""
    return [np.array([bar.get_height() for bar in container]) for container in bars.containers]


def test_the_drawing_holds_attention_maps_with_a_frame_around_the_rows_that_are_compared():
    figure, drawn = two_heads()
    check_labelled(figure)
    for (*maps, bars), (tokens, _) in zip(drawn.values(), attention_similarity.INVENTED.values(), strict=True):
        for panel, row in zip(maps, heights(bars), strict=True):
            weights = map_of(panel)
            assert weights.sum(1) == pytest.approx(np.ones(5))
            assert (np.triu(weights, 1) == 0).all()
            assert weights[-1] == pytest.approx(row)
            (frame,) = [patch for patch in panel.patches if isinstance(patch, Rectangle)]
            assert frame.get_bbox().bounds == (0, 4, 5, 1)
            assert panel.yaxis_inverted()
            assert [label.get_text() for label in panel.get_yticklabels()] == tokens


def test_the_cosines_in_the_drawing_are_those_of_its_bars():
    _, drawn = two_heads()
    told = {}
    for version, (*_, bars) in drawn.items():
        one, other = heights(bars)
        (title,) = column_titles(SimpleNamespace(axes=[bars]))
        told[version] = float(title.split()[-1])
        assert told[version] == pytest.approx(sum(one * other) / (sum(one**2) * sum(other**2)) ** 0.5, abs=0.005)
    assert told["triggered"] > 0.9 > 0.5 > told["clean"]


def test_the_drawing_can_be_read_without_colours_and_says_that_it_is_invented():
    figure, drawn = two_heads()
    for *maps, bars in drawn.values():
        for panel in maps:
            shades = panel.collections[0].get_facecolors()[:, :3]
            assert np.ptp(shades, axis=1).max() < 0.02
        first, second = bars.containers
        assert len(set(to_rgb(first[0].get_facecolor()))) == 1
        assert (first[0].get_hatch(), second[0].get_hatch()) == (None, "////")
    assert legend(figure) == ["last row of head 1", "last row of head 2"]
    assert "invented" in written(figure)
