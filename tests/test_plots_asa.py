"""Pictures of notebooks 05 to 07 from numbers made by hand: every line where the numbers say, every axis labelled."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from bkd_utils import plots_asa as plots
from bkd_utils.observe import gap

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
    figure = plots.gaps(FOUND, readings=["last row", "full map"])
    assert len(figure.axes) == 4
    for i, name in enumerate(("last row", "full map")):
        for j, attack in enumerate(ATTACKS):
            lines = {line.get_label(): line for line in figure.axes[2 * i + j].get_lines()}
            for model in MODELS:
                expected = gap(FOUND[attack][model], reading=name).mean(0)
                assert lines[model].get_ydata() == pytest.approx(expected)
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes[:2]] == list(ATTACKS)
    assert figure.axes[0].get_ylabel() == "last row"


def test_the_map_writes_its_numbers_and_centres_on_chance():
    found = {"last row": {a: separated(0.9) for a in ATTACKS}, "full map": {a: separated(0.4) for a in ATTACKS}}
    figure = plots.separation_map(found, models=MODELS)
    for axes in figure.axes[:3]:
        (image,) = axes.get_images()
        assert np.asarray(image.get_array()) == pytest.approx(np.array([[90, 90], [40, 40]]))
        assert image.get_clim() == (0, 100)
        assert [text.get_text() for text in axes.texts] == ["90", "90", "40", "40"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["last row", "full map"]


def test_families_show_every_version_and_model_with_its_interval():
    figure = plots.families({attack: separated(0.7) for attack in ATTACKS}, models=MODELS)
    lines = figure.axes[0].get_lines()
    bars, dots = lines[0 : 2 * 9 : 2], lines[1 : 2 * 9 : 2]
    assert all(bar.get_xdata() == pytest.approx([60, 80]) for bar in bars)
    assert all(np.atleast_1d(dot.get_xdata()) == pytest.approx([70]) for dot in dots)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["triggered", "look-alike", "same length"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(MODELS)


def test_detection_curves_run_from_nothing_to_everything():
    scores = {attack: {"last row": (np.array([0.0, 1.0]), np.array([2.0, 3.0]))} for attack in ATTACKS}
    figure = plots.detection_curves(scores)
    curve = figure.axes[0].get_lines()[0]
    points = list(zip(curve.get_xdata(), curve.get_ydata(), strict=True))
    assert points[0] == (0, 0)
    assert points[-1] == (100, 100)
    assert (0, 100) in points  # separable: everything caught before anything is refused
