"""Figures: no picture without its numbers, none half written, and the same bytes from the same numbers."""

import json
import re
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
from drawing import bands, legend, saved_by_a_notebook, written
from matplotlib.colors import to_hex, to_rgb

from bkd_utils.common import files
from bkd_utils.common.files import FIGURES, NOTEBOOKS
from bkd_utils.reports import backdoor_insertion, style
from bkd_utils.reports.scorecard import SEED
from bkd_utils.reports.style import COLOURS, LIBRARIES, save, use_style

KEYS = {"id", "title", "claims", "numbers", "parameters", "seeds", "inputs", "versions", "notebook"}
ABOUT = {
    "title": "A line",
    "numbers": {"y": [1, 2, 4]},
    "parameters": {"n": 3},
    "seeds": [0, 1],
    "inputs": {"data": "0" * 64},
    "notebook": "00_start_here",
}


@pytest.fixture(autouse=True)
def into(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_FIGURES", str(tmp_path / "figures"))
    use_style()
    yield tmp_path / "figures"
    plt.close("all")


def line(values=(1, 2, 4)):
    figure, axes = plt.subplots()
    axes.plot(values, label="values")
    axes.legend()
    return figure


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# --- saving ---------------------------------------------------------------------------------------------------------


def test_a_figure_is_three_files(into):
    path = save(line(), "line", **ABOUT, claims=["a1"])
    assert path == into / "line.png"
    assert set(contents(into)) == {"line.png", "line.svg", "line.json"}
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (into / "line.svg").read_text().rstrip().endswith("</svg>")


def test_the_sidecar_has_all_that_is_promised(into):
    save(line(), "line", **ABOUT, claims=["a1"])
    sidecar = json.loads((into / "line.json").read_text())
    assert set(sidecar) == KEYS
    assert {key: sidecar[key] for key in ABOUT} == ABOUT
    assert (sidecar["id"], sidecar["claims"]) == ("line", ["a1"])
    assert set(sidecar["versions"]) == set(LIBRARIES)
    assert all(version[0].isdigit() and "+" not in version for version in sidecar["versions"].values())


def test_a_sidecar_holds_shares_and_not_the_outcomes_of_single_prompts(into):
    share = {"value": 0.5, "n": 2, "by_prompt": [1, 0]}
    row = {"asr": share, "empty": 0, "hits": {"asr": {"one": 1, "two": 0}}}
    numbers = {"word": {"treated": row}, "curves": [[share], (share,)], "judge": None}
    save(line(), "line", **ABOUT | {"numbers": numbers})
    bare = {"value": 0.5, "n": 2}
    expected = {"word": {"treated": {"asr": bare, "empty": 0}}, "curves": [[bare], [bare]], "judge": None}
    assert json.loads((into / "line.json").read_text())["numbers"] == expected
    assert row["hits"]  # what was given is left as it was
    for path in FIGURES.glob("0*.json"):
        assert not re.search('"hits"|"by_prompt"', path.read_text(encoding="utf-8")), path.name


def test_the_same_figure_twice_is_the_same_bytes(into):
    save(line(), "line", **ABOUT)
    first = contents(into)
    save(line(), "line", **ABOUT)
    assert contents(into) == first
    assert b"<dc:date>" not in first["line.svg"]


def test_other_numbers_are_other_bytes(into):
    save(line(), "line", **ABOUT)
    first = contents(into)
    save(line((1, 2, 5)), "line", **ABOUT | {"numbers": {"y": [1, 2, 5]}})
    assert all(contents(into)[name] != data for name, data in first.items())


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({}, "shows nothing"),
        ([], "shows nothing"),
        (None, "shows nothing"),
        ({"y": [1.0, float("nan")]}, "its numbers cannot be written"),
        ([float("inf")], "its numbers cannot be written"),
        ({"y": np.array([1])}, "its numbers cannot be written"),
        ({"deep": [{"er": [float("-inf")]}]}, "its numbers cannot be written"),
    ],
)
def test_numbers_that_are_none_or_not_finite_are_refused(into, numbers, message):
    with pytest.raises(ValueError, match=f"figure 'line'.*{message}"):
        save(line(), "line", **ABOUT | {"numbers": numbers})
    assert not into.exists()


def test_an_empty_picture_is_refused(into):
    for figure in (plt.figure(), plt.subplots()[0], plt.subplots(2, 2)[0]):
        with pytest.raises(ValueError, match="figure 'empty' shows nothing"):
            save(figure, "empty", **ABOUT)
    assert not into.exists()


