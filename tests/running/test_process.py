"""The nine ways in which papermill lets a wrong run pass, each tried on a real kernel."""

import os
import re
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from notebook_files import write

from bkd_utils.common.files import ROOT
from bkd_utils.running import notebooks
from bkd_utils.running.notebooks import NotebookError
from bkd_utils.running.process import _verdict, run_notebook

KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
# Talks on while the runner's last cell runs, past Python's own streams too.
TALK = """
import os, threading, time

def talk():
    for _ in range(3000):
        os.write(1, b"out\\n")
        os.write(2, b"err\\n")
        time.sleep(0.001)

threading.Thread(target=talk, daemon=True).start()
"""


def run(path, folder, *, limit=120, parameters=None, environment=None):
    given = {"parameters": parameters or {}, "environment": environment or {}}
    return run_notebook(path, folder=folder, limit=limit, **given, on_cell=lambda *_: None)


def kernels_of(pid=None):
    found = psutil.Process(pid or os.getpid()).children(recursive=True)
    return [p for p in found if "ipykernel_launcher" in " ".join(p.cmdline())]


def runner_at_work(path, folder, marker):
    """A runner in a process group of its own, whose kernel has written `marker`, and all processes below it."""
    code = (
        "from pathlib import Path; from bkd_utils.running import process; "
        f"process.run_notebook(Path({str(path)!r}), parameters={{}}, folder=Path({str(folder)!r}), limit=500, "
        "environment={}, on_cell=lambda *_: None)"
    )
    # The scratch folder of a killed runner stays behind; here it must not stay in the machine's own.
    environment = os.environ | {"TMPDIR": str(marker.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        # A shell's background job ignores Ctrl-C, and so would everything that the tests start from there.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 90
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kernels_of(process.pid)
    return process, psutil.Process(process.pid).children(recursive=True)


def test_a_sound_notebook_runs_with_its_parameters_whatever_kernel_and_noise(tmp_path):
    cells = (
        "import sys, warnings",
        "warnings.warn('noise')\nprint('noise', file=sys.stderr)",
        "assert a == 5, a",
        "import bkd_utils\nprint(sys.prefix)",
        TALK,
    )
    path = write(tmp_path / "n.ipynb", *cells, kernel="a-kernel-of-another-machine")
    seen = []
    given = {"parameters": {"a": 5}, "environment": {}, "on_cell": lambda *cells: seen.append(cells)}
    result = run_notebook(path, folder=tmp_path / "out", limit=120, **given)
    assert (result.status, result.reason) == ("ok", "")
    assert 0.01 < result.peak_gib < 2
    assert seen
    executed = notebooks.read(tmp_path / "out" / "n.ipynb")
    assert sys.prefix in str(executed.cells)
    assert os.listdir(tmp_path / "out") == ["n.ipynb"]


@pytest.mark.parametrize(
    ("cells", "limit", "reason"),
    [
        (("import sys\nsys.exit()", "b = 2"), 120, "SystemExit|never reached"),
        ((KILL, "b = 2"), 120, "its kernel was killed, as the system does when memory runs out"),
        (("import time\ntime.sleep(600)",), 8, "limit of 0.1 minutes"),
    ],
    ids=["sys.exit", "killed kernel", "time limit"],
)
def test_a_run_that_did_not_reach_its_end_fails_with_its_reason(tmp_path, cells, limit, reason):
    result = run(write(tmp_path / "n.ipynb", *cells), tmp_path / "out", limit=limit)
    assert result.status == "failed"
    assert re.search(reason, result.reason, re.IGNORECASE), result.reason
    assert not (tmp_path / "out" / "n.ipynb").exists()
    assert (tmp_path / "out" / "n.failed.ipynb").exists()
    assert kernels_of() == []


def test_unknown_parameter_and_missing_tag_stop_before_a_kernel_starts(tmp_path):
    with pytest.raises(NotebookError, match="no parameter 'b'"):
        run(write(tmp_path / "n.ipynb"), tmp_path / "out", parameters={"b": 1})
    with pytest.raises(NotebookError, match="tagged 'parameters'"):
        run(write(tmp_path / "m.ipynb", "1", tags=()), tmp_path / "out")
    with pytest.raises(NotebookError, match=r"line 2: out is derived"):
        run(write(tmp_path / "d.ipynb", parameters='seed = 0\nout = f"run{seed}"'), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ["b =", "%matplotlib inline", "b = {[]: 1}", "a += 1", "b: int"])
def test_a_parameters_cell_that_cannot_be_read_is_refused_by_line(tmp_path, line):
    with pytest.raises(NotebookError, match="line 2"):
        notebooks.parameters(write(tmp_path / "n.ipynb", parameters=f"a = 1\n{line}"))


def test_a_parameters_cell_of_text_is_refused(tmp_path):
    book = notebooks.read(write(tmp_path / "n.ipynb", tags=()))
    book.cells = [nbformat.v4.new_markdown_cell("a = 1", metadata={"tags": ["parameters"]})]
    nbformat.write(book, tmp_path / "n.ipynb")
    with pytest.raises(NotebookError, match="with code"):
        notebooks.parameters(tmp_path / "n.ipynb")


def test_a_kernel_of_another_environment_is_not_accepted(tmp_path):
    book = notebooks.with_sentinel(notebooks.read(write(tmp_path / "n.ipynb")), "token")
    said = '{"token": "token", "prefix": "/elsewhere", "peak": 1}'
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=said)]
    nbformat.write(book, tmp_path / "run.ipynb")
    reason, _ = _verdict(tmp_path / "run.ipynb", "token", 0, "", limit=1)
    assert "/elsewhere" in reason
    reason, _ = _verdict(tmp_path / "run.ipynb", "another token", 0, "", limit=1)
    assert "never reached" in reason


