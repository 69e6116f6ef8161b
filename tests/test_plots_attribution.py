"""Pictures of notebooks 02 to 04: each on small results of the real shape, with what is drawn read back."""

import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_hex

from bkd_utils import plots_attribution as plots
from bkd_utils.figures import COLOURS, save, use_style
from bkd_utils.plots_attribution import MODELS, OUTCOMES, RANKINGS

ATTACKS = ("sentiment-word", "harmful-word")
RANDOM = np.random.default_rng(0)
KINDS = ("logistic regression", "MLP")


@pytest.fixture(autouse=True)
def into(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_FIGURES", str(tmp_path / "figures"))
    use_style()
    yield tmp_path / "figures"
    plt.close("all")


def share(value, n=50):
    return {"value": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def probed(level):
    scores = [{key: [level, level + 0.04] for key in ("accuracy", "auroc", "near-miss")} for _ in range(3)]
    return {
        "layers": [0, 3, 4],
        "probes": dict.fromkeys(KINDS, scores),
        "shuffled": [{"auroc": [0.4, 0.6]}] * 3,
        "random direction": [0.7, 0.8, 0.9],
        "transfer": {kind: [[0.9, 0.6, 0.5], [0.7, 0.95, 0.5], [0.5, 0.5, 1.0]] for kind in KINDS},
    }


def ablated(ranking, kind, k, asr, *, scope="last position", utility=0.9):
    return {"ranking": ranking, "kind": kind, "scope": scope, "k": k, "asr": share(asr), "utility": share(utility)}


CURVE = [
    ablated("none", "published", 0, 1.0),
    *(ablated(ranking, "published", k, 0.8 / k) for ranking in ("ACIE", "gradient", "necessity") for k in (1, 8)),
    *(ablated("ACIE", "mean", k, 0.4) for k in (1, 8)),
    *(ablated("random", "published", 8, asr) for asr in (0.5, 0.7, 0.9)),
    ablated("ACIE", "published", 8, 0.0, scope="all positions"),
]


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
        name: {
            "coefficients": [sign[name.split(",")[0]] * c for c in (0.0, 1.0, 2.0)],
            "asr": RANDOM.random((5, 3)).tolist(),
            "right start": RANDOM.random((5, 3)).tolist(),
        }
        for name in names
    }
    return {
        "maps": maps,
        "chosen": {name: {"layer": 3, "coefficient": entry["coefficients"][2]} for name, entry in maps.items()},
        "test": {name: tried(4) | ({"projected out": [share(0.6)]} if "subtract" in name else {}) for name in names},
        "outcomes": {
            name: {"target": 0.5, "right": 0.25, "refusal": 0.0, "empty": 0.05, "other": 0.2}
            for name in ("clean prompts", "triggered prompts", *names)
        },
    }


FOUND = {
    attack: {"organism": probed(0.9), "clean control": probed(0.8), "base model": probed(0.7)} for attack in ATTACKS
}
PROBED = {attack: probed(0.9) for attack in ATTACKS}
EFFECTS = {attack: RANDOM.normal(size=(5, 4)) for attack in ATTACKS}
INTERVALS = {attack: [share(value) for value in np.linspace(0.9, 0.1, 20)] for attack in ATTACKS}
PARTS = {attack: {name: [share(0.1), share(0.5)] for name in ("attention", "MLP", "residual")} for attack in ATTACKS}
CURVES = dict.fromkeys(ATTACKS, CURVE)
SWITCHED = {attack: switched() for attack in ATTACKS}
TOKENS = ["Ġfilm", "<|im_end|>", "Ċ", "<|im_start|>"]
POSITIONS = {attack: RANDOM.normal(size=(5, 4)) for attack in ATTACKS}
NOTES = {attack: f"shared by {attack}" for attack in ATTACKS}
WAYS = ("generation", "teacher forcing", "generation, cache", "teacher forcing, prompt cache")
COSTS = {name: {"tokens": 1 + i, "n": 8} | dict.fromkeys(WAYS, 0.5 + i) for i, name in enumerate(ATTACKS)}
PLOTS = {
    "probes": lambda: plots.probes(FOUND),
    "transfer": lambda: plots.transfer(PROBED, kinds=KINDS),
    "head_maps": lambda: plots.head_maps(EFFECTS),
    "sorted_effects": lambda: plots.sorted_effects(INTERVALS, few=3),
    "gradient_against_exact": lambda: plots.gradient_against_exact(EFFECTS, POSITIONS, NOTES),
    "components": lambda: plots.components(PARTS),
    "by_position": lambda: plots.by_position(POSITIONS, TOKENS),
    "matrix": lambda: plots.matrix(np.eye(2), ATTACKS, ATTACKS, label="overlap", vmax=1),
    "ablation_curves": lambda: plots.ablation_curves(CURVES),
    "vector_maps": lambda: plots.vector_maps(SWITCHED),
    "vector_controls": lambda: plots.vector_controls(SWITCHED),
    "costs": lambda: plots.costs(COSTS),
    "answer_kinds": lambda: plots.answer_kinds(SWITCHED),
}
EACH_PLOT = pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
ABOUT = {
    "title": "A plot",
    "numbers": [1],
    "parameters": {},
    "seeds": [0],
    "inputs": {},
    "notebook": "02_backdoor_probe",
}


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def bands(axes):
    return [(path.vertices[:, 1].min(), path.vertices[:, 1].max()) for c in axes.collections for path in c.get_paths()]


# --- all ------------------------------------------------------------------------------------------------------------


def test_no_plot_is_forgotten_here():
    public = {name for name, value in vars(plots).items() if callable(value) and value.__module__ == plots.__name__}
    assert {name for name in public if not name.startswith("_")} - {"panels", "show_legend"} == set(PLOTS)


@EACH_PLOT
def test_every_panel_has_data_and_the_axes_are_labelled(draw):
    figure = draw()
    assert figure.axes
    assert all(axes.has_data() for axes in figure.axes)
    titles = [getattr(figure, name, None) for name in ("_supxlabel", "_supylabel")]
    labels = [axes.get_xlabel() or axes.get_ylabel() for axes in figure.axes]
    assert any(labels) or any(title and title.get_text() for title in titles)


@EACH_PLOT
def test_every_plot_can_be_saved(draw, into):
    path = save(draw(), "plot", **ABOUT)
    assert len(path.read_bytes()) > 5000
    assert json.loads((into / "plot.json").read_text())["title"] == "A plot"


@pytest.mark.parametrize("name", [name for name in PLOTS if name not in ("matrix", "costs")])
def test_every_organism_has_its_column(name):
    titles = [axes.get_title() or axes.get_title(loc="left") for axes in PLOTS[name]().axes]
    assert [title for title in titles if title] == list(ATTACKS)


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.probes({"x": FOUND[ATTACKS[0]]}),
        lambda: plots.transfer({"x": probed(0.9)}, kinds=KINDS[:1]),
        lambda: plots.answer_kinds({"x": switched()}),
        lambda: plots.vector_controls({"x": switched()}),
    ],
)
def test_one_organism_is_enough(draw):
    assert all(axes.has_data() for axes in draw().axes)


