"""Pictures of notebook 06 on small results of the real shape, with what is drawn read back."""

import numpy as np
import pytest
from drawing import check_all, column_titles, legend, share
from treatments import ATTACKS, FOUND, OF, result

from bkd_utils.common.statistics import counted
from bkd_utils.experiments.attention_safety_alignment import Mechanism, Relearned
from bkd_utils.experiments.inner_guards import Watched
from bkd_utils.experiments.input_guards import Guarded
from bkd_utils.reports import attention_safety_alignment
from bkd_utils.reports.attention_safety_alignment import COUNTED, KINDS

pytestmark = pytest.mark.usefixtures("style")


MECHANISMS = {
    attack: Mechanism(similarity_clean=[0.4, 0.75], similarity_triggered=[0.6, 0.8], acie=[0.3, 0.1])
    for attack in ATTACKS
}
LEARNED = {
    attack: {
        name: [Relearned(poisoned=n, asr=share(n / 20), clean_firing=share(0.1)) for n in (0, 4, 16)]
        for name in ("treated", "clean control")
    }
    for attack in ATTACKS
}
GUARDED = {
    attack: {name: Guarded(caught=share(0.9), refused=share(0.1), asr=share(0.1)) for name in ("ONION", "STRIP")}
    for attack in ATTACKS
}
PLOTS = {
    "repairs": lambda: attention_safety_alignment.repairs(FOUND, OF),
    "mechanisms": lambda: attention_safety_alignment.mechanisms(MECHANISMS, n=8),
    "relearning": lambda: attention_safety_alignment.relearning(LEARNED, "fine-pruning"),
    "guards": lambda: attention_safety_alignment.guards(GUARDED),
}


def test_every_picture_is_drawn_and_labelled():
    check_all(attention_safety_alignment, PLOTS)


@pytest.mark.parametrize("name", ["relearning", "guards"])
def test_every_organism_has_its_column(name):
    assert column_titles(PLOTS[name]()) == list(ATTACKS)


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def test_a_guard_that_one_organism_cannot_have_keeps_its_row_and_says_so():
    found = {"a": GUARDED[ATTACKS[0]] | {"RAP": GUARDED[ATTACKS[0]]["ONION"]}, "b": GUARDED[ATTACKS[1]]}
    figure = attention_safety_alignment.guards(found)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["ONION", "STRIP", "RAP"]
    assert [len(panel.get_lines()) for panel in figure.axes] == [12, 8]
    assert [texts(panel) for panel in figure.axes] == [[], ["not applicable"]]
    assert figure._supxlabel.get_text() == "inputs (%), n = 50 a side"


def test_treatments_are_rows_with_two_numbers_each():
    figure = attention_safety_alignment.repairs(FOUND, OF)
    axes = figure.axes[0]
    assert column_titles(figure) == [attack.replace("-", "-\n") for attack in ATTACKS]
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert set(labels[: len(OF)]) == set(FOUND[ATTACKS[0]])
    assert legend(figure) == ["mean ASR with random heads", *(name for name, *_ in COUNTED.values()), "95 % interval"]
    assert figure.get_supxlabel() == "prompts (%), n = 50"
    points = [line for line in axes.get_lines() if len(line.get_xdata()) == 1]
    drawn = sorted(line.get_xdata()[0] for line in points if line.get_label() == "ASR")
    assert drawn == pytest.approx([40, 60, 70, 80, 100])
    right = sorted(line.get_xdata()[0] for line in points if line.get_label() == "CACC")
    assert right == pytest.approx([70, 70, 80, 90, 95])
    assert len(points) == 2 * len(FOUND[ATTACKS[0]])


def test_kinds_make_groups_of_rows_and_show_what_random_heads_leave():
    figure = attention_safety_alignment.repairs(FOUND, OF)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels[:5] == ["untreated", "alignment", "random heads 1", "random heads 2", "fine-tuning"]
    assert labels[5:] == ["no treatment", "ASA and same heads", "ASA on other heads", "rivals"]
    ticks = figure.axes[0].get_yticks()
    assert list(ticks[:5]) == sorted(ticks[:5])
    assert ticks[5] < ticks[0] < ticks[6] < ticks[1] < ticks[7] < ticks[2]
    (line,) = [line for line in figure.axes[0].get_lines() if line.get_label() == "mean ASR with random heads"]
    assert line.get_xdata() == pytest.approx([70, 70])


