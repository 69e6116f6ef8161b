"""Pictures of notebooks 05 to 07 from numbers made by hand: every line where the numbers say, every axis labelled."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from drawing import legend, share

from bkd_utils.experiments.attention_similarity import gap
from bkd_utils.reports import attention_similarity
from bkd_utils.reports.style import MODELS as COLOURS

RANDOM = np.random.default_rng(0)
MODELS = ("organism", "clean control", "base model")
VERSIONS = ("triggered", "near-miss", "same length")
ATTACKS = ("sentiment-word", "sentiment-style")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def observed():
    versions = ("clean", *VERSIONS)
    return {
        "layers": {name: {v: RANDOM.random((6, 5)).tolist() for v in versions} for name in ("last row", "full map")}
    }


def separated(value):
    share = {"value": value, "n": 8, "low": value - 0.1, "high": value + 0.1}
    return {"layer": 3} | {model: dict.fromkeys(VERSIONS, share) for model in MODELS}


FOUND = {attack: {model: observed() for model in MODELS} for attack in ATTACKS}


def test_gaps_are_means_over_prompts_by_layer():
    figure = attention_similarity.gaps(FOUND, readings=["last row", "full map"])
    assert len(figure.axes) == 4
    for i, name in enumerate(("last row", "full map")):
        for j, attack in enumerate(ATTACKS):
            lines = {line.get_label(): line for line in figure.axes[2 * i + j].get_lines()}
            for model in MODELS:
                expected = gap(FOUND[attack][model], reading=name).mean(0)
                assert lines[model].get_ydata() == pytest.approx(expected)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes[:2]] == list(ATTACKS)
    assert figure.axes[0].get_ylabel() == "last row"
    assert legend(figure) == [*MODELS, "middle half of the prompts"]


def test_gaps_mark_the_chosen_layer_of_each_reading_and_attack():
    chosen = {"last row": {"sentiment-word": {"layer": 1}, "sentiment-style": {"layer": 4}}}
    figure = attention_similarity.gaps(FOUND, readings=["last row"], separated=chosen)
    dotted = [[line for line in axes.get_lines() if line.get_linestyle() == ":"] for axes in figure.axes]
    assert [list(line.get_xdata()) for (line,) in dotted] == [[1, 1], [4, 4]]
    assert "chosen layer" in legend(figure)


def test_gap_numbers_are_the_lines_and_the_bands():
    numbers = attention_similarity.gap_numbers(FOUND, readings=["full map"])
    assert list(numbers) == list(ATTACKS)
    drawn = numbers["sentiment-style"]["full map"]["clean control"]
    difference = gap(FOUND["sentiment-style"]["clean control"], reading="full map")
    assert drawn["mean"] == pytest.approx(difference.mean(0))
    assert drawn["low"] == pytest.approx(np.quantile(difference, 0.25, axis=0))
    assert drawn["high"] == pytest.approx(np.quantile(difference, 0.75, axis=0))


def test_two_figures_of_gaps_can_share_their_scales():
    limits = attention_similarity.gap_limits(FOUND, readings=["last row", "full map"])
    one, other = (
        attention_similarity.gaps({attack: FOUND[attack]}, readings=["last row", "full map"], limits=limits)
        for attack in ATTACKS
    )
    for i, name in enumerate(("last row", "full map")):
        assert one.axes[i].get_ylim() == other.axes[i].get_ylim() == limits[name]
    for numbers in attention_similarity.gap_numbers(FOUND, readings=["last row"]).values():
        for drawn in numbers["last row"].values():
            assert limits["last row"][0] < min(drawn["low"])
            assert max(drawn["high"]) < limits["last row"][1]


def test_the_map_writes_its_numbers_and_centres_on_chance():
    found = {"last row": {a: separated(0.9) for a in ATTACKS}, "full map": {a: separated(0.4) for a in ATTACKS}}
    figure = attention_similarity.separation_map(found, models=MODELS)
    for axes in figure.axes[:3]:
        (image,) = axes.get_images()
        assert np.asarray(image.get_array()) == pytest.approx(np.array([[0.9, 0.9], [0.4, 0.4]]))
        assert image.get_clim() == (0, 1)
        assert [text.get_text() for text in axes.texts] == [".90", ".90", ".40", ".40"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["last row", "full map"]


def test_families_show_every_version_and_model_with_its_interval():
    figure = attention_similarity.families({attack: separated(0.7) for attack in ATTACKS}, models=MODELS)
    lines = figure.axes[0].get_lines()
    bars, dots = lines[0 : 2 * 9 : 2], lines[1 : 2 * 9 : 2]
    assert all(bar.get_xdata() == pytest.approx([0.6, 0.8]) for bar in bars)
    assert all(np.atleast_1d(dot.get_xdata()) == pytest.approx([0.7]) for dot in dots)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["triggered", "look-alike", "same length"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(MODELS)


SCORES = (np.array([0.0, 1.0]), np.array([2.0, 3.0]))


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_detection_curves_run_from_nothing_to_everything(count):
    figure = attention_similarity.detection_curves({f"attack {i}": {"last row": SCORES} for i in range(count)})
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == count
    for axes in shown:
        (curve,) = [line for line in axes.get_lines() if line.get_label() == "last row"]
        points = list(zip(curve.get_xdata(), curve.get_ydata(), strict=True))
        assert points[0] == (0, 0)
        assert points[-1] == (100, 100)
        assert (0, 100) in points  # separable: everything caught before anything is refused
        assert [text.get_text() for text in axes.texts] == ["AUROC\n1.00"]
    assert figure._supxlabel.get_text().endswith("n = 2")
    assert legend(figure) == ["last row"]


def test_readings_beside_each_other_have_no_colour_of_a_model_and_a_line_each():
    figure = attention_similarity.detection_curves({"attack": {"last row": SCORES, "head outputs": SCORES}})
    lines = figure.axes[0].get_lines()[1:]
    assert len({line.get_linestyle() for line in lines}) == 2
    assert not {line.get_color() for line in lines} & {COLOURS["organism"], COLOURS["clean control"]}


def test_a_threshold_is_a_dot_with_its_intervals():
    at = {"caught at 5%": share(0.5), "refused at 5%": share(0.3)}
    figure = attention_similarity.detection_curves(
        {"attack": {"last row": SCORES}}, detected={("attack", "last row"): at}
    )
    across, along, dot = figure.axes[0].get_lines()[2:]
    assert (list(across.get_xdata()), list(across.get_ydata())) == (pytest.approx([20, 40]), pytest.approx([50, 50]))
    assert (list(along.get_xdata()), list(along.get_ydata())) == (pytest.approx([30, 30]), pytest.approx([40, 60]))
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (30, 50)
    assert legend(figure)[1] == "threshold for 5%, held-out prompts"