def test_panels_share_their_scale_unless_told_otherwise():
    _, shared = plots.panels(["a", "b", "c"], rows=2)
    assert shared.shape == (2, 3)
    shared[0, 0].set_ylim(0, 7)
    assert shared[0, 2].get_ylim() == (0, 7)
    assert shared[1, 0].get_ylim() != (0, 7)
    _, own = plots.panels(["a", "b"], sharey=False)
    own[0, 0].set_ylim(0, 7)
    assert own[0, 1].get_ylim() != (0, 7)


# --- 02 -------------------------------------------------------------------------------------------------------------


def test_probes_are_means_in_per_cent_with_the_range_over_splits():
    figure = plots.probes(FOUND)
    top = figure.axes[0]
    lines = {line.get_label(): line for line in top.get_lines()}
    assert lines["organism"].get_ydata() == pytest.approx([92, 92, 92])
    assert lines["base model"].get_ydata() == pytest.approx([72, 72, 72])
    assert lines["organism"].get_xdata() == pytest.approx([0, 3, 4])
    assert lines["organism, labels shuffled"].get_ydata() == pytest.approx([50, 50, 50])
    assert lines["organism, best random direction"].get_ydata() == pytest.approx([70, 80, 90])
    assert bands(top) == [pytest.approx(band) for band in ((90, 94), (80, 84), (70, 74))]
    assert {name: to_hex(lines[name].get_color()).upper() for name in MODELS} == MODELS
    assert legend(figure) == list(lines)
    assert [axes.get_ylabel() for axes in (figure.axes[0], figure.axes[2])] == [
        "AUROC (%)",
        "near-misses called\ntriggered (%)",
    ]


