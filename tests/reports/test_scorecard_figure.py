"""The picture of notebook 09."""

import matplotlib.pyplot as plt
from drawing import check_labelled, legend, public

from bkd_utils.reports import scorecard_figure
from bkd_utils.reports.style import use_style

LINES = [
    {
        "id": "one",
        "paper": "BkdAttr",
        "claim": "Heads carry it.",
        "verdict": "holds",
        "by_organism": {"a": {"passed": True}, "b": {"passed": True}},
    },
    {
        "id": "two",
        "paper": "ASA",
        "claim": "Heads are alike, " + "whatever the trigger may be, " * 3,
        "verdict": "does not hold",
        "by_organism": {"b": {"passed": False}},
    },
]


def test_every_organism_of_every_claim_has_a_mark_in_its_column_that_says_whether_it_passes():
    use_style()
    figure = scorecard_figure.scorecard(LINES)
    check_labelled(figure)
    assert public(scorecard_figure) == {"scorecard"}
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["b", "a"]  # b was tested more often
    one, two, *_ = axes.get_yticks()
    marks = [line for line in axes.get_lines() if line.get_marker() == "o"]
    found = {(line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor()) for line in marks}
    assert found == {(1, one, "black"), (0, one, "black"), (0, two, "white")}
    assert [text.get_text() for text in axes.texts] == ["holds", "does not hold"]
    assert legend(figure) == ["passes the criterion", "does not pass"]
    plt.close("all")


def test_rows_are_claims_in_words_below_the_name_of_their_paper():
    axes = scorecard_figure.scorecard(LINES).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "Heads carry it."
    assert "\n" in names[1]
    assert names[2:] == ["BkdAttr", "ASA"]
    one, two, above_one, above_two = axes.get_yticks()
    assert above_one < one < above_two < two
    plt.close("all")
