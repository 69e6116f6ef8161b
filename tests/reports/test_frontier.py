"""The trade of notebook 06 on small results of the real shape, with what is drawn read back."""

import pytest
from drawing import check_all, column_titles, share
from treatments import ATTACKS, FOUND, OF, result

from bkd_utils.reports import frontier

pytestmark = pytest.mark.usefixtures("style")


def test_the_picture_is_drawn_and_labelled():
    check_all(frontier, {"frontier": lambda: frontier.frontier(FOUND, OF)})
    assert column_titles(frontier.frontier(FOUND, OF)) == list(ATTACKS)


def texts(axes):
    return [text.get_text().strip() for text in axes.texts]


def dots(axes, marker="o"):
    """Single points that have a label, as (x, y) -> label."""
    found = {}
    for line in axes.get_lines():
        if len(line.get_xdata()) == 1 and line.get_marker() == marker:
            found[line.get_xdata()[0], line.get_ydata()[0]] = line.get_label()
    return found


def test_the_frontier_is_asr_against_what_cacc_has_lost():
    axes = frontier.frontier(FOUND, OF).axes[0]
    places = {label: place for marker in "XoDv" for place, label in dots(axes, marker).items()}
    assert places["untreated"] == (0, 100)
    assert places["ASA, our reading"] == (pytest.approx(10), pytest.approx(40))
    assert places["rival"] == (pytest.approx(-5), pytest.approx(70))
    bars = [line for line in axes.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    assert [list(line.get_ydata()) for line in bars] == [pytest.approx([30, 50]), pytest.approx([40, 40])]
    assert list(bars[1].get_xdata()) == pytest.approx([0, 20])


def test_the_best_treatments_are_named_unless_the_legend_does():
    assert texts(frontier.frontier(FOUND, OF).axes[0]) == ["fine-tuning"]
    useless = FOUND[ATTACKS[0]] | {"fine-tuning": result(1.0, 0.95)}
    assert texts(frontier.frontier({"a": useless}, OF).axes[0]) == []


def test_equal_treatments_do_not_hide_each_other():
    found = FOUND[ATTACKS[0]] | {"consistency": result(0.7, 0.95)}
    axes = frontier.frontier({"a": found}, OF | {"consistency": "rival"}).axes[0]
    (one, y), (other, same) = sorted(dots(axes, "D"))
    assert one == pytest.approx(-5)
    assert other > one + 0.5
    assert y == same
    assert texts(axes) == ["fine-tuning", "consistency"]


def test_names_of_treatments_that_are_close_to_each_other_are_written_apart():
    found = FOUND[ATTACKS[0]] | {"fine-tuning": result(0.1, 0.9), "consistency": result(0.12, 0.95)}
    axes = frontier.frontier({"a": found}, OF | {"consistency": "rival"}).axes[0]
    assert [text.get_position()[1] for text in axes.texts] == pytest.approx([18, 26])


def test_the_goal_is_what_the_judge_lets_pass():
    found = FOUND[ATTACKS[0]] | {"clean control": result(0.12, 0.9)}
    axes = frontier.frontier({"a": found}, OF | {"clean control": "clean control"}).axes[0]
    dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
    assert dotted[0].get_xdata() == pytest.approx([2, 2])  # one prompt of fifty
    assert dotted[1].get_ydata() == pytest.approx([12, 12])
    for control, bar in ((0.12, 15), (0.01, 4)):
        found |= {"clean control": result(control, 0.9)}
        axes = frontier.frontier({"a": found}, OF | {"clean control": "clean control"}, above=3).axes[0]
        dotted = [line for line in axes.get_lines() if line.get_linestyle() == ":"]
        assert dotted[1].get_ydata() == pytest.approx([bar, bar])


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_the_frontier_has_a_panel_for_each_organism(count):
    figure = frontier.frontier({f"organism {i}": FOUND[ATTACKS[0]] for i in range(count)}, OF)
    assert sum(axes.get_visible() for axes in figure.axes) == count


# --- the score of the Anti-BAD challenge ----------------------------------------------------------------------------


def rated(cacc, asr):
    return {"cacc": share(cacc), "asr": share(asr)}


def test_the_score_is_nothing_where_every_attack_works_and_the_root_of_utility_where_none_does():
    assert frontier.anti_bad(rated(0.9, 1.0))["value"] == 0
    assert frontier.anti_bad(rated(0.81, 0.0))["value"] == pytest.approx(90)
    assert frontier.anti_bad(rated(1.0, 0.0))["value"] == 100
    assert frontier.anti_bad(rated(0.5, 0.5))["value"] == pytest.approx(50)


def test_its_interval_joins_those_of_both_shares():
    """`share` has 10 points on either side."""
    found = frontier.anti_bad(rated(0.64, 0.75))
    assert found["value"] == pytest.approx(40)
    up = ((100 * (0.74 * 0.25) ** 0.5 - 40) ** 2 + (100 * (0.64 * 0.35) ** 0.5 - 40) ** 2) ** 0.5
    down = ((40 - 100 * (0.54 * 0.25) ** 0.5) ** 2 + (40 - 100 * (0.64 * 0.15) ** 0.5) ** 2) ** 0.5
    assert (found["low"], found["high"]) == (pytest.approx(40 - down), pytest.approx(40 + up))
    nothing = frontier.anti_bad(rated(0.9, 1.0))  # an ASR of 100 % leaves the score a width
    assert (nothing["low"], nothing["high"]) == (0, pytest.approx(30))


def test_the_price_list_has_the_score_of_every_row():
    rows = {name: row | {"elsewhere": share(0.5)} for name, row in FOUND[ATTACKS[0]].items()}
    table = frontier.price_list({"a": rows}, {"a": {}})
    assert table.loc[("a", "untreated"), "Anti-BAD"] == "0 [0, 30]"
    assert table.loc[("a", "alignment"), "Anti-BAD"].startswith("69 [")
