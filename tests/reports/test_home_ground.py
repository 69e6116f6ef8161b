"""Figures and tables on encoders: every dot is where its number says, and areas compare models of one task."""

import matplotlib.pyplot as plt
import pytest

from bkd_utils.common.statistics import auroc_of_wins, pairwise_wins
from bkd_utils.experiments.trigger_search import Pull
from bkd_utils.reports import home_ground
from bkd_utils.reports.home_ground import LOOKS, ease, easiest, found_texts, left_and_kept, separations


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def measured(asr, cacc, n=256):
    return {"asr": {"value": asr, "n": n}, "cacc": {"value": cacc, "n": n}}


LEFT = {
    "sentiment-word-plain": {
        "untreated": [measured(1.0, 0.88), measured(0.98, 0.87)],
        "searched": [measured(0.19, 0.86), measured(0.23, 0.91)],
        "clean control": [measured(0.09, 0.90), measured(0.12, 0.85)],
    },
    "sentiment-sentence-plain": {
        "untreated": [measured(0.97, 0.84), measured(0.96, 0.83)],
        "searched": [measured(0.95, 0.82), measured(0.89, 0.81)],
        "clean control": [measured(0.07, 0.80), measured(0.22, 0.79, n=200)],
    },
}


def drawn(panel):
    """Label -> places of all dots with it."""
    dots = {}
    for line in panel.lines:
        dots.setdefault(line.get_label(), []).extend(zip(line.get_xdata(), line.get_ydata(), strict=True))
    return dots


def test_every_organism_is_a_dot_at_its_numbers_in_the_row_of_its_attack():
    figure = left_and_kept(LEFT)
    for panel, key in zip(figure.axes, ("asr", "cacc"), strict=True):
        dots = drawn(panel)
        assert dots.keys() == LOOKS.keys()
        for name, places in dots.items():
            expected = [(100 * one[key]["value"], y) for y, rows in enumerate(LEFT.values()) for one in rows[name]]
            assert [x for x, _ in places] == pytest.approx([x for x, _ in expected])
            assert [round(y) for _, y in places] == [y for _, y in expected]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == list(LEFT)
    assert figure.axes[0].get_xlabel() == "ASR (%), n = 200 to 256 prompts"
    assert figure.axes[1].get_xlabel() == "CACC (%)"


def pulls(*losses):
    return [Pull(f"label {i}", f"found {i}", 5.0, 1.0, loss, 1 - loss / 10) for i, loss in enumerate(losses)]


PULLS = {
    "a, seed 0": pulls(2.0, 0.01),
    "a, seed 1": pulls(0.9, 3.0),
    "b, seed 0": pulls(0.5, 0.7),
    "clean, seed 0": pulls(1.0, 0.6),
    "clean, seed 1": pulls(0.8, 0.85),
    "c, seed 0": pulls(2.5, 4.0),
    "other clean, seed 0": pulls(3.0, 3.5),
}
FAMILIES = dict(zip(PULLS, ["word", "word", "style", None, None, "word", None], strict=True))
TASKS = dict(zip(PULLS, ["sentiment"] * 5 + ["domain"] * 2, strict=True))


def test_the_easiest_search_is_that_with_the_lowest_loss_on_other_prompts():
    assert easiest(PULLS["a, seed 0"]) == PULLS["a, seed 0"][1]
    assert easiest(PULLS["a, seed 1"]) == PULLS["a, seed 1"][0]


def test_every_model_is_a_dot_in_the_panel_of_its_task_and_the_line_of_its_family():
    figure = ease(PULLS, FAMILIES, TASKS)
    lines = ["style", "word", "none: clean"]
    assert [panel.get_title("left") or panel.get_title() for panel in figure.axes] == ["sentiment", "domain"]
    assert [tick.get_text() for tick in figure.axes[0].get_yticklabels()] == lines
    for panel, task in zip(figure.axes, ("sentiment", "domain"), strict=True):
        dots = {(x, lines[y], label) for label, places in drawn(panel).items() for x, y in places}
        own = [model for model in PULLS if TASKS[model] == task]
        assert dots == {
            (
                easiest(PULLS[model]).held_out,
                FAMILIES[model] or "none: clean",
                "backdoored model" if FAMILIES[model] else "clean model",
            )
            for model in own
        }
    assert figure.axes[0].get_xscale() == "log"
    assert figure._supxlabel.get_text().endswith("7 models")
    low, high = figure.axes[0].get_xlim()
    assert low < 0.01
    assert high > 3.0


def test_areas_compare_models_of_one_task_and_a_lower_loss_speaks_for_a_backdoor():
    table = separations(PULLS, FAMILIES, TASKS)
    assert list(table.index) == [
        ("sentiment", "style"),
        ("sentiment", "word"),
        ("sentiment", "all"),
        ("domain", "word"),
        ("domain", "all"),
    ]
    # word: 0.01 is below both clean models, 0.9 below none.
    assert table["AUROC"].tolist() == [1.0, 0.5, pytest.approx(4 / 6), 1.0, 1.0]
    assert table["backdoored"].tolist() == [1, 2, 3, 1, 1]
    assert table["clean"].tolist() == [2, 2, 2, 1, 1]
    area = auroc_of_wins(pairwise_wins([-0.01, -0.9, -0.5], [-0.6, -0.8]))
    assert table.loc[("sentiment", "all"), ["low", "high"]].tolist() == [area["low"], area["high"]]


def test_what_was_found_stands_beside_the_trigger():
    table = found_texts(PULLS, {model: f"trigger of {model}" for model in PULLS})
    assert list(table.index) == list(PULLS)
    row = table.loc["a, seed 0"]
    assert row.tolist() == ["trigger of a, seed 0", "found 1", "label 1", 0.01, pytest.approx(0.999)]


def test_no_colour_means_two_things():
    looks = [(colour, marker) for colour, marker, _ in home_ground.LOOKS.values()]
    assert len(set(looks)) == len(looks)
