"""The runner: options, profiles, going on after a failure, the closing table."""

import io
import re

import pytest
from notebook_files import write
from rich.console import Console
from tiny import save_tiny

from bkd_utils.common.files import read_json, write_json
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.identity import short_name
from bkd_utils.running import notebooks, runner
from bkd_utils.running.notebooks import NotebookError


@pytest.fixture
def two_notebooks(tmp_path, monkeypatch):
    """`run_all` sees two notebooks, the first of which fails, and writes below tmp_path only."""
    figure = (
        "import os, pathlib\nfolder = pathlib.Path(os.environ['BKD_FIGURES'])\nfolder.mkdir(parents=True)\n"
        "for kind in ('png', 'json'):\n    (folder / f'01_picture.{kind}').write_text(f'{seed} {n} {device}')"
    )
    paths = [
        write(tmp_path / "00_broken.ipynb", "1 / 0"),
        write(tmp_path / "01_sound.ipynb", figure, parameters="seed = 0\nn = 1\ndevice = 'auto'"),
    ]
    (tmp_path / "profiles.toml").write_text("[smoke]\nminutes_per_notebook = 2\n[smoke.01_sound]\nn = 7\n")
    monkeypatch.setattr(notebooks, "all_notebooks", lambda **_: paths)
    monkeypatch.setattr(runner, "DATA", tmp_path)
    monkeypatch.setattr(runner, "WORK", tmp_path / "work")
    return tmp_path / "work"


def test_a_run_goes_on_after_a_failure_and_ends_with_the_table(two_notebooks):
    console = Console(file=io.StringIO(), width=120)
    runs = runner.run_all(profile="smoke", seed=5, device="cpu", console=console)
    assert [(run.name, run.status, run.figures) for run in runs] == [
        ("00_broken", "failed", []),
        ("01_sound", "ok", ["01_picture"]),
    ]
    assert (two_notebooks / "figures/smoke" / short_name(DEFAULT_MODEL) / "01_picture.json").read_text() == "5 7 cpu"
    record = read_json(two_notebooks / "run.json")
    assert set(record) == {"profile", "machine", "started", "notebooks", "commit"}
    assert [set(entry) for entry in record["notebooks"]] == [{"name", "minutes", "peak_gib", "status", "gflops"}] * 2
    assert all(entry["gflops"].keys() == {"fp32", "bf16"} for entry in record["notebooks"])
    printed = console.file.getvalue()
    assert "running 00_broken\nrunning 01_sound\n" in printed  # no terminal: lines, not a bar
    assert "00_broken failed: ZeroDivisionError: division by zero" in printed
    assert str(two_notebooks / "executed/smoke" / short_name(DEFAULT_MODEL) / "00_broken.failed.ipynb") in printed
    assert "1 passed, 1 failed" in printed
    assert re.search(r"\d+ cores.*bf16 products at \d+ to \d+ GFLOP/s", printed)


def test_another_model_leaves_the_results_of_the_first(two_notebooks, tmp_path, monkeypatch):
    """Also one in the same folder under the same name."""
    monkeypatch.setattr(runner, "speed", dict)
    model = save_tiny(tmp_path / "mine", "llama")
    made = []
    for change in (None, lambda: (model / "chat_template.jinja").write_text("{{ messages[0].content }}")):
        if change:
            change()
        runner.run_all(profile="smoke", only="01", model=str(model), console=Console(file=io.StringIO()))
        made.append(short_name(str(model)))
    assert made[0][:5] == made[1][:5] == "mine-"
    assert made[0] != made[1]
    for kind, file in (("figures", "01_picture.json"), ("executed", "01_sound.ipynb")):
        assert {path.parent.name for path in (two_notebooks / kind / "smoke").glob(f"*/{file}")} == set(made)


def test_speed_is_that_of_the_product(monkeypatch):
    """A clock that moves by a hundredth of a second at every look says what the answer must be."""
    ticks = iter(range(100))
    monkeypatch.setattr(runner.time, "perf_counter", lambda: next(ticks) / 100)
    assert runner.speed(width=256, tries=2) == {"fp32": 3, "bf16": 3}  # 2 * 256^3 / 0.01 s = 3.4e9


def test_what_was_not_run_keeps_its_published_entry(tmp_path):
    published = tmp_path / "run.json"
    one, two, again = ({"name": name, "minutes": m} for name, m in (("00_a", 1), ("01_b", 2), ("01_b", 3)))
    assert runner.merged({"commit": "x", "notebooks": [two]}, published) == {"commit": "x", "notebooks": [two]}
    write_json(published, {"commit": "x", "notebooks": [one, two]})
    assert runner.merged({"commit": "y", "notebooks": [again]}, published) == {"commit": "y", "notebooks": [one, again]}


def test_without_a_terminal_progress_is_a_line_a_minute(monkeypatch):
    console = Console(file=io.StringIO(), width=120)
    now = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    with runner._progress(console, "01_sound") as on_cell:
        for second in range(0, 150, 10):
            now[0] = float(second)
            on_cell(second // 50, 9)
    assert console.file.getvalue() == "running 01_sound\n  01_sound: 1 of 9 cells\n  01_sound: 2 of 9 cells\n"


def test_unfit_options_stop_everything_before_the_first_notebook(monkeypatch):
    # Were an option let through, this test must not become a real run that publishes.
    monkeypatch.setattr(runner, "run_notebook", lambda path, **_: pytest.fail(f"{path.name} was started"))
    with pytest.raises(NotebookError, match="no notebook '42'"):
        runner.run_all(profile="smoke", only="42")
    with pytest.raises(NotebookError, match="unknown profile 'huge'"):
        runner.run_all(profile="huge")
    for other in ({"profile": "smoke"}, {"profile": "laptop", "seed": 1}, {"profile": "laptop", "model": "other"}):
        with pytest.raises(NotebookError, match="--publish"):
            runner.run_all(publish=True, **other)


def test_a_profile_with_a_parameter_that_no_notebook_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "DATA", tmp_path)
    (tmp_path / "profiles.toml").write_text("[smoke]\nminutes_per_notebook = 1\n[smoke.00_start_here]\nn_evil = 3\n")
    with pytest.raises(NotebookError, match="'n_evil'"):
        runner.profile_parameters("smoke", notebooks.select("00"))


@pytest.mark.parametrize("profile", ["smoke", "laptop", "paper"])
def test_every_profile_fits_the_notebooks(profile):
    runner.profile_parameters(profile, notebooks.all_notebooks())