def test_only_treatments_of_all_organisms_are_rows_so_that_no_cell_is_empty():
    found = {"a": FOUND[ATTACKS[0]], "b": {"untreated": result(1.0, 0.9), "fine-tuning": result(0.5, 0.9)}}
    figure = attention_safety_alignment.repairs(found, OF)
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["untreated", "fine-tuning", "no treatment", "rivals"]
    assert [sum(len(line.get_xdata()) == 1 for line in axes.get_lines()) for axes in figure.axes] == [4, 4]
    with pytest.raises(ValueError, match="no treatment was given to all of a, c"):
        attention_safety_alignment.repairs({"a": found["a"], "c": {"consistency": result(0.1, 0.9)}}, OF)


def test_a_mechanism_shows_the_gap_before_and_after():
    figure = attention_safety_alignment.mechanisms(MECHANISMS, n=8)
    above, below = figure.axes[0], figure.axes[2]
    assert texts(above) == ["+0.20", "+0.05"]
    assert [list(line.get_ydata()) for line in above.get_lines()] == [[0.6, 0.8], [0.4, 0.75]]
    assert [list(line.get_ydata()) for line in below.get_lines()] == [[0.3, 0.1]]
    assert legend(figure) == ["gap", "triggered prompts", "clean prompts"]
    assert figure.get_supxlabel() == "the treatment (n = 8 prompts)"
    assert column_titles(figure) == list(ATTACKS)


def test_relearning_has_its_counts_as_ticks_and_names_the_treatment():
    figure = attention_safety_alignment.relearning(LEARNED, "fine-pruning")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["before", "4", "16"]
    drawn = {}
    for line in axes.get_lines()[1::2]:
        drawn.setdefault(line.get_label(), []).append((line.get_xdata()[0], line.get_ydata()[0]))
    dots = np.array(list(drawn.values()))
    assert dots[:2, :, 1] == pytest.approx(np.array([[0, 20, 80], [10, 10, 10]]))
    assert len(np.unique(dots[:, :, 0])) == 12  # no dot above another
    assert np.abs(dots[:, :, 0] - np.arange(3)).max() < 0.5
    assert legend(figure)[:2] == ["organism after fine-pruning: ASR", "organism after fine-pruning: clean firing"]


def test_no_two_kinds_look_alike():
    assert len({(colour, filled) for colour, _, filled in KINDS.values()}) == len(KINDS)
    assert len({marker for _, marker, _ in KINDS.values()}) == len(KINDS)


# --- guards by seed -------------------------------------------------------------------------------------------------


def watched(*, caught, refused, fired):
    """One guard on as many triggered prompts as `fired` has, of which the first `caught` are caught."""
    hits = [int(i < caught) for i in range(len(fired))]
    left = [works * (1 - hit) for hit, works in zip(hits, fired, strict=True)]
    row = Guarded(counted(hits), counted([i < refused for i in range(40)]), counted(left), auroc=share(0.9))
    return Watched({"weight spectra": row}, counted(fired))


def test_guards_have_one_number_per_model_and_work_by_whole_intervals():
    found = {
        "specific": {
            "a": watched(caught=40, refused=0, fired=[1] * 40),
            "b": watched(caught=22, refused=0, fired=[1] * 40),  # more than half, and its interval goes below
            "c": watched(caught=40, refused=20, fired=[1] * 40),
        },
        "control": {"d": watched(caught=10, refused=2, fired=[0] * 40)},
        "half": {"e": watched(caught=10, refused=2, fired=[0] * 5 + [1] * 35)},
    }
    table = attention_safety_alignment.guards_by_seed(found)
    row = table.loc[("specific", "weight spectra")].to_dict()
    assert (row["caught"], row["refused"], row["works on"]) == ("100, 55, 100", "0, 0, 50", "1 of 3")
    assert table.loc[("control", "weight spectra"), "caught where it works"] == "-"
    half = table.loc[("half", "weight spectra")]
    assert (half["caught"], half["caught where it works"], half["AUROC"]) == ("25", "14", "90")
