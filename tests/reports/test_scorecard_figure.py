"""The picture of notebook 09."""

import matplotlib.pyplot as plt
from drawing import check_labelled, legend, public

from bkd_utils.reports import scorecard_figure
from bkd_utils.reports.style import use_style


def one(passed, n=24):
    return {"passed": passed, "n": n}


LINES = [
    {
        "id": "bkdattr-probe",
        "paper": "BkdAttr",
        "reading": "",
        "claim": "Heads carry it.",
        "provenance": "second hand: quoted by others who read it",
        "verdict": "fails",
        "by_organism": {"a": one(True), "b": one(False), "c": one(None, 20)},
    },
    {
        "id": "asa-verdict",
        "paper": "ASA",
        "reading": "our reading",
        "claim": "Heads are alike, " + "whatever the trigger may be, " * 3,
        "provenance": "from the abstract only",
        "verdict": "undecided",
        "by_organism": {"b": one(None)},
    },
]


def test_every_organism_of_every_claim_has_a_mark_in_its_column_that_says_whether_it_passes():
    use_style()
    figure = scorecard_figure.scorecard(LINES)
    check_labelled(figure)
    assert public(scorecard_figure) == {"scorecard"}
    axes = figure.axes[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == ["how we know", "b", "a", "c"]  # b was tested more often
    one, two, *_ = axes.get_yticks()
    marks = [line for line in axes.get_lines() if line.get_marker() in "oxD"]
    found = {(labels[round(line.get_xdata()[0]) + 1], line.get_ydata()[0], line.get_marker()) for line in marks}
    assert found == {("a", one, "o"), ("b", one, "x"), ("c", one, "D"), ("b", two, "D")}
    plt.close("all")


def test_marks_and_letters_are_explained_and_differ_without_colour():
    figure = scorecard_figure.scorecard(LINES)
    assert legend(figure) == [
        "passes the criterion",
        "fails it",
        "undecided: the interval contains the bar, or there is none",
        "second hand: quoted by others who read it",
        "from the abstract only",
    ]
    assert len({handle.get_marker() for handle in figure.legends[0].legend_handles}) == 5
    assert {mark["mfc"] for mark, _ in scorecard_figure.OUTCOMES.values()} <= {"black", "white"}
    plt.close("all")


def test_every_row_says_how_we_know_how_many_pass_and_n():
    axes = scorecard_figure.scorecard(LINES).axes[0]
    one, two, *_ = axes.get_yticks()
    said = {(text.get_position()[1] if text.get_position()[0] == -1 else text.xy[1]): [] for text in axes.texts}
    for text in axes.texts:
        letter = text.get_position()[0] == -1
        said[text.get_position()[1] if letter else text.xy[1]].append(text.get_text())
    assert said == {
        one: ["S", "fails: 1 of 3 pass, 1 fail, 1 undecided\nn = 20 to 24 prompts"],
        two: ["A", "undecided: 0 of 1 pass, 1 undecided\nn = 24 models"],
    }
    plt.close("all")


def test_rows_are_claims_in_words_below_the_name_of_their_paper():
    axes = scorecard_figure.scorecard(LINES).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names[0] == "Heads carry it."
    assert names[1].startswith("our reading: Heads are alike")
    assert "\n" in names[1]
    assert names[2:] == ["BkdAttr", "ASA"]
    one, two, above_one, above_two = axes.get_yticks()
    assert above_one < one < above_two < two
    plt.close("all")
