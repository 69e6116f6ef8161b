"""Pictures of notebook 03 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pytest
from drawing import bands, check_all, column_titles, legend, share

from bkd_utils.experiments.head_attribution import Ablation
from bkd_utils.reports import head_attribution
from bkd_utils.reports.head_attribution import RANKINGS

pytestmark = pytest.mark.usefixtures("style")
ATTACKS = ("sentiment-word", "harmful-word")
RANDOM = np.random.default_rng(0)


def ablated(ranking, kind, k, asr, *, scope="last position", utility=0.9):
    shares = {"asr": share(asr), "right": share(0.0), "utility": share(utility)}
    return Ablation(ranking=ranking, kind=kind, scope=scope, k=k, draw=0, **shares, perplexity=2.0)


CURVE = [
    ablated("none", "published", 0, 1.0),
    *(ablated(ranking, "published", k, 0.8 / k) for ranking in ("ACIE", "gradient", "necessity") for k in (1, 8)),
    *(ablated("ACIE", "mean", k, 0.4) for k in (1, 8)),
    *(ablated("random", "published", 8, asr) for asr in (0.5, 0.7, 0.9)),
    ablated("ACIE", "published", 8, 0.0, scope="all positions"),
]
EFFECTS = {attack: RANDOM.normal(size=(5, 4)) for attack in ATTACKS}
PARTS = {attack: {name: [share(0.1), share(0.5)] for name in ("attention", "MLP", "residual")} for attack in ATTACKS}
CURVES = dict.fromkeys(ATTACKS, CURVE)
TOKENS = ["Ġfilm", "<|im_end|>", "Ċ", "<|im_start|>"]
POSITIONS = {attack: RANDOM.normal(size=(5, 4)) for attack in ATTACKS}
PLOTS = {
    "head_maps": lambda: head_attribution.head_maps(EFFECTS, few=3, n=20),
    "components": lambda: head_attribution.components(PARTS, POSITIONS, TOKENS),
    "ablation_curves": lambda: head_attribution.ablation_curves(CURVES),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(head_attribution, PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_every_organism_has_its_column(name):
    assert [title.partition("\n")[0] for title in column_titles(PLOTS[name]())] == list(ATTACKS)


def test_maps_have_one_scale_for_all_with_zero_in_the_middle_and_layer_0_at_the_bottom():
    figure = PLOTS["head_maps"]()
    bound = max(np.abs(values).max() for values in EFFECTS.values())
    for axes, values in zip(figure.axes, EFFECTS.values(), strict=False):
        assert axes.collections[0].get_clim() == (-bound, bound)
        assert np.array_equal(axes.collections[0].get_array(), values)
        assert axes.get_ylim() == (0, 5)
    assert figure.get_supxlabel() == "head (n = 20 prompts)"


def test_the_highest_heads_are_marked_and_the_highest_effect_is_named():
    figure = PLOTS["head_maps"]()
    for axes, (attack, values) in zip(figure.axes, EFFECTS.items(), strict=False):
        (dots,) = axes.get_lines()
        marked = {(int(y), int(x)) for x, y in zip(dots.get_xdata(), dots.get_ydata(), strict=True)}
        assert {values[place] for place in marked} == set(np.sort(values, axis=None)[-3:])
        assert axes.get_title(loc="left") == f"{attack}\nhighest: {values.max():.2g}"
    assert legend(figure) == ["3 highest (15%)"]


def test_tokens_of_the_template_are_spelt_out_from_top_to_bottom():
    axes = PLOTS["components"]().axes[2]
    assert [label.get_text() for label in axes.get_yticklabels()] == [" film", "<end>", "\\n", "<start>"]
    assert axes.yaxis_inverted()


def test_positions_are_rows_over_layers_on_one_scale():
    figure = PLOTS["components"]()
    bound = max(np.abs(values).max() for values in POSITIONS.values())
    for axes, values in zip(figure.axes[2:], POSITIONS.values(), strict=False):
        assert np.array_equal(axes.collections[0].get_array(), values.T)
        assert axes.collections[0].get_clim() == (-bound, bound)
        assert axes.get_xlim() == (0, 5)


def test_components_are_lines_over_layers_with_their_intervals():
    figure = PLOTS["components"]()
    lines = {line.get_label(): list(line.get_ydata()) for line in figure.axes[1].get_lines()}
    assert lines == {name: [0.1, 0.5] for name in ("attention", "MLP", "residual")}
    assert bands(figure.axes[1]) == [(0.0, 0.6)] * 3
    assert legend(figure) == ["attention", "MLP", "residual", "95 % interval"]


def test_ablation_curves_start_at_the_untouched_model_and_average_random_draws():
    figure = head_attribution.ablation_curves(CURVES)
    top, bottom = figure.axes[0], figure.axes[2]
    lines = {line.get_label(): line for line in top.get_lines()}
    assert list(lines) == list(RANKINGS)
    assert legend(figure) == [*RANKINGS, "95 % interval", "random: range over draws"]
    for name in ("ACIE", "gradient", "necessity"):
        assert list(lines[name].get_xdata()) == [0, 1, 8]
        assert lines[name].get_ydata() == pytest.approx([100, 80, 10])
    assert list(lines["random"].get_xdata()) == [0, 8]
    assert lines["random"].get_ydata() == pytest.approx([100, 70])
    assert bands(top) == [pytest.approx(band) for band in ((0, 100), (0, 100), (0, 100), (50, 100))]
    assert all(line.get_ydata() == pytest.approx([90] * len(line.get_xdata())) for line in bottom.get_lines())
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["0", "1", "8"]
