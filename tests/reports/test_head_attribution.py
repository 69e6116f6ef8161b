"""Pictures of notebook 03 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pytest
from drawing import bands, check_all, column_titles, legend, share

from bkd_utils.reports import head_attribution
from bkd_utils.reports.head_attribution import RANKINGS

pytestmark = pytest.mark.usefixtures("style")
ATTACKS = ("sentiment-word", "harmful-word")
RANDOM = np.random.default_rng(0)


def ablated(ranking, kind, k, asr, *, scope="last position", utility=0.9):
    return {"ranking": ranking, "kind": kind, "scope": scope, "k": k, "asr": share(asr), "utility": share(utility)}


CURVE = [
    ablated("none", "published", 0, 1.0),
    *(ablated(ranking, "published", k, 0.8 / k) for ranking in ("ACIE", "gradient", "necessity") for k in (1, 8)),
    *(ablated("ACIE", "mean", k, 0.4) for k in (1, 8)),
    ablated("random", "published", 0, 0.96),  # the draws' own prompts, hence another start
    *(ablated("random", "published", 8, asr) for asr in (0.5, 0.7, 0.9)),
    ablated("ACIE", "published", 8, 0.0, scope="all positions"),
]
EFFECTS = {attack: RANDOM.normal(size=(5, 4)) for attack in ATTACKS}
INTERVALS = {attack: [share(value) for value in np.linspace(0.9, 0.1, 20)] for attack in ATTACKS}
PARTS = {attack: {name: [share(0.1), share(0.5)] for name in ("attention", "MLP", "residual")} for attack in ATTACKS}
CURVES = dict.fromkeys(ATTACKS, CURVE)
TOKENS = ["Ġfilm", "<|im_end|>", "Ċ", "<|im_start|>"]
POSITIONS = {attack: RANDOM.normal(size=(5, 4)) for attack in ATTACKS}
NOTES = {attack: f"shared by {attack}" for attack in ATTACKS}
PLOTS = {
    "head_maps": lambda: head_attribution.head_maps(EFFECTS),
    "sorted_effects": lambda: head_attribution.sorted_effects(INTERVALS, few=3),
    "gradient_against_exact": lambda: head_attribution.gradient_against_exact(EFFECTS, POSITIONS, NOTES),
    "components": lambda: head_attribution.components(PARTS),
    "by_position": lambda: head_attribution.by_position(POSITIONS, TOKENS),
    "ablation_curves": lambda: head_attribution.ablation_curves(CURVES),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(head_attribution, PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_every_organism_has_its_column(name):
    assert column_titles(PLOTS[name]()) == list(ATTACKS)


@pytest.mark.parametrize(
    "figure",
    [lambda: head_attribution.head_maps(EFFECTS), lambda: head_attribution.by_position(EFFECTS, TOKENS)],
    ids=["heads", "positions"],
)
def test_maps_have_one_scale_for_all_with_zero_in_the_middle(figure):
    images = [axes.get_images()[0] for axes in figure().axes[:2]]
    bound = max(np.abs(values).max() for values in EFFECTS.values())
    assert [image.get_clim() for image in images] == [(-bound, bound)] * 2
    for image, values in zip(images, EFFECTS.values(), strict=True):
        assert np.array_equal(image.get_array(), values)


def test_tokens_of_the_template_are_spelt_out():
    labels = [label.get_text() for label in head_attribution.by_position(POSITIONS, TOKENS).axes[0].get_xticklabels()]
    assert labels == [" film", "<end>", "\\n", "<start>"]


def test_sorted_effects_run_over_ranks_with_their_intervals():
    figure = head_attribution.sorted_effects(INTERVALS, few=3)
    axes = figure.axes[0]
    dots, _, (bars,) = axes.containers[0]
    assert dots.get_xdata().tolist() == list(range(1, 21))
    assert dots.get_ydata().tolist() == [row["value"] for row in INTERVALS[ATTACKS[0]]]
    ends = np.array([segment[:, 1] for segment in bars.get_segments()])
    assert ends == pytest.approx(np.array([[row["low"], row["high"]] for row in INTERVALS[ATTACKS[0]]]))
    assert legend(figure) == ["90 % of all heads", "3 % of the heads", "head"]
    vertical = next(line for line in axes.get_lines() if line.get_label() == "3 % of the heads")
    assert vertical.get_xdata() == [3.5, 3.5]


def test_the_estimate_is_drawn_against_the_exact_effect():
    figure = head_attribution.gradient_against_exact(EFFECTS, POSITIONS, NOTES)
    for axes, name in zip(figure.axes, ATTACKS, strict=True):
        diagonal, dots = axes.get_lines()
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
        assert np.array_equal(dots.get_xdata(), EFFECTS[name].ravel())
        assert np.array_equal(dots.get_ydata(), POSITIONS[name].ravel())
        assert [text.get_text() for text in axes.texts] == [f"shared by {name}"]


@pytest.mark.parametrize("order", [ATTACKS, ATTACKS[::-1]], ids=["one way", "other way"])
def test_every_organism_has_a_square_of_its_own_that_holds_all_dots(order):
    exact = {name: (1 + 9 * (name == ATTACKS[0])) * EFFECTS[name] for name in order}
    figure = head_attribution.gradient_against_exact(exact, exact, NOTES)
    for axes, values in zip(figure.axes, exact.values(), strict=True):
        assert axes.get_xlim() == axes.get_ylim()
        assert np.abs(values).max() < axes.get_xlim()[1] < 1.2 * np.abs(values).max()


def test_components_are_lines_over_layers_with_their_intervals():
    figure = head_attribution.components(PARTS)
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[1].get_lines()}
    assert lines == {name: [0.1, 0.5] for name in ("attention", "MLP", "residual")}
    assert bands(figure.axes[1]) == [(0.0, 0.6)] * 3
    assert legend(figure) == ["attention", "MLP", "residual"]


def test_ablation_curves_start_at_the_untouched_model_and_average_random_draws():
    figure = head_attribution.ablation_curves(CURVES)
    top, bottom = figure.axes[0], figure.axes[2]
    lines = {line.get_label(): line for line in top.get_lines()}
    assert list(lines) == legend(figure) == list(RANKINGS)
    for name in ("ACIE", "gradient", "necessity"):
        assert list(lines[name].get_xdata()) == [0, 1, 8]
        assert lines[name].get_ydata() == pytest.approx([100, 80, 10])
    assert list(lines["random"].get_xdata()) == [0, 8]
    assert lines["random"].get_ydata() == pytest.approx([96, 70])
    assert bands(top) == [pytest.approx(band) for band in ((0, 100), (0, 100), (0, 100), (50, 96))]
    assert all(line.get_ydata() == pytest.approx([90] * len(line.get_xdata())) for line in bottom.get_lines())
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["0", "1", "8"]
    mean = head_attribution.ablation_curves(CURVES, kind="mean").axes[0].get_lines()[0]
    assert mean.get_ydata() == pytest.approx([100, 40, 40])
