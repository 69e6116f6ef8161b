"""Pictures of notebook 06 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pytest
from drawing import check_all, column_titles, legend, share

from bkd_utils import plots_cure as plots
from bkd_utils.plots_cure import COUNTED, KINDS

pytestmark = pytest.mark.usefixtures("style")
ATTACKS = ("sentiment-word", "instructions-prefix")


def result(asr, cacc):
    return {"asr": share(asr), "near_miss": share(0.2), "clean_firing": share(0.1), "cacc": share(cacc)}


FOUND = {
    attack: {
        "untreated": result(1.0, 0.9),
        "alignment": result(0.4, 0.8),
        "fine-tuning": result(0.7, 0.95),
        "random heads 1": result(0.6, 0.7),
        "random heads 2": result(0.8, 0.7),
    }
    for attack in ATTACKS
}
OF = {
    "random heads 1": "random heads",
    "random heads 2": "random heads",
    "untreated": "untreated",
    "alignment": "ASA, our reading",
    "fine-tuning": "rival",
}
MECHANISMS = {
    attack: {"similarity clean": [0.4, 0.75], "similarity triggered": [0.6, 0.8], "acie": [0.3, 0.1]}
    for attack in ATTACKS
}
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


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def dots(axes, marker="o"):
    """Single points that have a label, as (x, y) -> label."""
    found = {}
    for line in axes.get_lines():
        if len(line.get_xdata()) == 1 and line.get_marker() == marker:
            found[line.get_xdata()[0], line.get_ydata()[0]] = line.get_label()
    return found


def test_a_guard_that_one_organism_cannot_have_keeps_its_row_and_says_so():
    found = {"a": GUARDED[ATTACKS[0]] | {"RAP": GUARDED[ATTACKS[0]]["ONION"]}, "b": GUARDED[ATTACKS[1]]}
    figure = plots.guards(found)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ONION", "STRIP", "RAP"]
    assert [len(panel.get_lines()) for panel in figure.axes] == [12, 8]
    assert [texts(panel) for panel in figure.axes] == [[], ["not applicable"]]
    assert figure._supxlabel.get_text() == "inputs (%), n = 50 a side"


def test_treatments_are_rows_with_four_numbers_each():
    figure = plots.repairs(FOUND)
    axes = figure.axes[0]
    assert column_titles(figure) == [attack.replace("-", "-\n") for attack in ATTACKS]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(FOUND[ATTACKS[0]])
    assert legend(figure) == [name for name, *_ in COUNTED.values()]
    points = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    drawn = sorted(line.get_xdata()[0] for line in points if line.get_label() == "ASR")
    assert drawn == pytest.approx([40, 60, 70, 80, 100])
    assert {line.get_markerfacecolor() for line in points if line.get_label() == "clean firing"} == {"white"}
    assert len(points) == len(COUNTED) * len(FOUND[ATTACKS[0]])


def test_kinds_make_groups_of_rows_and_show_what_random_heads_leave():
    figure = plots.repairs(FOUND, kinds=OF)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:5] == ["untreated", "alignment", "random heads 1", "random heads 2", "fine-tuning"]
    assert labels[5:] == ["no treatment", "ASA and same heads", "ASA on other heads", "rivals"]
    ticks = figure.axes[0].get_yticks()
    assert list(ticks[:5]) == sorted(ticks[:5])
    assert ticks[5] < ticks[0] < ticks[6] < ticks[1] < ticks[7] < ticks[2]
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "ASR with random heads"]
    assert line.get_xdata() == pytest.approx([70, 70])


def test_an_organism_without_a_treatment_says_that_it_was_not_run():
    found = {"a": FOUND[ATTACKS[0]], "b": {"untreated": result(1.0, 0.9)}}
    axes = plots.repairs(found).axes[1]
    assert len(axes.get_lines()) == 2 * len(COUNTED)
    assert texts(axes) == ["not run"] * 4


def test_the_frontier_is_asr_against_what_cacc_has_lost():
    axes = plots.frontier(FOUND, OF).axes[0]
    places = {label: place for marker in "XoDv" for place, label in dots(axes, marker).items()}
    assert places["untreated"] == (0, 100)
    assert places["ASA, our reading"] == (pytest.approx(10), pytest.approx(40))
    assert places["rival"] == (pytest.approx(-5), pytest.approx(70))
    bars = [line for line in axes.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    assert [list(line.get_ydata()) for line in bars] == [pytest.approx([30, 50]), pytest.approx([40, 40])]
    assert list(bars[1].get_xdata()) == pytest.approx([0, 20])


def test_the_best_treatments_are_named_unless_the_legend_does():
    assert texts(plots.frontier(FOUND, OF).axes[0]) == ["fine-tuning"]
    useless = FOUND[ATTACKS[0]] | {"fine-tuning": result(1.0, 0.95)}
    assert texts(plots.frontier({"a": useless}, OF).axes[0]) == []


def test_equal_treatments_do_not_hide_each_other():
    found = FOUND[ATTACKS[0]] | {"consistency": result(0.7, 0.95)}
    axes = plots.frontier({"a": found}, OF | {"consistency": "rival"}).axes[0]
    (one, y), (other, same) = sorted(dots(axes, "D"))
    assert one == pytest.approx(-5)
    assert other > one + 0.5
    assert y == same
    assert texts(axes) == ["fine-tuning", "consistency"]


def test_names_cover_no_dot_and_no_other_name():
    dots = [(5, 0), (20, 3), (20, 12)]
    assert plots._free(0, 6, 15, dots=dots, spans=[]) == 0
    assert plots._free(0, 6, 30, dots=dots, spans=[]) == 18
    assert plots._free(0, 6, 15, dots=dots, spans=[(10, 20, 1)]) == 9
    assert plots._free(90, 6, 15, dots=[(10, 92)], spans=[]) == 86
    assert plots._free(1, 6, 15, dots=[(10, height) for height in range(0, 105, 5)], spans=[]) == 1


def test_the_goal_is_what_the_judge_lets_pass():
    found = FOUND[ATTACKS[0]] | {"clean control": result(0.12, 0.9)}
    axes = plots.frontier({"a": found}, OF | {"clean control": "clean control"}).axes[0]
    dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert dotted[0].get_xdata() == pytest.approx([2, 2])  # one prompt of fifty
    assert dotted[1].get_ydata() == pytest.approx([12, 12])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_frontier_has_a_panel_for_each_organism(count):
    figure = plots.frontier({f"organism {i}": FOUND[ATTACKS[0]] for i in range(count)}, OF)
    assert sum(axes.get_visible() for axes in figure.axes) == count


def test_a_mechanism_shows_the_gap_before_and_after():
    figure = plots.mechanisms(MECHANISMS)
    above, below = figure.axes[0], figure.axes[2]
    assert texts(above) == ["+0.20", "+0.05"]
    assert [list(line.get_ydata()) for line in above.get_lines()] == [[0.6, 0.8], [0.4, 0.75]]
    assert [list(line.get_ydata()) for line in below.get_lines()] == [[0.3, 0.1]]
    assert legend(figure) == ["triggered prompts", "clean prompts"]
    assert column_titles(figure) == list(ATTACKS)


def test_relearning_has_its_counts_as_ticks_and_names_the_treatment():
    figure = plots.relearning(LEARNED, method="fine-pruning")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["before", "4", "16"]
    drawn = [container[0] for container in axes.containers]
    assert [list(line.get_ydata()) for line in drawn[:2]] == [pytest.approx([0, 20, 80]), pytest.approx([10, 10, 10])]
    columns = np.array([line.get_xdata() for line in drawn])
    assert len(np.unique(columns)) == columns.size  # no dot above another
    assert np.abs(columns - np.arange(3)).max() < 0.5
    assert legend(figure)[:2] == ["organism after fine-pruning: ASR", "organism after fine-pruning: clean firing"]


def test_no_two_kinds_look_alike():
    assert len({colour for colour, _ in KINDS.values()}) == len({mark for _, mark in KINDS.values()}) == len(KINDS)