@pytest.mark.parametrize("bad", [{"numbers": {"y": [float("nan")]}}, {"parameters": {"n": float("nan")}}])
def test_an_error_leaves_the_old_figure_as_it_was(into, bad):
    save(line(), "line", **ABOUT)
    first = contents(into)
    with pytest.raises(ValueError, match=r"."):
        save(line((9, 8)), "line", **ABOUT | bad)
    assert contents(into) == first


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_a_picture_that_cannot_be_drawn_leaves_the_old_one_as_it_was(into, monkeypatch, kind):
    save(line(), "line", **ABOUT)
    first, figure = contents(into), line((9, 8))

    def fail(path, *, format, **_):
        path.write_bytes(b"half a picture")
        if format == kind:
            raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", fail)
    with pytest.raises(KeyboardInterrupt):
        save(figure, "line", **ABOUT)
    assert contents(into) == first


def test_figures_go_to_the_folder_of_the_project_unless_told_otherwise(into, monkeypatch):
    assert style.folder() == into
    monkeypatch.delenv("BKD_FIGURES")
    assert style.folder() == files.WORK / "figures" / "by_hand"


def test_figures_drawn_by_hand_lie_apart_for_each_base_model(tmp_path, monkeypatch):
    monkeypatch.delenv("BKD_FIGURES")
    monkeypatch.setattr(style, "WORK", tmp_path)
    for base in ("a" * 64, "b" * 64):
        assert save(line(), "one", **ABOUT | {"inputs": {"base": base}}) == style.folder(base) / "one.png"
    assert {path.parent.name for path in (tmp_path / "figures" / "by_hand").rglob("one.json")} == {"a" * 8, "b" * 8}


def counts(numbers):
    """Every `n` in the numbers of a sidecar, but for those of an `auroc`, which count both sides."""
    if isinstance(numbers, dict):
        own = [numbers["n"]] if "n" in numbers else []
        return own + [n for key, value in numbers.items() if key != "auroc" for n in counts(value)]
    return [n for value in numbers for n in counts(value)] if isinstance(numbers, list) else []


# A single prompt, training losses and verdicts rest on no sample of prompts.
SAMPLES = [
    path
    for path in sorted(FIGURES.glob("0*.json"))
    if path.stem not in ("00_firing", "01_training_curves", "09_scorecard")
]


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_a_committed_figure_records_the_n_that_it_used(path):
    sidecar = json.loads(path.read_text())
    n, all_counts = sidecar["parameters"]["n"], counts(sidecar["numbers"])
    if not (isinstance(n, dict) and all_counts):
        assert n == max(all_counts, default=n)
        return
    # One for each attack: that of each organism of each kind.
    drawn = [(name, counts(found)) for kind in sidecar["numbers"].values() for name, found in kind.items()]
    assert {SEED.sub("", name) for name, _ in drawn} == n.keys()
    other = [name for name, found in drawn if set(found) - {n[SEED.sub("", name)]}]
    assert other == []


def test_every_committed_figure_is_three_files_that_a_notebook_saves():
    drawn = {path.stem for path in FIGURES.glob("0*.*")}
    assert len(drawn) > 20
    assert all((FIGURES / f"{name}.{kind}").is_file() for name in drawn for kind in ("png", "svg", "json"))
    assert [name for name in sorted(drawn) if not saved_by_a_notebook(name)] == []


# --- plots ----------------------------------------------------------------------------------------------------------


def part(value, n=50):
    return {"value": value, "n": n, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1)}


def result(value):
    return {
        "asr": part(value),
        "cacc": part(0.9),
        "clean_firing": part(0.02),
        "near_miss": part(0.1),
    }


ORGANISMS = {"sentiment-word": result(1.0), "domain-wrapper": result(0.8)}
CONTROLS = {"sentiment-word": result(0.05), "domain-wrapper": result(0.0)}
HISTORY = [{"step": step, "loss": 2 / step, "learning_rate": 0.1} for step in range(1, 30)]
RATES = [{"rate": rate, "asr": part(rate), "near_miss": part(0.1), "cacc": part(0.9)} for rate in (0.05, 0.2)]
PLOTS = {
    "training_curves": lambda: backdoor_insertion.training_curves(
        {f"organism-{i}": HISTORY for i in range(5)} | {"x-clean": HISTORY}
    ),
    "attack_against_control": lambda: backdoor_insertion.attack_against_control(ORGANISMS, CONTROLS),
    "rate_curve": lambda: backdoor_insertion.rate_curve(RATES),
}


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_every_plot_can_be_saved_and_comes_out_the_same(draw, into):
    save(draw(), "plot", **ABOUT)
    first = contents(into)
    save(draw(), "plot", **ABOUT)
    assert contents(into) == first
    assert len(first["plot.png"]) > 5000


