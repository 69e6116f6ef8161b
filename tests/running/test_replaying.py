"""Replays: what runs, with which parameters, in what order, and what comes back. Kernels are real, notebooks small."""

import asyncio

import nbformat
import pytest
from jupyter_client.asynchronous.client import AsyncKernelClient
from notebook_files import write

from bkd_utils.common import files
from bkd_utils.common.files import read_json
from bkd_utils.running import notebooks, replaying

LOOKS = "import os\nprint(n, os.environ['BKD_REPLAY'], 'seen' in globals())\nseen = True"
WRITES = """
import json, pathlib
folder = pathlib.Path(os.environ["BKD_FIGURES"])
(folder / "scorecard.json").write_text(json.dumps(ROWS))
pathlib.Path(os.environ["BKD_LEDGER"]).write_text(json.dumps({"id": "stage/key", "how": "shipped", "commit": None}))
"""
READS = """
import json, pathlib
rows = json.loads(pathlib.Path(os.environ["BKD_FIGURES"], "scorecard.json").read_text())
print(rows[0]["id"])
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """Three notebooks replayed: one with a live cell, one that raises an error, and the last."""
    folder = tmp_path_factory.mktemp("replays")
    rows = read_json(files.FIGURES / "scorecard.json")[:1]
    paths = [
        write(folder / "01_a.ipynb", LOOKS, "1 / 0", f"ROWS = {rows!r}{WRITES}", parameters="n = 1"),
        write(folder / "02_b.ipynb", LOOKS, "1 / 0", "print('never')", parameters="n = 2"),
        write(folder / "09_last.ipynb", LOOKS, READS, parameters="n = 3"),
    ]
    book = nbformat.read(paths[0], as_version=4)
    book.cells[2].metadata["tags"] = ["live"]
    book.cells[2].outputs = [nbformat.v4.new_output("stream", name="stdout", text="stored\n")]
    nbformat.write(book, paths[0])
    given = {"01_a": {"n": 7}, "02_b": {}, "09_last": {}}
    found = asyncio.run(replaying.replay(paths, folder=folder / "run", parameters=given))
    assert [one.path for one in found] == paths
    return found, rows


def printed(one):
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in replaying.code_cells(one.notebook)]


def test_live_cells_do_not_run_and_keep_what_is_stored(done):
    (first, _, _), _ = done
    assert first.reason == ""
    assert first.ran == len(replaying.code_cells(first.notebook)) == 4
    assert printed(first)[2] == "stored\n"


def test_parameters_are_given_and_nothing_may_be_measured(done):
    (first, second, _), _ = done
    assert printed(first)[1] == "7 1 False\n"
    assert printed(second)[1] == "2 1 False\n"


def test_a_notebook_finds_nothing_of_the_one_before_it_in_the_same_kernel(done):
    assert printed(done[0][2])[1] == "3 1 False\n"


def test_an_error_ends_one_notebook_with_its_reason_and_the_others_go_on(done):
    second = done[0][1]
    assert second.reason == "ZeroDivisionError: division by zero"
    assert second.ran == 2
    assert done[0][2].reason == ""


def test_what_was_used_is_read_from_the_ledger(done):
    assert [one.used for one in done[0]] == [["stage/key"], [], []]


def test_the_last_notebook_finds_the_committed_scorecard(done):
    (_, _, last), rows = done
    written = read_json(last.figures / "scorecard.json")
    assert rows[0] in written
    assert len(written) == len(read_json(files.FIGURES / "scorecard.json"))
    assert printed(last)[2] == f"{written[0]['id']}\n"


def test_a_notebook_comes_back_as_it_would_be_published(done):
    first = done[0][0]
    assert [cell.execution_count for cell in replaying.code_cells(first.notebook)] == [1, 2, 3, 4]
    assert [cell.source for cell in first.notebook.cells] == [cell.source for cell in notebooks.read(first.path).cells]


def test_ended_while_a_kernel_starts_no_channel_is_left_open(tmp_path, monkeypatch):
    """The library would say at the end of the process that it could not close them."""
    waiting = []

    async def never_ready(client, **_):
        waiting.append(client)
        await asyncio.sleep(600)

    monkeypatch.setattr(AsyncKernelClient, "wait_for_ready", never_ready)

    async def ended():
        paths = [write(tmp_path / "01_a.ipynb", "1")]
        task = asyncio.create_task(replaying.replay(paths, folder=tmp_path / "run", parameters={"01_a": {}}))
        while not waiting:
            await asyncio.sleep(0.05)
        assert waiting[0].channels_running
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(ended())
    assert not waiting[0].channels_running
