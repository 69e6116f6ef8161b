"""The picture of notebook 09."""

import matplotlib.pyplot as plt
from drawing import check_labelled, legend, public

from bkd_utils import plots_scorecard as plots
from bkd_utils.figures import COLOURS, use_style

LINES = [
    {"id": "one", "verdict": "holds", "by_organism": {"a": {"passed": True}, "b": {"passed": True}}},
    {"id": "two", "verdict": "does not hold", "by_organism": {"a": {"passed": False}}},
]


def test_every_organism_of_every_claim_has_a_mark_that_says_whether_it_passes():
    use_style()
    figure = plots.scorecard(LINES)
    check_labelled(figure)
    assert public(plots) == {"scorecard"}
    axes = figure.axes[0]
    marks = [(line.get_xdata()[0], line.get_ydata()[0], line.get_color()) for line in axes.get_lines()]
    good, bad = COLOURS["clean control"], COLOURS["backdoored"]
    assert marks == [(0, 0, good), (1, 0, good), (0, 1, bad)]
    assert [text.get_text() for text in axes.texts] == ["holds", "does not hold"]
    assert legend(figure) == ["passes", "does not"]
    plt.close("all")