def test_a_copy_that_was_cut_off_while_written_is_a_failure_and_no_crash(tmp_path):
    (tmp_path / "run.ipynb").write_text('{"cells": [')
    reason, _ = _verdict(tmp_path / "run.ipynb", "token", None, "", limit=60)
    assert reason == "ran into its limit of 1.0 minutes; the same command continues from there"


@pytest.mark.parametrize(
    ("code", "errors", "reason"),
    [
        (
            1,
            "x\nnbclient.exceptions.DeadKernelError: Kernel died\n",
            "its kernel was killed, .* memory runs out: .*Kernel died",
        ),
        (-9, "", r"it was killed, .* memory runs out: no message \(exit status -9\)"),
        (1, "ValueError: x", r"^ValueError: x \(exit status 1\)$"),
    ],
)
def test_a_run_that_was_killed_says_that_memory_may_have_run_out(tmp_path, code, errors, reason):
    told, _ = _verdict(tmp_path / "none.ipynb", "token", code, errors, limit=60)
    assert re.search(reason, told), told
    assert len(told.splitlines()) == 1


def test_a_restart_after_a_kill_keeps_the_finished_stage(tmp_path):
    stage = "import sys\nsys.path.insert(0, folder)\nimport staged\nstaged.expensive(x=3)"
    (tmp_path / "staged.py").write_text(
        "from bkd_utils.common.cache import stage\n\n\n@stage\ndef expensive(*, x):\n"
        f"    with open({str(tmp_path / 'log')!r}, 'a') as log:\n        log.write('computed ')\n    return x * x\n"
    )
    parameters = f"folder = {str(tmp_path)!r}\nfail = True"
    path = write(tmp_path / "n.ipynb", stage, f"if fail:\n    {KILL.replace(chr(10), '; ')}", parameters=parameters)
    environment = {"BKD_WORK": str(tmp_path / "work")}
    assert run(path, tmp_path / "out", environment=environment).status == "failed"
    assert run(path, tmp_path / "out", environment=environment, parameters={"fail": False}).status == "ok"
    assert (tmp_path / "log").read_text() == "computed "
    assert os.listdir(tmp_path / "out") == ["n.ipynb"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=["Ctrl-C", "kill -9"])
def test_a_runner_ended_in_the_middle_leaves_no_process_and_nothing_in_the_way(tmp_path, number):
    marker, out = tmp_path / "started", tmp_path / "out"
    source = f"open({str(marker)!r}, 'w').close()\nif a == 1:\n    import time; time.sleep(600)"
    path = write(tmp_path / "n.ipynb", source)
    process, below = runner_at_work(path, out, marker)
    # A terminal sends Ctrl-C to the whole foreground group; kill -9 hits the runner alone.
    (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
    assert process.wait(timeout=30) != 0
    _, alive = psutil.wait_procs(below, timeout=30)
    assert alive == []
    assert os.listdir(out) == []
    if number == signal.SIGKILL:
        assert run(path, out, parameters={"a": 2}).status == "ok"
        assert os.listdir(out) == ["n.ipynb"]


def test_publishing_two_equal_runs_gives_equal_files(tmp_path):
    cells = (
        "import sys, time\nimport matplotlib.pyplot as plt\nimport pandas as pd",
        "plt.plot([1, 2])",
        "pd.Series([1.5]).to_frame().style.format('{:.1f}')",
        # How often printed text is cut depends on the clock; the wait makes it differ between the two runs.
        "for i in range(3):\n    print('row', i); print(time.time(), file=sys.stderr)\n    time.sleep(wait)",
        "print('10 %', end='\\r'); print('99 %', end='\\r'); print('done')",
    )
    written = []
    for attempt, wait in (("one", 0.5), ("two", 0.0)):
        path = write(tmp_path / f"{attempt}.ipynb", *cells, parameters="wait = 0.0")
        assert run(path, tmp_path / "out", parameters={"wait": wait}).status == "ok"
        notebooks.publish(tmp_path / "out" / f"{attempt}.ipynb", path)
        written.append(path.read_text())
    assert written[0] == written[1]
    assert "image/png" in written[0]
    assert written[0].count("stdout") == 2
    assert "99 %" not in str(notebooks.read(path).cells[-1].outputs)
    assert '"name": "stderr"' not in written[0]
    for volatile in ("papermill", " at 0x", str(tmp_path), notebooks.SENTINEL, "injected-parameters"):
        assert volatile not in written[0]
