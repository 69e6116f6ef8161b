"""Pictures of notebook 06 on small results of the real shape, with what is drawn read back."""

import pytest
from drawing import check_all, column_titles, legend, share

from bkd_utils import plots_cure as plots
from bkd_utils.plots_cure import KINDS, NAMES

pytestmark = pytest.mark.usefixtures("style")
ATTACKS = ("sentiment-word", "instructions-prefix")


def result(asr, cacc):
    return {"asr": share(asr), "near_miss": share(0.2), "cacc": share(cacc)}


FOUND = {
    attack: {"untreated": result(1.0, 0.9), "alignment": result(0.4, 0.8), "fine-tuning": result(0.7, 0.95)}
    for attack in ATTACKS
}
OF = {"untreated": "untreated", "alignment": "ASA, our reading", "fine-tuning": "rival"}
MECHANISMS = {attack: {"similarity": [0.6, 0.8], "acie": [0.3, 0.1]} for attack in ATTACKS}
LEARNED = {
    attack: {
        name: [{"poisoned": n, "asr": share(n / 20), "clean firing": share(0.1)} for n in (0, 4, 16)]
        for name in ("treated", "clean control")
    }
    for attack in ATTACKS
}
GUARDED = {
    attack: {name: {"caught": share(0.9), "refused": share(0.1)} for name in ("ONION", "STRIP")} for attack in ATTACKS
}
PLOTS = {
    "repairs": lambda: plots.repairs(FOUND),
    "frontier": lambda: plots.frontier(FOUND, OF),
    "mechanisms": lambda: plots.mechanisms(MECHANISMS),
    "relearning": lambda: plots.relearning(LEARNED),
    "guards": lambda: plots.guards(GUARDED),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(plots, PLOTS)


@pytest.mark.parametrize("name", ["frontier", "relearning", "guards"])
def test_every_organism_has_its_column(name):
    assert column_titles(PLOTS[name]()) == list(ATTACKS)


def test_a_guard_that_only_one_organism_has_keeps_its_row_and_its_name():
    found = {"a": GUARDED[ATTACKS[0]] | {"RAP": GUARDED[ATTACKS[0]]["ONION"]}, "b": GUARDED[ATTACKS[1]]}
    axes = plots.guards(found).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["ONION", "STRIP", "RAP"]
    assert [len(panel.get_lines()) for panel in axes] == [12, 8]


def test_treatments_are_rows_with_three_numbers_each():
    figure = plots.repairs(FOUND)
    axes = figure.axes[0]
    assert column_titles(figure) == [attack.replace("-", "-\n") for attack in ATTACKS]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(FOUND[ATTACKS[0]])
    assert legend(figure) == list(NAMES.values())
    dots = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    assert sorted(line.get_xdata()[0] for line in dots) == pytest.approx([20, 20, 20, 40, 70, 80, 90, 95, 100])


def test_an_organism_without_a_treatment_leaves_its_row_empty():
    found = {"a": FOUND[ATTACKS[0]], "b": {"untreated": result(1.0, 0.9)}}
    assert len(plots.repairs(found).axes[1].get_lines()) == 2 * len(NAMES)


def test_the_frontier_is_asr_against_what_cacc_has_lost():
    axes = plots.frontier(FOUND, OF).axes[0]
    dots = {line.get_label(): (line.get_xdata()[0], line.get_ydata()[0]) for line in axes.get_lines()[:3]}
    assert dots["untreated"] == (0, 100)
    assert dots["ASA, our reading"] == (pytest.approx(10), pytest.approx(40))
    assert dots["rival"] == (pytest.approx(-5), pytest.approx(70))


def test_relearning_has_its_counts_as_ticks():
    axes = plots.relearning(LEARNED).axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "4", "16"]
    solid, dotted = [line for line in axes.get_lines() if len(line.get_ydata()) == 3][:2]
    assert sorted([list(solid.get_ydata()), list(dotted.get_ydata())]) == [
        pytest.approx([0, 20, 80]),
        pytest.approx([10, 10, 10]),
    ]


def test_no_two_kinds_look_alike():
    assert len({colour for colour, _ in KINDS.values()}) == len({mark for _, mark in KINDS.values()}) == len(KINDS)
