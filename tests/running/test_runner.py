"""The runner: options, profiles, going on after a failure, what a run used, the closing table."""

import errno
import io
import json
import re
from pathlib import Path

import pytest
from notebook_files import write
from rich.console import Console
from tiny import save_tiny

from bkd_utils.common.files import UserError, read_json, write_json
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.identity import short_name
from bkd_utils.running import ledger, notebooks, publishing, recording, runner
from bkd_utils.running.notebooks import NotebookError
from bkd_utils.running.process import Run


@pytest.fixture
def two_notebooks(tmp_path, monkeypatch):
    """`run_all` sees two notebooks, the first of which fails, and writes below tmp_path only."""
    figure = (
        "import os, pathlib\nfolder = pathlib.Path(os.environ['BKD_FIGURES'])\n"
        "for kind in ('png', 'json'):\n    (folder / f'01_picture.{kind}').write_text(f'{seed} {n} {device}')"
    )
    paths = [
        write(tmp_path / "00_broken.ipynb", "1 / 0"),
        write(tmp_path / "01_sound.ipynb", figure, parameters="seed = 0\nn = 1\ndevice = 'auto'"),
    ]
    (tmp_path / "profiles.toml").write_text("[smoke]\nminutes_per_notebook = 2\n[smoke.01_sound]\nn = 7\n")
    monkeypatch.setattr(notebooks, "all_notebooks", lambda **_: paths)
    monkeypatch.setattr(notebooks, "DATA", tmp_path)
    monkeypatch.setattr(runner, "WORK", tmp_path / "work")
    monkeypatch.setenv("BKD_WORK", str(tmp_path / "work"))
    monkeypatch.delenv("BKD_KEEP", raising=False)
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
        runner.run_all(profile="smoke", only="42", console=Console())
    with pytest.raises(NotebookError, match="unknown profile 'huge'"):
        runner.run_all(profile="huge", console=Console())
    for other in ({"profile": "smoke"}, {"profile": "laptop", "seed": 1}, {"profile": "laptop", "model": "other"}):
        with pytest.raises(NotebookError, match="--publish"):
            runner.run_all(publish=True, **other, console=Console())


def test_a_profile_with_a_parameter_that_no_notebook_has_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(notebooks, "DATA", tmp_path)
    (tmp_path / "profiles.toml").write_text("[smoke]\nminutes_per_notebook = 1\n[smoke.00_start_here]\nn_evil = 3\n")
    with pytest.raises(NotebookError, match="'n_evil'"):
        notebooks.profile_parameters("smoke", notebooks.select("00"))


@pytest.mark.parametrize("profile", ["smoke", "laptop", "paper"])
def test_every_profile_fits_the_notebooks(profile):
    notebooks.profile_parameters(profile, notebooks.all_notebooks())


