"""What may be run, and what of a run is committed."""

import re

import nbformat
import pytest
from notebook_files import write

from bkd_utils.running import notebooks
from bkd_utils.running.notebooks import NotebookError


def test_parameters_are_read_with_their_defaults(tmp_path):
    path = write(tmp_path / "n.ipynb", parameters="a = 1\nb: str = 'x'\nc = [0.5, -2]\nd = None")
    assert notebooks.parameters(path) == {"a": 1, "b": "x", "c": [0.5, -2], "d": None}


@pytest.mark.parametrize("line", ['out = f"run{a}"', "b = a", "b = len('x')", "import os", "b = c = 1", "print(1)"])
def test_a_derived_value_in_the_parameters_cell_is_refused_by_line(tmp_path, line):
    with pytest.raises(NotebookError, match="line 2"):
        notebooks.parameters(write(tmp_path / "n.ipynb", parameters=f"a = 1\n{line}"))


@pytest.mark.parametrize("tags", [(), ("parameters", "parameters")])
def test_a_missing_or_doubled_parameters_tag_is_refused(tmp_path, tags):
    with pytest.raises(NotebookError, match=f"has {len(tags)} cells"):
        notebooks.parameters(write(tmp_path / "n.ipynb", tags=tags))


def test_an_unknown_parameter_is_named_with_the_known_ones(tmp_path):
    path = write(tmp_path / "n.ipynb", parameters="seed = 1\nmodel = 'm'")
    with pytest.raises(NotebookError, match=r"'sede'.*seed, model"):
        notebooks.check_parameters(path, {"sede": 2})


DEFAULTS = "n = 1\nshare = 0.5\nname = 'x'\nflag = False\nnames = ['a']\ncounts = [0, 8]\nshares = [0.5]\nfree = None\n"
DEFAULTS += "none = []"


@pytest.mark.parametrize(
    "given",
    [
        {"n": "1"},
        {"n": 2.5},
        {"n": True},
        {"share": "0.5"},
        {"share": float("nan")},
        {"share": float("inf")},
        {"share": False},
        {"name": 3},
        {"name": ["x"]},
        {"flag": 1},
        {"flag": "true"},
        {"names": "a"},
        {"names": [1]},
        {"names": ["a", 2]},
        {"counts": 8},
        {"counts": [1.5]},
        {"counts": ["8"]},
        {"shares": ["0.5"]},
        {"none": "a"},
    ],
)
def test_a_parameter_of_another_type_than_its_default_is_refused(tmp_path, given):
    path = write(tmp_path / "n.ipynb", parameters=DEFAULTS)
    ((name, value),) = given.items()
    with pytest.raises(
        NotebookError, match=rf"n.ipynb: {name} = {re.escape(repr(value))} is of another type"
    ) as caught:
        notebooks.check_parameters(path, given)
    assert len(str(caught.value).splitlines()) == 1


def test_parameters_of_the_same_type_are_let_through(tmp_path):
    path = write(tmp_path / "n.ipynb", parameters=DEFAULTS)
    notebooks.check_parameters(path, {"n": 7, "share": 1, "name": "", "flag": True, "names": [], "counts": [3]})
    notebooks.check_parameters(path, {"shares": [1, 0.1], "free": ["anything"], "none": [1]})


def test_a_file_that_is_no_notebook_is_named(tmp_path):
    (tmp_path / "n.ipynb").write_text("{")
    with pytest.raises(NotebookError, match=r"n\.ipynb is not a notebook"):
        notebooks.read(tmp_path / "n.ipynb")


def test_selection_by_number_and_name(tmp_path):
    for name in ("00_a", "01_b", "03_c", "08_your_own_model"):
        write(tmp_path / f"{name}.ipynb")
    assert [path.stem for path in notebooks.select("03,01_b", folder=tmp_path)] == ["01_b", "03_c"]
    assert [path.stem for path in notebooks.select(None, folder=tmp_path)] == ["00_a", "01_b", "03_c"]
    assert [path.stem for path in notebooks.select("08", folder=tmp_path)] == ["08_your_own_model"]
    for bad in ("42", "1", ","):
        with pytest.raises(NotebookError):
            notebooks.select(bad, folder=tmp_path)


def test_without_notebooks_a_selection_is_an_error_and_the_list_is_empty(tmp_path):
    assert notebooks.all_notebooks(folder=tmp_path / "none") == []
    for only in (None, "01"):
        with pytest.raises(NotebookError, match=r"no notebooks in .*none"):
            notebooks.select(only, folder=tmp_path / "none")


def test_publishing_drops_what_changes_from_run_to_run(tmp_path):
    original = write(tmp_path / "n.ipynb", "print(1)")
    executed = notebooks.with_sentinel(notebooks.read(original), "token")
    injected = nbformat.v4.new_code_cell("a = 2", metadata={"tags": ["injected-parameters"]})
    executed.cells.insert(1, injected)
    executed.metadata["papermill"] = {"duration": 3.2}
    run = executed.cells[2]
    run.metadata["papermill"] = {"duration": 1.0}
    run.execution_count = 17
    out = nbformat.v4.new_output
    run.outputs = [
        out("stream", name="stderr", text="50 %\r100 %"),
        out("stream", name="stdout", text="half\rdone\n"),
        out("execute_result", data={"text/html": "<style>#T_1a2b3_row0</style>"}, execution_count=17),
        out("display_data", data={"application/vnd.jupyter.widget-view+json": {"model_id": "x"}}),
    ]
    nbformat.write(executed, tmp_path / "run.ipynb")
    notebooks.publish(tmp_path / "run.ipynb", original)
    once = original.read_bytes()
    clean = notebooks.read(original)
    assert [cell.source for cell in clean.cells] == ["a = 1", "print(1)"]
    assert [cell.execution_count for cell in clean.cells] == [1, 2]
    assert [output.output_type for output in clean.cells[1].outputs] == ["stream", "execute_result"]
    assert clean.cells[1].outputs[0].text == "done\n"
    assert "T_bkd00" in clean.cells[1].outputs[1].data["text/html"]
    assert "papermill" not in original.read_text()
    notebooks.publish(tmp_path / "run.ipynb", original)
    assert original.read_bytes() == once


def test_publishing_refuses_the_copy_of_another_notebook(tmp_path):
    one, two = write(tmp_path / "1.ipynb", "print(1)"), write(tmp_path / "2.ipynb", "print(2)")
    with pytest.raises(NotebookError, match="not of this notebook"):
        notebooks.publish(two, one)