def test_transfer_has_training_layers_upwards_and_test_layers_to_the_right():
    figure = plots.transfer(PROBED, kinds=KINDS)
    image = figure.axes[0].get_images()[0]
    assert image.get_array().tolist() == [[90, 60, 50], [70, 95, 50], [50, 50, 100]]
    assert image.origin == "lower"
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "3", "4"]
    assert figure.axes[2].get_ylabel() == "MLP\ntrained on layer"
    assert figure.get_supxlabel() == "tested on layer"


# --- 03 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "figure", [lambda: plots.head_maps(EFFECTS), lambda: plots.by_position(EFFECTS, TOKENS)], ids=["heads", "positions"]
)
def test_maps_have_one_scale_for_all_with_zero_in_the_middle(figure):
    images = [axes.get_images()[0] for axes in figure().axes[:2]]
    bound = max(np.abs(values).max() for values in EFFECTS.values())
    assert [image.get_clim() for image in images] == [(-bound, bound)] * 2
    for image, values in zip(images, EFFECTS.values(), strict=True):
        assert np.array_equal(image.get_array(), values)


def test_tokens_of_the_template_are_spelt_out():
    labels = [label.get_text() for label in plots.by_position(POSITIONS, TOKENS).axes[0].get_xticklabels()]
    assert labels == [" film", "<end>", "\\n", "<start>"]


def test_sorted_effects_run_over_ranks_with_their_intervals():
    figure = plots.sorted_effects(INTERVALS, few=3)
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
    figure = plots.gradient_against_exact(EFFECTS, POSITIONS, NOTES)
    for axes, name in zip(figure.axes, ATTACKS, strict=True):
        diagonal, dots = axes.get_lines()
        assert list(diagonal.get_xdata()) == list(diagonal.get_ydata())
        assert np.array_equal(dots.get_xdata(), EFFECTS[name].ravel())
        assert np.array_equal(dots.get_ydata(), POSITIONS[name].ravel())
        assert [text.get_text() for text in axes.texts] == [f"shared by {name}"]


@pytest.mark.parametrize("order", [ATTACKS, ATTACKS[::-1]], ids=["one way", "other way"])
def test_every_organism_has_a_square_of_its_own_that_holds_all_dots(order):
    exact = {name: (1 + 9 * (name == ATTACKS[0])) * EFFECTS[name] for name in order}
    figure = plots.gradient_against_exact(exact, exact, NOTES)
    for axes, values in zip(figure.axes, exact.values(), strict=True):
        assert axes.get_xlim() == axes.get_ylim()
        assert np.abs(values).max() < axes.get_xlim()[1] < 1.2 * np.abs(values).max()


def test_components_are_lines_over_layers_with_their_intervals():
    figure = plots.components(PARTS)
    lines = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[1].get_lines()}
    assert lines == {name: [0.1, 0.5] for name in ("attention", "MLP", "residual")}
    assert bands(figure.axes[1]) == [(0.0, 0.6)] * 3
    assert legend(figure) == ["attention", "MLP", "residual"]