SOUND = "[smoke]\nminutes_per_notebook = 1\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[smoke]\n", r"profiles.toml, \[smoke\]: minutes_per_notebook: None: input should be a valid number"),
        ("[smoke]\nminutes_per_notebook = 0", "minutes_per_notebook: 0: input should be greater than 0"),
        ("[smoke]\nminutes_per_notebook = -5", "minutes_per_notebook: -5: input should be greater than 0"),
        ("[smoke]\nminutes_per_notebook = '9'", "minutes_per_notebook: '9': input should be a valid number"),
        ("[smoke]\nminutes_per_notebook = true", "minutes_per_notebook: True: input should be a valid number"),
        ("[smoke]\nminutes_per_notebook = inf", "minutes_per_notebook: inf: input should be a finite number"),
        ("[smoke]\nminutes_per_notebook = nan", "minutes_per_notebook: nan: input should be a finite number"),
        (
            SOUND + "[smoke.12_nothing]\nn = 1",
            r"profiles.toml, \[smoke\]: no notebook '12_nothing'; there are: 00_start",
        ),
        (SOUND + "n_eval = 3", r"profiles.toml, \[smoke\]: no notebook 'n_eval'"),
        (
            SOUND + "00_start_here = 3",
            r"profiles.toml, \[smoke\]: 00_start_here: 3: input should be a valid dictionary",
        ),
        (
            SOUND + "[smoke.00_start_here]\nn_eval = '16'",
            "00_start_here.ipynb: n_eval = '16' is of another type than its",
        ),
        (SOUND + "[smoke.00_start_here]\nn_eval = 1.5", "n_eval = 1.5 is of another type"),
        (SOUND + "[smoke.00_start_here]\nn_eval = true", "n_eval = True is of another type"),
        (
            SOUND + "[smoke.01_backdoor_insertion]\nattack_names = 'sentiment-word'",
            "01_.*attack_names = 'sentiment-word' is of",
        ),
        (SOUND + "[smoke.01_backdoor_insertion]\nn_evil = 1", "01_backdoor_insertion.ipynb has no parameter 'n_evil'"),
        (SOUND + SOUND, r"profiles.toml: Cannot declare \('smoke',\) twice"),
        ("\ufeff[smoke]\nminutes_per_notebook = '9'", "minutes_per_notebook: '9'"),
        (SOUND.encode("utf-16"), "profiles.toml is not UTF-8 text"),
    ],
)
def test_a_fault_in_the_table_of_profiles_is_one_line_also_of_notebooks_not_chosen(
    text, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(notebooks, "DATA", tmp_path)
    (tmp_path / "profiles.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message) as caught:
        notebooks.profile_parameters("smoke", notebooks.select("00"))
    assert len(str(caught.value).splitlines()) == 1


def test_a_seed_that_cannot_be_one_stops_everything_before_the_first_notebook(two_notebooks, monkeypatch):
    monkeypatch.setattr(runner, "run_notebook", lambda path, **_: pytest.fail(f"{path.name} was started"))
    for seed in (-1, 2**32, "1", True, 1.0):
        with pytest.raises(ValueError, match=f"seed: {seed!r}: input should be"):
            runner.run_all(profile="smoke", seed=seed, console=Console())


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "somewhere")


@pytest.fixture
def recorded(monkeypatch):
    """Notebooks that run at once; those in `failing` find the disk full."""
    failing, started = set(), []
    monkeypatch.setattr(runner, "commit", lambda: "c0ffee")

    def run(path, **_):
        started.append(path.stem)
        return full() if path.stem in failing else Run(path.stem, 0.1, 0.1, "ok")

    monkeypatch.setattr(runner, "run_notebook", run)
    monkeypatch.setattr(runner, "speed", lambda: {"fp32": 1, "bf16": 1})
    return failing, started


def test_a_full_disk_is_the_failure_of_one_notebook_and_the_others_run(two_notebooks, recorded):
    console = Console(file=io.StringIO(), width=120)
    recorded[0].add("00_broken")
    runs = runner.run_all(profile="smoke", console=console)
    assert [(run.name, run.status) for run in runs] == [("00_broken", "failed"), ("01_sound", "ok")]
    assert runs[0].reason == "[Errno 28] No space left on device: 'somewhere'"
    assert "1 passed, 1 failed" in console.file.getvalue()
    assert [entry["status"] for entry in read_json(two_notebooks / "run.json")["notebooks"]] == ["failed", "ok"]


def test_a_full_disk_after_a_notebook_is_its_failure_too(two_notebooks, recorded, monkeypatch):
    before = runner._figures
    calls = []
    monkeypatch.setattr(
        runner, "_figures", lambda folder: calls.append(1) or (full() if len(calls) == 2 else before(folder))
    )
    runs = runner.run_all(profile="smoke", console=Console(file=io.StringIO()))
    assert [(run.name, run.status) for run in runs] == [("00_broken", "failed"), ("01_sound", "ok")]


def test_a_notebook_that_is_edited_or_deleted_while_others_run_is_its_failure(two_notebooks, recorded, monkeypatch):
    paths = notebooks.all_notebooks()
    monkeypatch.setattr(notebooks, "profile_parameters", lambda *_: ({path.stem: {} for path in paths}, 9))
    paths[0].write_text("{")
    runs = runner.run_all(profile="smoke", console=Console(file=io.StringIO()))
    assert [(run.name, run.status) for run in runs] == [("00_broken", "failed"), ("01_sound", "ok")]
    assert "00_broken.ipynb is not a notebook" in runs[0].reason


def test_a_record_that_cannot_be_written_comes_after_the_table(two_notebooks, recorded, monkeypatch):
    console = Console(file=io.StringIO(), width=120)
    monkeypatch.setattr(runner, "write_json", full)
    with pytest.raises(UserError, match=r"the record of the run could not be written: .*No space left") as caught:
        runner.run_all(profile="smoke", console=console)
    assert len(str(caught.value).splitlines()) == 1
    assert "2 passed, 0 failed" in console.file.getvalue()


@pytest.mark.parametrize(
    "place", ["work", "work/ledgers", "work/figures", "work/executed", "work/measurements", "work/executed/smoke"]
)
def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_notebook(two_notebooks, recorded, place):
    path = two_notebooks.parent / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()  # a file in its place: the tests may run as root, whom no permission stops
    with pytest.raises(UserError, match=f"cannot write to {path}") as caught:
        runner.run_all(profile="smoke", console=Console(file=io.StringIO()))
    assert recorded[1] == []
    assert len(str(caught.value).splitlines()) == 1


def test_a_work_folder_with_spaces_and_without_a_parent_is_made(two_notebooks, recorded, monkeypatch):
    work = two_notebooks / "of mine" / "a b"
    monkeypatch.setattr(runner, "WORK", work)
    runner.run_all(profile="smoke", console=Console(file=io.StringIO()))
    assert (work / "run.json").is_file()


# --- what a run used ------------------------------------------------------------------------------------------------


def line(id, how, **more):
    return {"id": id, "how": how, "commit": "c0ffee", "seconds": 1.0} | more


CHECKED = {"agrees": True, "worst": 0.0, "place": "level"}


@pytest.fixture
def ledgers(two_notebooks, recorded, monkeypatch):
    """Notebooks that run at once, and that write what `wanted` says into their ledgers and then end as it says."""
    wanted, environments = {}, {}

    def run(path, *, environment, **_):
        environments[path.stem] = environment
        lines, status = wanted.get(path.stem, ([], "ok"))
        with open(environment["BKD_LEDGER"], "a", encoding="utf-8") as handle:
            handle.writelines(json.dumps(one) + "\n" for one in lines)
        return Run(path.stem, 0.1, 0.1, status, "" if status == "ok" else "it broke")

    monkeypatch.setattr(runner, "run_notebook", run)
    return wanted, environments


def printed(**options):
    console = Console(file=io.StringIO(), width=160)
    runner.run_all(profile="smoke", console=console, **options)
    return console.file.getvalue()


def test_the_closing_table_counts_what_each_notebook_used(ledgers):
    wanted, environments = ledgers
    wanted["00_broken"] = [line("toy/a", "shipped"), line("toy/a", "checked", **CHECKED)], "failed"
    mine = [line("toy/b", "shipped, other code"), line("toy/c", "measured here"), line("toy/d", "kept here")]
    wanted["01_sound"] = [line("toy/a", "shipped"), *mine], "ok"
    told = printed()
    rows = {
        row[0]: row for row in ([cell.strip() for cell in text.split("│")[1:-1]] for text in told.splitlines()) if row
    }
    assert rows["00_broken"][3:] == ["1", "1", "", "", "", "failed"]
    assert rows["01_sound"][3:] == ["2", "", "1", "2", "", "ok"]
    assert "2 shipped and used, 1 checked and 1 agreed, 1 stale, 2 measured here" in told
    assert "stale: measured by other code (1 at c0ffee)" in told
    # A second run begins its ledgers anew.
    wanted.clear()
    assert "0 shipped and used, 0 checked and 0 agreed, 0 stale, 0 measured here" in printed()
    books = [Path(one["BKD_LEDGER"]) for one in environments.values()]
    assert [book.name for book in books] == ["00_broken.jsonl", "01_sound.jsonl"]
    assert [ledger.read(book) for book in books] == [ledger.Used(finished=True)] * 2


def test_a_run_uses_what_ships_and_keeps_in_the_work_folder(ledgers, two_notebooks, monkeypatch):
    _, environments = ledgers
    printed(only="01")
    assert environments["01_sound"]["BKD_KEEP"] == str(two_notebooks / "measurements")
    assert "BKD_SHIPPED" not in environments["01_sound"]
    monkeypatch.setenv("BKD_KEEP", str(two_notebooks / "elsewhere"))
    printed(only="01")
    assert environments["01_sound"]["BKD_KEEP"] == str(two_notebooks / "elsewhere")


def test_remeasuring_reads_nothing_that_ships_and_goes_on_after_a_failure(ledgers, two_notebooks):
    wanted, environments = ledgers
    kept = two_notebooks / "remeasured" / "toy" / "a.json"
    wanted["00_broken"] = [line("toy/a", "measured here")], "ok"
    wanted["01_sound"] = [line("toy/a", "kept here")], "failed"
    printed(remeasure=True)
    kept.parent.mkdir(parents=True)
    kept.touch()
    for environment in environments.values():
        assert environment["BKD_KEEP"] == str(two_notebooks / "remeasured")
        assert environment["BKD_SHIPPED"] == ""
    # The second notebook did not come to its end, so the same command goes on with what the first one measured, also
    # after another run that used what ships.
    wanted["01_sound"] = [line("toy/a", "kept here")], "ok"
    printed()
    printed(remeasure=True)
    assert kept.exists()
    # Now that both did, it measures everything anew.
    printed()
    assert kept.exists()
    printed(remeasure=True)
    assert not kept.exists()


@pytest.fixture
def published(ledgers, tmp_path, monkeypatch):
    """A run that may publish, into folders below tmp_path; what was handed to `publishing`."""
    given = []
    text = (tmp_path / "profiles.toml").read_text()
    (tmp_path / "profiles.toml").write_text(text.replace("smoke", "laptop"))
    monkeypatch.setattr(publishing, "MEASUREMENTS", tmp_path / "shipped")
    monkeypatch.setattr(recording, "FIGURES", tmp_path)
    monkeypatch.setattr(recording, "DATA", tmp_path)
    monkeypatch.setattr(recording, "made_files", list)
    monkeypatch.setattr(runner, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(runner.files, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(publishing, "publish_notebook", lambda executed, original, **_: given.append(original.stem))
    monkeypatch.setattr(publishing, "publish_measurements", lambda used, *, kept: given.append((used, kept)))
    return given


def test_what_notebooks_used_that_ran_to_their_end_is_published(published, ledgers, two_notebooks, tmp_path):
    wanted, _ = ledgers
    wanted["00_broken"] = [line("toy/a", "measured here")], "failed"
    wanted["01_sound"] = [line("toy/b", "measured here"), line("toy/c", "shipped")], "ok"
    runner.run_all(profile="laptop", publish=True, console=Console(file=io.StringIO()))
    notebook, (used, kept) = published
    assert notebook == "01_sound"
    assert list(used) == ["01_sound"]
    assert (used["01_sound"].own, used["01_sound"].shipped) == (["toy/b"], ["toy/c"])
    assert kept == two_notebooks / "measurements"
    assert [entry["name"] for entry in read_json(tmp_path / "figures" / "run.json")["notebooks"]] == [
        "00_broken", "01_sound",
    ]  # fmt: skip


def test_what_was_remeasured_can_be_published(published, two_notebooks):
    runner.run_all(profile="laptop", publish=True, remeasure=True, console=Console(file=io.StringIO()))
    assert published[-1][1] == two_notebooks / "remeasured"


def test_a_run_that_does_not_publish_writes_nothing_that_is_committed(published, tmp_path):
    runner.run_all(profile="laptop", console=Console(file=io.StringIO()))
    assert published == []
    assert not (tmp_path / "shipped").exists()
    assert not (tmp_path / "figures").exists()
