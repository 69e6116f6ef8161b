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
from test_notebooks import write

from bkd_utils import notebooks, runner
from bkd_utils.files import ROOT
from bkd_utils.notebooks import NotebookError

KILL = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


def run(path, folder, *, limit=120, parameters=None, environment=None):
    return runner.run_notebook(
        path, parameters=parameters or {}, folder=folder, limit=limit, environment=environment or {}
    )


def kernels_of(pid=None):
    found = psutil.Process(pid or os.getpid()).children(recursive=True)
    return [p for p in found if "ipykernel_launcher" in " ".join(p.cmdline())]


def test_a_sound_notebook_runs_with_its_parameters_whatever_kernel_and_noise(tmp_path):
    cells = (
        "import sys, warnings",
        "warnings.warn('noise')\nprint('noise', file=sys.stderr)",
        "assert a == 5, a",
        "import bkd_utils\nprint(sys.prefix)",
    )
    path = write(tmp_path / "n.ipynb", *cells, kernel="a-kernel-of-another-machine")
    seen = []
    result = runner.run_notebook(
        path, parameters={"a": 5}, folder=tmp_path / "out", limit=120, on_cell=lambda *cells: seen.append(cells)
    )
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
        ((KILL, "b = 2"), 120, "died|dead"),
        (("1 / 0", "b = 2"), 120, "ZeroDivisionError: division by zero"),
        (("import time\ntime.sleep(600)",), 8, "limit of 0.1 minutes"),
    ],
    ids=["sys.exit", "killed kernel", "exception", "time limit"],
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
    assert not (tmp_path / "out").exists()


def test_a_kernel_of_another_environment_is_not_accepted(tmp_path):
    book = notebooks.with_sentinel(notebooks.read(write(tmp_path / "n.ipynb")), "token")
    said = '{"token": "token", "prefix": "/elsewhere", "peak": 1}'
    book.cells[-1].outputs = [nbformat.v4.new_output("stream", name="stdout", text=said)]
    nbformat.write(book, tmp_path / "run.ipynb")
    reason, _ = runner._verdict(tmp_path / "run.ipynb", "token", 0, "", limit=1)
    assert "/elsewhere" in reason
    reason, _ = runner._verdict(tmp_path / "run.ipynb", "another token", 0, "", limit=1)
    assert "never reached" in reason


def test_a_restart_after_a_kill_keeps_the_finished_stage(tmp_path):
    stage = "import sys\nsys.path.insert(0, folder)\nimport staged\nstaged.expensive(x=3)"
    (tmp_path / "staged.py").write_text(
        "from bkd_utils.cache import stage\n\n\n@stage\ndef expensive(*, x):\n"
        f"    with open({str(tmp_path / 'log')!r}, 'a') as log:\n        log.write('computed ')\n    return x * x\n"
    )
    parameters = f"folder = {str(tmp_path)!r}\nfail = True"
    path = write(tmp_path / "n.ipynb", stage, f"if fail:\n    {KILL.replace(chr(10), '; ')}", parameters=parameters)
    environment = {"BKD_WORK": str(tmp_path / "work")}
    assert run(path, tmp_path / "out", environment=environment).status == "failed"
    assert run(path, tmp_path / "out", environment=environment, parameters={"fail": False}).status == "ok"
    assert (tmp_path / "log").read_text() == "computed "
    assert os.listdir(tmp_path / "out") == ["n.ipynb"]


def test_killing_the_runner_ends_its_kernel_and_leaves_nothing_in_the_way(tmp_path):
    marker = tmp_path / "started"
    path = write(
        tmp_path / "n.ipynb", f"open({str(marker)!r}, 'w').close()\nif a == 1:\n    import time; time.sleep(600)"
    )
    code = (
        "from pathlib import Path; from bkd_utils import runner; "
        f"runner.run_notebook(Path({str(path)!r}), parameters={{}}, folder=Path({str(tmp_path / 'out')!r}), limit=500)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 90
    while not marker.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    tree = psutil.Process(process.pid).children(recursive=True)
    assert kernels_of(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for child in tree:  # what a reboot would do for papermill; the kernel must then see that its parent is gone
        if "bkd_utils.execute" in " ".join(child.cmdline()):
            child.kill()
    _, alive = psutil.wait_procs(tree, timeout=30)
    assert alive == []
    assert run(path, tmp_path / "out", parameters={"a": 2}).status == "ok"


def test_unfit_options_stop_everything_before_the_first_notebook():
    with pytest.raises(NotebookError, match="no notebook '42'"):
        runner.run_all(profile="smoke", only="42")
    with pytest.raises(NotebookError, match="unknown profile 'huge'"):
        runner.run_all(profile="huge")
    with pytest.raises(NotebookError, match="--publish"):
        runner.run_all(profile="smoke", publish=True)


def test_a_profile_with_a_parameter_that_no_notebook_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "DATA", tmp_path)
    (tmp_path / "profiles.toml").write_text("[smoke]\nminutes_per_notebook = 1\n[smoke.00_start_here]\nn_evil = 3\n")
    with pytest.raises(NotebookError, match="'n_evil'"):
        runner.profile_parameters("smoke", notebooks.select("00"))


@pytest.mark.parametrize("profile", runner.PROFILES)
def test_every_profile_fits_the_notebooks(profile):
    runner.profile_parameters(profile, notebooks.all_notebooks())


def test_publishing_two_equal_runs_gives_equal_files(tmp_path):
    cells = (
        "import matplotlib.pyplot as plt\nimport pandas as pd",
        "plt.plot([1, 2])",
        "pd.Series([1.5]).to_frame().style.format('{:.1f}')",
    )
    written = []
    for attempt in ("one", "two"):
        path = write(tmp_path / f"{attempt}.ipynb", *cells)
        assert run(path, tmp_path / "out").status == "ok"
        notebooks.publish(tmp_path / "out" / f"{attempt}.ipynb", path)
        written.append(path.read_text())
    assert written[0] == written[1]
    assert "image/png" in written[0]
