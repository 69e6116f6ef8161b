"""Sliders: what a move does, what stands where there are no widgets, and both in a real JupyterLab."""

import os
import re
import subprocess
import sys

import browsing
import nbformat
import pandas as pd
import pytest
from ipywidgets import FloatSlider, IntSlider, SelectionSlider, Text

from bkd_utils.reports import live
from bkd_utils.running import execute, notebooks

WIDGET = "application/vnd.jupyter.widget-view+json"
CELLS = (
    "import pandas as pd\nfrom ipywidgets import IntSlider, SelectionSlider\nfrom bkd_utils.reports import live",
    "now = live.sliders(\n"
    "    lambda layer, word: pd.DataFrame({'square': [layer**2], 'twice': [2 * word], 'rest': [12 // (5 - layer)]}),\n"
    "    layer=IntSlider(3, min=0, max=9), word=SelectionSlider(options=['so', 'la']),\n)",
    "assert now['square'][0] == 9",
)


def table(**values):
    return pd.DataFrame({name: [value] for name, value in values.items()})


def cells(text):
    """The cells of a table in HTML, as they are written there."""
    return re.findall("<td>(.*?)</td>", text)


@pytest.fixture
def shown(monkeypatch):
    """What is displayed, one bundle of representations after the other, and the boxes of widgets."""
    bundles, make = [], live._box
    monkeypatch.setattr(live, "display", lambda bundle, *, raw: bundles.append(bundle))
    monkeypatch.setattr(live, "_box", lambda *given: bundles.append(make(*given)) or bundles[-1])
    monkeypatch.delenv(live.STATIC, raising=False)
    return bundles


def test_a_moved_slider_calls_with_all_values_and_replaces_the_table(shown):
    calls = []
    layer, c, text = IntSlider(3, min=0, max=9), FloatSlider(0.5, min=0, max=2), Text("one")
    first = live.sliders(lambda **given: calls.append(given) or table(**given), layer=layer, c=c, the_text=text)
    assert calls == [{"layer": 3, "c": 0.5, "the_text": "one"}]
    assert first.to_dict("list") == {"layer": [3], "c": [0.5], "the_text": ["one"]}
    *controls, drawn = shown[0].children
    assert controls == [layer, c, text]
    assert [one.description for one in controls] == ["layer", "c", "the text"]
    assert not any(one.continuous_update for one in controls)  # else a drag asks for every value on its way
    assert cells(drawn.value) == ["3", "0.5", "one"]
    layer.value, text.value = 7, "two <b>"
    assert calls[1:] == [{"layer": 7, "c": 0.5, "the_text": "one"}, {"layer": 7, "c": 0.5, "the_text": "two <b>"}]
    assert "two &lt;b&gt;" in drawn.value
    assert "one" not in drawn.value


def test_an_error_takes_the_place_of_the_table_until_the_next_move(shown):
    number = IntSlider(4, min=-9, max=9)
    live.sliders(lambda number: table(found=12 // number), number=number)
    drawn = shown[0].children[-1]
    number.value = 0
    assert drawn.value == "<pre>ZeroDivisionError: integer division or modulo by zero</pre>"
    number.value = 3
    assert cells(drawn.value) == ["4"]


def test_an_error_at_the_first_values_stops_the_cell(shown):
    with pytest.raises(ZeroDivisionError):
        live.sliders(lambda number: table(found=1 // number), number=IntSlider(0))
    assert shown == []


def test_what_draws_no_widgets_has_values_table_and_a_hint(shown, monkeypatch):
    control = SelectionSlider(options=[("first", "a < b"), ("second", "c")])
    for setting in ("", "1"):
        monkeypatch.setenv(live.STATIC, setting)
        live.sliders(lambda my_choice: table(found=my_choice), my_choice=control)
    box, with_widgets, static = shown
    assert with_widgets[WIDGET]["model_id"] == box.model_id
    assert {key: text for key, text in with_widgets.items() if key != WIDGET} == static
    assert static.keys() == {"text/html", "text/plain"}
    assert "my choice = a &lt; b" in static["text/html"]
    for text in static.values():
        assert "In JupyterLab this cell has a control for each of: my choice." in text
        assert "VBox" not in text
    assert cells(static["text/html"]) == ["a &lt; b"]


@pytest.fixture
def notebook(tmp_path):
    path = tmp_path / "01_small.ipynb"
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    book.metadata["kernelspec"] = notebooks.KERNELSPEC
    nbformat.write(book, path)
    return path


def test_what_the_runner_executes_and_publishes_has_the_table_and_no_widget(notebook, tmp_path):
    given = [str(notebook), str(tmp_path / "out.ipynb"), "{}"]
    subprocess.run([sys.executable, "-m", execute.__name__, *given], check=True, env=os.environ | {"MPLBACKEND": ""})
    executed = notebooks.read(tmp_path / "out.ipynb")
    assert "widgets" not in executed.metadata
    (output,) = executed.cells[1].outputs
    assert output.data.keys() == {"text/html", "text/plain"}
    assert cells(output.data["text/html"]) == ["9", "soso", "6"]
    assert notebooks.published(executed, notebooks.read(notebook)).cells[1].outputs == [output]


def test_in_jupyterlab_a_moved_slider_changes_the_table(notebook):
    if lacks := browsing.missing():
        pytest.skip(f"{lacks}. Neither is part of the lock; the tests above move the same widgets without a browser")
    with browsing.server(notebook.parent) as address, browsing.chromium(loggingPrefs={"browser": "ALL"}) as driver:
        browsing.run_all(driver, address, notebook.name, limit=120)
        layer, word = browsing.move_sliders(driver)
        assert [layer[0], layer[1][0], layer[2][0]] == ["layer", "3", "4"]
        assert [word[0], word[1][0], word[2][0]] == ["word", "so", "la"]
        assert "16" in layer[2][1]
        assert "lala" in word[2][1]
        assert browsing.complaints(driver) == []
