"""Pictures of notebook 02 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pytest
from drawing import bands, check_all, column_titles, legend

from bkd_utils.experiments.backdoor_probe import ProbeResult
from bkd_utils.reports import backdoor_probe
from bkd_utils.reports.style import COLOURS, MODELS

pytestmark = pytest.mark.usefixtures("style")
ATTACKS = ("sentiment-word", "harmful-word")
KINDS = ("logistic regression", "MLP")


def probed(level):
    scores = [
        {key: [level, level + 0.04] for key in ("accuracy", "auroc", "near_miss")}
        | {"separation": [10 * level + i, 10 * level + i + 1]}
        for i in range(3)
    ]
    return ProbeResult(
        layers=[0, 3, 4],
        probes=dict.fromkeys(KINDS, scores),
        post_norm=[],
        shuffled=[{"auroc": [0.4, 0.6]}] * 3,
        random_direction=[0.7, 0.8, 0.9],
        transfer={kind: [[0.9, 0.6, 0.5], [0.7, 0.95, 0.5], [0.5, 0.5, 1.0]] for kind in KINDS},
    )


FOUND = {
    attack: {"organism": probed(0.9), "clean control": probed(0.8), "base model": probed(0.7)} for attack in ATTACKS
}
PROBED = {attack: probed(0.9) for attack in ATTACKS}
PLOTS = {
    "probes": lambda: backdoor_probe.probes(FOUND, n=48),
    "transfer": lambda: backdoor_probe.transfer(PROBED, kinds=KINDS, n=48),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(backdoor_probe, PLOTS)


@pytest.mark.parametrize("name", PLOTS)
def test_every_organism_has_its_column(name):
    assert column_titles(PLOTS[name]()) == list(ATTACKS)


def test_one_organism_is_enough():
    for figure in (
        backdoor_probe.probes({"x": FOUND[ATTACKS[0]]}, n=48),
        backdoor_probe.transfer({"x": probed(0.9)}, kinds=KINDS[:1], n=48),
    ):
        assert all(axes.has_data() for axes in figure.axes)


def test_probes_are_means_in_per_cent_with_the_range_over_splits():
    figure = backdoor_probe.probes(FOUND, n=48)
    top = figure.axes[0]
    lines = {line.get_label(): line for line in top.get_lines()}
    assert lines["organism"].get_ydata() == pytest.approx([92, 92, 92])
    assert lines["base model"].get_ydata() == pytest.approx([72, 72, 72])
    assert lines["organism"].get_xdata() == pytest.approx([0, 3, 4])
    assert lines["organism, labels shuffled"].get_ydata() == pytest.approx([50, 50, 50])
    assert lines["organism, best random direction"].get_ydata() == pytest.approx([70, 80, 90])
    assert bands(top) == [pytest.approx(band) for band in ((90, 94), (80, 84), (70, 74))]
    assert {name: lines[name].get_color() for name in MODELS} == {name: COLOURS[name] for name in MODELS}
    assert lines["organism, best random direction"].get_color() == COLOURS["random"]
    assert legend(figure) == [*lines, "range over 2 splits"]
    assert "n = 48 prompts" in figure.get_supxlabel()
    assert [axes.get_ylabel() for axes in figure.axes[::2]] == [
        "AUROC (%)",
        "separation (d')",
        "near-misses called\ntriggered (%)",
    ]


def test_the_separation_is_drawn_as_it_is_and_near_misses_in_per_cent():
    figure = backdoor_probe.probes(FOUND, n=48)
    middle, below = ({line.get_label(): line for line in figure.axes[i].get_lines()} for i in (2, 4))
    assert list(middle) == list(below) == list(MODELS)
    assert middle["organism"].get_ydata() == pytest.approx([9.5, 10.5, 11.5])
    assert middle["base model"].get_ydata() == pytest.approx([7.5, 8.5, 9.5])
    assert bands(figure.axes[2])[0] == pytest.approx((9, 12))
    assert below["clean control"].get_ydata() == pytest.approx([82, 82, 82])
    assert figure.axes[2].get_ylim()[0] == 0


def test_transfer_has_training_layers_upwards_and_test_layers_to_the_right():
    figure = backdoor_probe.transfer(PROBED, kinds=KINDS, n=48)
    axes = figure.axes[0]
    assert np.array_equal(axes.collections[0].get_array(), [[90, 60, 50], [70, 95, 50], [50, 50, 100]])
    assert axes.get_ylim() == (0, 3)  # layer 0 at the bottom
    assert axes.collections[0].get_clim() == (50, 100)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["0", "3", "4"]
    assert figure.axes[2].get_ylabel() == "MLP\ntrained on layer"
    assert figure.get_supxlabel() == "tested on layer (n = 48 prompts, clean and triggered)"