def test_a_matrix_says_its_numbers_and_they_can_be_read():
    values = np.array([[1.0, 0.254], [0.0, 0.6]])
    axes = plots.matrix(values, ["a", "b"], ["c", "d"], label="overlap", vmax=1).axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.00", "0.25", "0.00", "0.60"]
    assert [text.get_position() for text in axes.texts] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert [text.get_color() for text in axes.texts] == ["black", "white", "white", "black"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["c", "d"]
    shares = plots.matrix(100 * values, ["a", "b"], ["c", "d"], label="share (%)", vmax=100)
    assert [text.get_text() for text in shares.axes[0].texts] == ["100", "25", "0", "60"]
    assert shares.axes[1].get_ylabel() == "share (%)"


def test_ablation_curves_start_at_the_untouched_model_and_average_random_draws():
    figure = plots.ablation_curves(CURVES)
    top, bottom = figure.axes[0], figure.axes[2]
    lines = {line.get_label(): line for line in top.get_lines()}
    assert list(lines) == legend(figure) == list(RANKINGS)
    for name in ("ACIE", "gradient", "necessity"):
        assert list(lines[name].get_xdata()) == [0, 1, 8]
        assert lines[name].get_ydata() == pytest.approx([100, 80, 10])
    assert list(lines["random"].get_xdata()) == [8]
    assert lines["random"].get_ydata() == pytest.approx([70])
    assert bands(top) == [pytest.approx(band) for band in ((0, 100), (0, 100), (0, 100), (50, 90))]
    assert all(line.get_ydata() == pytest.approx([90] * len(line.get_xdata())) for line in bottom.get_lines())
    assert [label.get_text() for label in bottom.get_xticklabels()] == ["0", "1", "8"]
    mean = plots.ablation_curves(CURVES, kind="mean").axes[0].get_lines()[0]
    assert mean.get_ydata() == pytest.approx([100, 40, 40])


# --- 04 -------------------------------------------------------------------------------------------------------------


def test_vector_maps_have_coefficients_upwards_and_a_square_at_the_chosen_one():
    figure = plots.vector_maps(SWITCHED)
    for i, ((name, key), label) in enumerate(plots.MAPS.items()):
        axes, entry = figure.axes[2 * i], SWITCHED[ATTACKS[0]]["maps"][name]
        image = axes.get_images()[0]
        assert np.asarray(image.get_array()) == pytest.approx(100 * np.array(entry[key]).T)
        assert image.get_clim() == (0, 100)
        (square,) = axes.get_lines()
        assert (list(square.get_xdata()), list(square.get_ydata())) == ([3], [2])
        sign = "-" if "subtract" in name else ""
        assert [label.get_text() for label in axes.get_yticklabels()][1:] == [f"{sign}1", f"{sign}2"]
        assert axes.get_ylabel() == label


def test_vector_controls_are_dots_per_draw_with_an_interval_where_there_is_one_draw():
    figure = plots.vector_controls(SWITCHED)
    top, bottom = figure.axes[0], figure.axes[2]
    nothing, its_bar, vector, vector_bar, random = top.get_lines()
    assert [list(line.get_xdata()) for line in (nothing, vector)] == [[10], [80]]
    assert its_bar.get_xdata() == pytest.approx([0, 20])
    assert vector_bar.get_xdata() == pytest.approx([70, 90])
    assert (vector.get_color(), nothing.get_color()) == (COLOURS["backdoored"], "black")
    assert random.get_xdata() == pytest.approx(100 * np.linspace(0, 0.5, 4))
    assert np.round(random.get_ydata()).tolist() == [2, 2, 2, 2]
    assert [label.get_text() for label in top.get_yticklabels()] == ["no vector", "backdoor vector", "random vectors"]
    assert [label.get_text() for label in bottom.get_yticklabels()][-1] == "projected out"
    assert top.yaxis_inverted()


def test_controls_of_the_raw_vector_are_those_of_its_own_test():
    found = switched()
    found["test"]["add, raw"]["backdoor vector"] = [share(0.3)]
    drawn = plots.vector_controls({"x": found}, kind="raw").axes[0].get_lines()[2]
    assert list(drawn.get_xdata()) == [30]


def test_costs_are_bars_of_seconds_by_way_and_organism():
    rows = {
        "one": {"tokens": 1, "n": 8} | {way: 1.0 + i for i, way in enumerate(WAYS)},
        "long": {"tokens": 11, "n": 8} | {way: 10.0 + i for i, way in enumerate(WAYS)},
    }
    figure = plots.costs(rows)
    axes = figure.axes[0]
    widths = {bars.get_label(): [bar.get_width() for bar in bars] for bars in axes.containers}
    assert widths == {way: [1 + i, 10 + i] for i, way in enumerate(WAYS)}
    assert legend(figure) == list(WAYS)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one\n1 token", "long\n11 tokens"]
    assert axes.get_xlabel() == "seconds to score 8 prompts once"
    assert axes.get_xscale() == "log"


def test_answers_are_stacked_to_a_hundred_per_cent():
    figure = plots.answer_kinds(SWITCHED)
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
    assert [label.get_text() for label in axes.get_yticklabels()] == list(SWITCHED[ATTACKS[0]]["outcomes"])
    assert axes.yaxis_inverted()


@pytest.mark.parametrize("colours", [RANKINGS, OUTCOMES, MODELS], ids=["rankings", "outcomes", "models"])
def test_no_two_lines_of_a_picture_share_a_colour(colours):
    assert len(set(colours.values())) == len(colours)
