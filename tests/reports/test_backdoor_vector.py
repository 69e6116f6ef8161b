"""Pictures of notebook 04 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pytest
from drawing import check_all, column_titles, legend, share

from bkd_utils.experiments.attribution_cost import TargetCost
from bkd_utils.experiments.backdoor_vector import Choice, ShareMap, Steering
from bkd_utils.reports import backdoor_vector
from bkd_utils.reports.backdoor_vector import OUTCOMES
from bkd_utils.reports.style import COLOURS

pytestmark = pytest.mark.usefixtures("style")
ATTACKS, KINDS = ("sentiment-word", "harmful-word"), ("specific", "plain")
RANDOM = np.random.default_rng(0)


def tried(n_random):
    return {
        "no vector": [share(0.1)],
        "backdoor vector": [share(0.8)],
        "random vectors": [share(value) for value in np.linspace(0, 0.5, n_random)],
    }


def switched():
    names = [f"{direction}, {kind}" for direction in ("add", "subtract") for kind in ("raw", "difference")]
    sign = {"add": 1, "subtract": -1}
    maps = {
        name: ShareMap(
            coefficients=[sign[name.split(",")[0]] * c for c in (0.0, 1.0, 2.0)],
            asr=RANDOM.random((5, 3)).tolist(),
            right_start=RANDOM.random((5, 3)).tolist(),
        )
        for name in names
    }
    return Steering(
        heads=[],
        norms={"raw": 1.0, "difference": 2.0},
        vectors={},
        residual_norm=[],
        maps=maps,
        chosen={name: Choice(3, entry.coefficients[2]) for name, entry in maps.items()},
        test={name: tried(4) | ({"projected out": [share(0.6)]} if "subtract" in name else {}) for name in names},
        outcomes={
            name: {"target": 0.5, "right": 0.25, "refusal": 0.0, "empty": 0.05, "other": 0.2}
            for name in ("clean prompts", "triggered prompts", *names)
        },
        right={name: share(0.3) for name in ("triggered prompts", *names[2:])},
        kinds={},
        texts=None,
    )


SWITCHED = {attack: switched() for attack in ATTACKS}
WAYS = ("generation", "teacher_forcing", "generation_cached", "teacher_forcing_cached")
NAMES = ("generation", "teacher forcing", "generation, cache", "teacher forcing, prompt cache")
COSTS = {name: TargetCost(tokens=1 + i, n=8, **dict.fromkeys(WAYS, [0.5 + i] * 3)) for i, name in enumerate(ATTACKS)}
SEEDS = {kind: {f"{attack}{seed}": switched() for attack in ATTACKS for seed in ("", "-seed1")} for kind in KINDS}
PLOTS = {
    "vector_maps": lambda: backdoor_vector.vector_maps(SWITCHED[ATTACKS[0]], name=ATTACKS[0], n=8),
    "vector_controls": lambda: backdoor_vector.vector_controls(SWITCHED),
    "costs": lambda: backdoor_vector.costs(COSTS),
    "answer_kinds": lambda: backdoor_vector.answer_kinds(SWITCHED, n=24),
    "vector_seeds": lambda: backdoor_vector.vector_seeds(SEEDS),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(backdoor_vector, PLOTS)


@pytest.mark.parametrize("name", ["vector_controls", "answer_kinds"])
def test_every_organism_has_its_column(name):
    assert column_titles(PLOTS[name]()) == list(ATTACKS)


def test_one_organism_is_enough():
    for figure in (
        backdoor_vector.answer_kinds({"x": switched()}, n=24),
        backdoor_vector.vector_controls({"x": switched()}),
    ):
        assert all(axes.has_data() for axes in figure.axes)


def test_vector_maps_have_coefficients_upwards_and_a_square_at_the_chosen_one():
    figure, found = PLOTS["vector_maps"](), SWITCHED[ATTACKS[0]]
    assert column_titles(figure) == list(backdoor_vector.MAPS.values())
    for i, kind in enumerate(("raw", "difference")):
        assert figure.axes[3 * i].get_ylabel() == f"{kind} vector,\ncoefficient"
        for axes, (direction, key) in zip(figure.axes[3 * i :], backdoor_vector.MAPS, strict=False):
            cells = axes.collections[0]
            assert np.asarray(cells.get_array()) == pytest.approx(
                100 * np.array(getattr(found.maps[f"{direction}, {kind}"], key)).T
            )
            assert cells.get_clim() == (0, 100)
            assert all((list(mark.get_xdata()), list(mark.get_ydata())) == ([3.5], [2.5]) for mark in axes.get_lines())
            sign = "-" if direction == "subtract" else ""
            assert [label.get_text() for label in axes.get_yticklabels()][1:] == [f"{sign}1", f"{sign}2"]
            assert not axes.yaxis_inverted()
    assert figure.get_supxlabel() == f"layer ({ATTACKS[0]}, n = 8 prompts)"


def test_vector_controls_are_dots_per_draw_with_an_interval_where_there_is_one_draw():
    figure = backdoor_vector.vector_controls(SWITCHED)
    top, bottom = figure.axes[0], figure.axes[2]
    its_bar, nothing, vector_bar, vector, random = top.get_lines()
    assert [list(line.get_xdata()) for line in (nothing, vector)] == [[10], [80]]
    assert its_bar.get_xdata() == pytest.approx([0, 20])
    assert vector_bar.get_xdata() == pytest.approx([70, 90])
    assert (vector.get_color(), nothing.get_color()) == (COLOURS["ACIE"], COLOURS["neutral"])
    assert random.get_color() == COLOURS["random"]
    assert random.get_xdata() == pytest.approx(100 * np.linspace(0, 0.5, 4))
    assert np.round(random.get_ydata()).tolist() == [2, 2, 2, 2]
    assert [label.get_text() for label in top.get_yticklabels()] == ["no vector", "backdoor vector", "random vectors"]
    assert [label.get_text() for label in bottom.get_yticklabels()][-1] == "projected out"
    assert top.yaxis_inverted()


def test_controls_are_those_of_the_difference_vector():
    found = switched()
    found.test["add, raw"]["backdoor vector"] = [share(0.3)]
    drawn = backdoor_vector.vector_controls({"x": found}).axes[0].get_lines()[3]
    assert list(drawn.get_xdata()) == [80]


def test_seeds_are_rows_of_dots_and_the_kinds_of_organisms_columns():
    """One seed of one organism is unlike all others: its better vector is the raw one, by the shorter step."""
    odd = switched()
    for name, entry in odd.maps.items():
        shares = [[float(name.endswith("raw"))] * 3] * 5
        odd.maps[name] = ShareMap(entry.coefficients, shares, shares)
    odd.outcomes["add, raw"]["target"], odd.outcomes["subtract, raw"]["target"] = 1.0, 0.1
    odd.right["subtract, raw"] = share(0.7)
    odd.test["add, raw"]["random vectors"] = [share(0.2)] * 3
    odd.test["subtract, raw"]["random vectors"] = [share(0.6)] * 3
    found = {"specific": {"x": switched(), "x-seed1": odd, "y": switched()}, "plain": {"x": switched(), "y": odd}}
    figure = backdoor_vector.vector_seeds(found)
    assert column_titles(figure) == ["specific", "plain"]
    dots = [[line for line in axes.get_lines() if line.get_marker() == "o"] for axes in figure.axes[::2]]
    assert [[line.get_xdata()[0] for line in row] for row in dots] == [
        pytest.approx(values) for values in ([50, 100, 50], [50, 10, 50], [30, 70, 30])
    ]
    # Seeds of an attack stand beside each other in its row.
    assert [round(line.get_ydata()[0]) for line in dots[0]] == [0, 0, 1]
    assert dots[0][0].get_ydata()[0] < dots[0][1].get_ydata()[0]
    marks = [
        [line.get_xdata()[0] for line in axes.get_lines() if line.get_marker() == "|"] for axes in figure.axes[::2]
    ]
    assert marks == [pytest.approx([25, 20, 25]), pytest.approx([25, 60, 25]), []]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["x", "y"]
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
        "added: ASR", "subtracted:\nASR left", "subtracted:\nright answers"
    ]  # fmt: skip


def test_the_better_vector_is_that_of_the_highest_share_of_what_it_is_for():
    """Added ones are judged by ASR, subtracted ones by right starts."""
    found = switched()
    for direction, key in (("add", "asr"), ("subtract", "right_start")):
        for kind in ("raw", "difference"):
            shares = {"asr": [[0.5] * 3] * 5, "right_start": [[0.5] * 3] * 5}
            shares[key] = [[0.9 if kind == "difference" else 0.8] * 3] * 5
            entry = found.maps[f"{direction}, {kind}"]
            found.maps[f"{direction}, {kind}"] = ShareMap(entry.coefficients, **shares)
    assert [backdoor_vector.better(found, one) for one in ("add", "subtract")] == [
        "add, difference",
        "subtract, difference",
    ]


def test_costs_are_median_seconds_by_way_and_organism():
    rows = {
        "one": TargetCost(tokens=1, n=8, **{way: [1.0 + i, 0.5, 99.0] for i, way in enumerate(WAYS)}),
        "long": TargetCost(tokens=11, n=8, **{way: [10.0 + i] for i, way in enumerate(WAYS)}),
    }
    figure = backdoor_vector.costs(rows)
    axes = figure.axes[0]
    dots = {line.get_label(): line for line in axes.get_lines()}
    assert {way: list(line.get_xdata()) for way, line in dots.items()} == {
        way: [1 + i, 10 + i] for i, way in enumerate(NAMES)
    }
    places = np.array([line.get_ydata() for line in dots.values()])
    assert np.round(places).tolist() == [[0, 1]] * len(WAYS)
    assert len(np.unique(places)) == places.size  # equal times do not hide each other
    assert legend(figure) == list(NAMES)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one\n1 token", "long\n11 tokens"]
    assert axes.get_xlabel() == "seconds to score the target of all prompts once, n = 8 prompts"
    assert axes.get_xscale() == "log"


def test_answers_are_stacked_to_a_hundred_per_cent():
    figure = backdoor_vector.answer_kinds(SWITCHED, n=24)
    axes = figure.axes[0]
    assert legend(figure) == list(OUTCOMES)
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert {kind: set(values) for kind, values in widths.items()} == {
        "target": {50},
        "right": {25},
        "refusal": {0},
        "other": {20},
        "empty": {5},
    }
    assert [bar.get_x() for bar in (bars[0] for bars in axes.containers)] == [0, 50, 75, 75, 95]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SWITCHED[ATTACKS[0]].outcomes)
    assert axes.yaxis_inverted()