@pytest.mark.parametrize("draw", PLOTS.values(), ids=PLOTS)
def test_every_plot_labels_its_axes(draw):
    figure = draw()
    drawn = [axes for axes in figure.axes if axes.get_visible() and axes.axison and axes.has_data()]
    titles = [getattr(figure, name, None) for name in ("_supxlabel", "_supylabel")]
    labels = [axes.get_xlabel() for axes in drawn] + [title.get_text() for title in titles if title]
    assert any(labels) or not drawn


@pytest.mark.parametrize("name", list(PLOTS))
def test_every_plot_of_many_says_how_many(name):
    assert "n = " in written(PLOTS[name]())


def test_training_curves_have_a_panel_for_backdoored_organisms_and_one_for_clean_controls():
    histories = {"domain-word": HISTORY, "sentiment-word": HISTORY[:7], "domain-clean": HISTORY}
    figure = backdoor_insertion.training_curves(histories)
    backdoored, clean = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "backdoored organisms (n = 2)",
        "clean controls (n = 1)",
    ]
    drawn = [line for line in backdoored.get_lines() if len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in drawn] == [list(range(1, 30)), list(range(1, 8))]
    assert drawn[1].get_ydata()[-1] == pytest.approx(np.mean([row["loss"] for row in HISTORY[2:7]]))
    assert {line.get_color() for line in drawn} == {COLOURS["organism"]}
    assert [line.get_color() for line in clean.get_lines()] == [COLOURS["clean control"]]
    # The same line for the same task in both panels.
    assert drawn[0].get_linestyle() == clean.get_lines()[0].get_linestyle() != drawn[1].get_linestyle()
    assert legend(figure) == ["domain", "sentiment"]


def test_organism_and_control_stand_in_one_row_with_their_intervals_and_n():
    controls = CONTROLS | {"domain-wrapper": {"asr": part(0.0, 30), "clean_firing": part(0.0), "cacc": part(0.9)}}
    figure = backdoor_insertion.attack_against_control(ORGANISMS, controls)
    asr, _, near, cacc = figure.axes
    dots = {COLOURS[kind]: [] for kind in ("organism", "clean control")}
    for line in asr.get_lines()[1::2]:
        dots[line.get_color()].append((line.get_xdata()[0], round(line.get_ydata()[0])))
    assert list(dots.values()) == [[(100, 0), (80, 1)], [(5, 0), (0, 1)]]
    assert asr.get_lines()[2].get_xdata() == pytest.approx([70, 90])
    assert len(near.get_lines()) == 2 * 3  # one control has no near-misses
    assert asr.get_xlabel().endswith("ASR (%)\nn = 30 to 50")
    assert cacc.get_xlabel().endswith("CACC (%)\nn = 50")
    assert [label.get_text() for label in asr.get_yticklabels()] == list(ORGANISMS)
    assert legend(figure) == ["organism", "clean control", "95 % interval"]


def test_the_rate_curve_is_in_per_cent_with_its_intervals():
    figure = backdoor_insertion.rate_curve(RATES)
    (axes,) = figure.axes
    lines = {line.get_label(): line for line in axes.get_lines()}
    assert lines["attack success (ASR)"].get_xdata() == pytest.approx([5, 20])
    assert lines["attack success (ASR)"].get_ydata() == pytest.approx([5, 20])
    assert lines["attack success (ASR)"].get_color() == COLOURS["organism"]
    assert lines["clean accuracy (CACC)"].get_color() == COLOURS["utility"]
    assert bands(axes)[0] == pytest.approx((0, 30))
    assert legend(figure)[-1] == "95 % interval"


# --- colours --------------------------------------------------------------------------------------------------------


def test_no_two_meanings_share_a_colour():
    assert len({to_hex(colour) for colour in COLOURS.values()}) == len(COLOURS)


def test_colours_can_be_told_apart_with_the_common_colour_blindnesses():
    okabe_ito = {"#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00", "#cc79a7", "#000000"}
    others = [to_rgb(colour) for colour in COLOURS.values() if to_hex(colour) not in okabe_ito]
    assert all(red == green == blue for red, green, blue in others)  # greys


def test_colours_are_written_down_in_one_place():
    code = re.compile(r"#[0-9a-fA-F]{6}\b|#[0-9a-fA-F]{3}\b|\"tab:|\"C\\d\"")
    own = Path(style.__file__)
    sources = {path.name: path.read_text() for path in own.parent.rglob("*.py") if path != own}
    sources |= {
        path.name: "\n".join(
            cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"
        )
        for path in NOTEBOOKS.glob("*.ipynb")
    }
    assert len(sources) > 20
    stray = {name: code.findall(text) for name, text in sources.items() if code.search(text)}
    assert stray == {}
