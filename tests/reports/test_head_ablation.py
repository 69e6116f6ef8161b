"""Pictures of notebook 03 on ablations and cut routes of the real shape, with what is drawn read back."""

import numpy as np
import pytest
from bkdattr_results import ablated, route
from drawing import bands, check_all, column_titles, legend

from bkd_utils.backdoor_attribution.routes import ROUTES
from bkd_utils.reports import head_ablation
from bkd_utils.reports.head_ablation import RANKINGS

pytestmark = pytest.mark.usefixtures("style")
ATTACKS, KINDS = ("sentiment-word", "harmful-word"), ("specific", "plain")


def curve(lift=0.0):
    return [
        ablated("none", "published", 0, 1.0, utility=0.9 - lift),
        *(ablated(name, "published", k, 0.8 / k + lift) for name in list(RANKINGS)[:3] for k in (1, 8)),
        *(ablated(name, "mean", k, 0.4 + lift, utility=0.5) for name in list(RANKINGS)[:3] for k in (1, 8)),
        *(
            ablated("random", kind, 8, asr, draw=i)
            for kind in ("published", "mean")
            for i, asr in enumerate((0.5, 0.9))
        ),
        # What is measured and not drawn.
        ablated("probability", "zero", 8, 0.0),
        ablated("gradient", "published", 8, 0.0),
        ablated("log_prob", "mean", 8, 0.0),
    ]


CURVES = {attack: curve() for attack in ATTACKS} | {"sentiment-word-seed1": curve(lift=0.1)}
NAMES = [" → ".join(pair) for pair in ROUTES]
WINDOWS = [range(10), range(5), range(5, 10)]


def left(level):
    """ASR `[route][window]`, none like another."""
    return [[level + 0.1 * i + 0.025 * j for j in range(3)] for i in range(5)]


def cut(level):
    rows = [route("none", [], 1.0, n=40)]
    for name, values in zip(NAMES, left(level), strict=True):
        rows += [route(name, layers, asr, n=40) for layers, asr in zip(WINDOWS, values, strict=True)]
    return rows


CUT = {kind: {attack: cut(0.1 * i) for i, attack in enumerate(ATTACKS)} for kind in KINDS}
PLOTS = {
    "ablation_curves": lambda: head_ablation.ablation_curves(CURVES),
    "routes": lambda: head_ablation.routes(CUT),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(head_ablation, PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_every_attack_has_its_column_and_seeds_share_it(name):
    assert column_titles(PLOTS[name]()) == list(ATTACKS)


def test_one_organism_is_enough():
    for figure in (
        head_ablation.ablation_curves({"x": curve()}),
        head_ablation.routes({"plain": {"x": cut(0.0)}}),
    ):
        assert all(axes.has_data() for axes in figure.axes)


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


def test_curves_start_at_the_untouched_model_and_average_seeds_and_random_draws():
    figure = PLOTS["ablation_curves"]()
    one_seed, two_seeds = lines(figure.axes[1]), lines(figure.axes[0])
    labels = [label for label, _ in RANKINGS.values()]
    assert list(one_seed) == list(two_seeds) == labels
    assert legend(figure) == [*labels, "range over seeds"]
    for label in labels[:3]:
        assert list(one_seed[label].get_xdata()) == [0, 1, 8]
        assert one_seed[label].get_ydata() == pytest.approx([100, 80, 10])
        assert two_seeds[label].get_ydata() == pytest.approx([100, 85, 15])
    assert list(one_seed["random"].get_xdata()) == [0, 8]
    assert one_seed["random"].get_ydata() == pytest.approx([100, 70])
    ranges = bands(figure.axes[0])
    assert ranges[:3] == [pytest.approx((10, 100))] * 3
    assert ranges[3] == pytest.approx((50, 100))


def test_the_rows_are_the_published_ablation_and_asr_and_utility_with_clean_means():
    figure = PLOTS["ablation_curves"]()
    published, mean, utility = (lines(axes)["ACIE, as published"].get_ydata() for axes in figure.axes[1::2])
    assert published == pytest.approx([100, 80, 10])
    assert mean == pytest.approx([100, 40, 40])
    assert utility == pytest.approx([90, 50, 50])
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
        "ASR (%),\npublished", "ASR (%),\nclean means", "utility (%),\nclean means"
    ]  # fmt: skip
    assert [label.get_text() for label in figure.axes[-1].get_xticklabels()] == ["0", "1", "8"]
    assert figure.get_supxlabel() == "heads ablated (n = 200 prompts)"


def test_the_range_over_seeds_goes_from_the_lowest_to_the_highest():
    axes = PLOTS["ablation_curves"]().axes[4]  # utility of two seeds
    collection = axes.collections[0].get_paths()[0].vertices
    at_zero = collection[np.isclose(collection[:, 0], 0), 1]
    assert (at_zero.min(), at_zero.max()) == pytest.approx((80, 90))


def test_routes_are_rows_and_windows_of_layers_columns_and_whole_ones_come_first():
    figure = PLOTS["routes"]()
    for axes, (kind, attack) in zip(figure.axes, [(k, a) for k in KINDS for a in ATTACKS], strict=False):
        cells = np.asarray(axes.collections[0].get_array())
        assert cells == pytest.approx(100 * np.array(left(0.1 * ATTACKS.index(attack))))
        assert axes.collections[0].get_clim() == (0, 100)
        assert [label.get_text() for label in axes.get_xticklabels()] == ["all", "0-4", "5-9"]
        assert axes.get_ylim() == (5, 0)
        if attack == ATTACKS[0]:
            assert axes.get_ylabel() == kind
            assert [label.get_text() for label in axes.get_yticklabels()] == NAMES
    assert figure.get_supxlabel() == "layers in which the route is cut (n = 40 triggered prompts)"


def test_cells_of_a_route_without_effect_have_no_number():
    rows = [route("none", [], 1.0)]
    rows += [route(name, layers, 1.0 if i else 0.25) for i, name in enumerate(NAMES) for layers in WINDOWS]
    axes = head_ablation.routes({"specific": {"x": rows}}).axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text()] == ["25"] * 3
