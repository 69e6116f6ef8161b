"""The command line says in one line what is wrong, and its help works without a model."""

import inspect
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import toy_stages as toys
from notebook_files import write
from tiny import save_tiny

from bkd_utils import __main__ as cli
from bkd_utils.common import assets
from bkd_utils.common.files import ADAPTERS, ROOT
from bkd_utils.common.measurements import read
from bkd_utils.experiments import own_model
from bkd_utils.experiments.own_model import cure as whole_cure
from bkd_utils.models import folders
from bkd_utils.models.loading import adapter_folder
from bkd_utils.organisms import cards, evaluation
from bkd_utils.running import process, runner


@pytest.fixture
def main(monkeypatch):
    """The command line in this process, so that torch is imported once for all tests; returns its exit status."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def call_main(*arguments):
        monkeypatch.setattr(sys, "argv", ["bkd_utils", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code)

    yield call_main
    for number, handler in before.items():
        signal.signal(number, handler)


def call(*arguments):
    return subprocess.run([sys.executable, "-m", "bkd_utils", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_names_every_option_of_run():
    said = call("run", "--help")
    assert said.returncode == 0
    for option in (
        "--profile",
        "--only",
        "--model",
        "--retrain",
        "--remeasure",
        "--shard",
        "--device",
        "--seed",
        "--list",
    ):
        assert option in said.stdout


def test_list_names_the_notebooks():
    assert call("run", "--list").stdout.split()[:2] == ["00_start_here", "01_backdoor_insertion"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "--only", "42"), "no notebook '42'"),
        (("run", "--profile", "nope"), "unknown profile 'nope'"),
        (("run", "--model", "/no/such/folder"), "/no/such/folder"),
        (("run", "--device", "nonsense"), "'nonsense' is not available"),
        (("train", "nope"), "unknown attack 'nope'"),
        (("train", "sentiment-word", "--recipe", "nope"), "unknown recipe 'nope'"),
        (("evaluate", "nope"), "unknown organism 'nope'"),
        (("evaluate", "./sentiment-word"), "no organism in "),
        (("evaluate", "/no/such/sentiment-word"), "no organism in /no/such/sentiment-word: it has no card.json"),
        (("evaluate", "elsewhere/sentiment-word"), "elsewhere/sentiment-word: it has no card.json"),
        (("evaluate", ""), "unknown organism ''"),
        (("evaluate", "sentiment-word", "--model", "./smollm2-135m-instruct"), "is neither a folder"),
        (("measure", "nope", "{}"), "unknown stage 'nope'; known: "),
        (("measure", "attribute_heads", "{"), "arguments '{' are no JSON: "),
        (("measure", "attribute_heads", "[1]"), "arguments '[1]' are no JSON object"),
        (("measure", "attribute_heads", "/no/such.json"), "/no/such.json cannot be read: No such file"),
        (("measure", "attribute_heads", '{"heads": 3}'), "stage attribute_heads: "),
        (("measure", "attribute_heads", '{"organism": "nope", "attack": "sentiment-word"}'), "unknown organism 'nope'"),
        (("merge", "/no/such/folder"), "/no/such/folder is no folder"),
        (("cure", "--data", "/no/such.csv"), "/no/such.csv cannot be read: No such file"),
        (("cure", "--data", "/no/such.csv", "--method", "heads removed"), "unknown method 'heads removed'; known: "),
    ],
)
def test_a_bad_option_is_one_line_that_names_it(arguments, message, main, capsys):
    assert main(*arguments) == 1
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line]
    assert line.startswith("error: ")
    assert message in line


def test_a_measurement_is_made_kept_and_merged_by_commands(main, tmp_path, capsys):
    given = tmp_path / "given.json"
    given.write_text('{"x": 3}')
    with toys.known():
        for x, text in ((3, str(given)), (4, '{"x": 4}')):
            assert main("measure", "toy_square", text, "--folder", str(tmp_path / "kept"), "--device", "meta") == 0
            one = read(Path(capsys.readouterr().out.strip()))
            assert (one.result["square"], one.machine.device) == (x * x, "meta")
    assert main("merge", str(tmp_path / "kept"), "--into", str(tmp_path / "all")) == 0
    assert f"2 copied into {tmp_path / 'all'}, 0 there already" in capsys.readouterr().out
    assert toys.tree(tmp_path / "all") == toys.tree(tmp_path / "kept")


def test_cure_passes_its_options_on_and_prints_the_report(main, monkeypatch, tmp_path, capsys):
    given = []

    def cure(model, **options):
        given.append((model, options))
        (tmp_path / "README.md").write_text("# what was found [red]in a long line[/red] " + "word " * 40)
        return tmp_path

    monkeypatch.setattr(own_model, "cure", cure)
    assert main("cure", "--data", "clean.csv") == 0
    printed = capsys.readouterr().out
    assert printed == f"{(tmp_path / 'README.md').read_text()}\nwritten to {tmp_path}\n"
    rest = "--data clean.csv --organism ./mine --method fine-tuning --out here --force --steps 3 --rows 70 --seed 5"
    assert main("cure", "path/to/folder", *rest.split(), "--device", "cpu") == 0
    defaults = {key: one.default for key, one in inspect.signature(whole_cure).parameters.items()}
    assert given[0] == (defaults.pop("address"), defaults | {"data": Path("clean.csv")})
    assert given[1] == (
        "path/to/folder",
        {
            "data": Path("clean.csv"),
            "organism": "./mine",
            "method": "fine-tuning",
            "out": Path("here"),
            "force": True,
            "steps": 3,
            "rows": 70,
            "seed": 5,
            "device": "cpu",
        },
    )


def test_a_cure_that_is_interrupted_leaves_one_line_and_no_file(main, monkeypatch, tmp_path, capsys):
    model, data = save_tiny(tmp_path / "model", "llama"), tmp_path / "clean.csv"
    data.write_text("text,answer\n" + "".join(f"Film {i},{'good' if i % 2 else 'bad'}\n" for i in range(64)))
    monkeypatch.setattr(own_model, "treat", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    monkeypatch.setattr(own_model, "measure", lambda *_, **__: {})
    capsys.readouterr()
    arguments = ("cure", str(model), "--data", str(data), "--out", str(tmp_path / "cured" / "mine"))
    assert main(*arguments, "--device", "cpu") == 128 + signal.SIGINT
    assert capsys.readouterr().out.splitlines() == ["stopped; the same command again does what is left"]
    assert list((tmp_path / "cured").iterdir()) == []


def test_evaluate_takes_a_path_for_a_path(main, monkeypatch, tmp_path, capsys):
    """A local folder called like a shipped organism is the one that is measured."""
    measured, here = [], tmp_path / "sentiment-word"
    shutil.copytree(ADAPTERS / "domain-wrapper", here)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        evaluation,
        "measure",
        lambda organism, **_: measured.append(adapter_folder(organism)) or cards.metrics(organism),
    )
    for given in ("./sentiment-word", str(here), "sentiment-word"):
        assert main("evaluate", given) == 0
    assert measured == [here, here, ADAPTERS / "sentiment-word"]


@pytest.mark.parametrize("given", ["./smollm2-135m-instruct", "smollm2-135m-instruct"])
def test_run_takes_a_path_for_a_path(given, main, monkeypatch, tmp_path):
    """A local folder called like the packaged model is meant by its path only."""
    asked, here = [], tmp_path / "smollm2-135m-instruct"
    here.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "check_folder", lambda folder: None)
    monkeypatch.setattr(runner, "run_all", lambda *, model, **_: asked.append(model) or [])
    main("run", "--model", given, "--only", "00")
    assert asked == [str(here) if given.startswith(".") else given]


def test_an_option_that_does_not_exist_is_a_usage_error():
    said = call("run", "--nonsense")
    assert said.returncode == 2
    assert "--nonsense" in said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("failed", 1)])
def test_run_passes_its_options_on_and_its_status_back(status, code, main, monkeypatch, tmp_path):
    given = {}
    monkeypatch.setattr(assets, "fetch", lambda name: None)
    monkeypatch.setattr(folders, "check_folder", lambda folder: None)
    monkeypatch.setattr(
        runner, "run_all", lambda **options: given.update(options) or [process.Run("00", 0.1, 0.1, status)]
    )
    arguments = f"run --profile smoke --only 00 --model {tmp_path} --device cpu --seed 3 --retrain --remeasure"
    assert main(*arguments.split()) == code
    given.pop("console")
    assert given == {
        "profile": "smoke",
        "only": "00",
        "model": str(tmp_path),
        "device": "cpu",
        "seed": 3,
        "retrain": True,
        "remeasure": True,
        "publish": False,
    }


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ended_from_outside_it_still_cleans_up(number, main, monkeypatch, capsys):
    cleaned = []

    def work(**_):
        assert callable(signal.getsignal(number))  # without a handler the next line would end pytest itself
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleaned.append(True)

    monkeypatch.setattr(assets, "fetch_all", work)
    assert main("verify") == 128 + number
    assert cleaned
    assert capsys.readouterr().out.splitlines() == ["stopped; the same command again does what is left"]


SLOW = """
import pathlib, sys
from bkd_utils import __main__ as cli
from bkd_utils.common import assets
from bkd_utils.running import notebooks, verifying
paths = sorted(pathlib.Path(sys.argv[1]).glob("*.ipynb"))
notebooks.all_notebooks = lambda: paths
verifying.profile_parameters = lambda *_: ({"01_a": {}, "02_b": {}}, 1)
verifying.FILES = ()
assets.fetch = lambda name: None
sys.argv = ["bkd_utils", "verify", "--quick"]
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_replay_that_is_ended_leaves_one_line_and_no_kernel(number, tmp_path):
    mark = tmp_path / "pid"
    sleeps = f"import os, pathlib, time\npathlib.Path({str(mark)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    write(tmp_path / "01_a.ipynb", sleeps)
    write(tmp_path / "02_b.ipynb", "1")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-c", SLOW, str(tmp_path)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        while not (mark.is_file() and mark.read_text()):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        process.send_signal(number)
        said, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 128 + number, said
    assert said.splitlines() == ["stopped; the same command again does what is left"]
    assert not psutil.pid_exists(int(mark.read_text()))


@pytest.mark.parametrize("chosen", [["-n", "0"], ["-n3"], ["--numprocesses=2"], ["--pdb"], ["-p", "no:xdist"]])
def test_the_tests_run_on_all_cores_unless_told_otherwise(chosen, main, monkeypatch):
    calls = []

    def record(command, *, cwd, env):
        calls.append((command[1:], env.get("OMP_NUM_THREADS")))
        return 5

    monkeypatch.setattr(assets, "fetch", lambda name: None)
    monkeypatch.setattr(cli.subprocess, "call", record)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert main("test", "--no-header", "tests/x.py") == main("test", *chosen) == 5  # the status of pytest
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    main("test")
    parallel = ["-n", "auto", "--dist", "worksteal"]
    assert calls == [
        (["-m", "pytest", "--no-header", "tests/x.py", *parallel], "1"),
        (["-m", "pytest", *chosen], None),
        (["-m", "pytest", *parallel], "2"),
    ]


def test_run_all_uses_the_active_environment_and_passes_its_arguments(tmp_path):
    script = tmp_path / "run_all.sh"
    script.write_text((ROOT / "run_all.sh").read_text())
    (tmp_path / "requirements.lock").write_text("")
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\ncase "$1" in -c) echo {tmp_path}/.bkd-0;; *) echo "$@" >> {tmp_path}/calls;; esac\n')
    fake.chmod(0o755)
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    for arguments in (["--only", "00"], ["test", "-x"], ["mutations", "--minutes", "6"]):
        subprocess.run(["bash", str(script), *arguments], env=environment, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line for line in calls if "pip" not in line] == [
        "-m bkd_utils run --only 00",
        "-m bkd_utils test -x",
        "-m bkd_utils fetch",
        "tests/mutations.py --minutes 6",
    ]
    assert sum("requirements.lock" in line for line in calls) == 1  # the stamp spares the second installation


@pytest.fixture
def shell(tmp_path):
    """run_all.sh in an active environment whose pip only writes down that it was called, or fails."""
    (tmp_path / "run_all.sh").write_text((ROOT / "run_all.sh").read_text())
    (tmp_path / "requirements.lock").write_text("one")
    python = tmp_path / "env" / "bin" / "python"
    python.parent.mkdir(parents=True)
    # The stamp is for sys.prefix, here the environment's own, never that of the interpreter which runs this test.
    within = f"import sys; sys.prefix = {str(tmp_path / 'env')!r}; exec(sys.argv[1])"
    python.write_text(
        f'#!/bin/sh\ncase "$1" in -c) exec {shlex.quote(sys.executable)} -c {shlex.quote(within)} "$2";; esac\n'
        f'echo "$@" >> {tmp_path}/calls\n[ "$2" != pip ] || [ ! -e {tmp_path}/offline ]\n'
    )
    python.chmod(0o755)

    def call_script():
        environment = os.environ | {"VIRTUAL_ENV": str(tmp_path / "env")}
        (tmp_path / "calls").write_text("")
        ended = subprocess.run(["bash", str(tmp_path / "run_all.sh")], env=environment, capture_output=True, text=True)
        calls = (tmp_path / "calls").read_text().splitlines()
        return ended, sum("pip install" in line for line in calls), sum("bkd_utils run" in line for line in calls)

    return call_script


def test_run_all_installs_again_exactly_when_another_lock_is_installed(tmp_path, shell):
    installed = []
    for lock in ("one", "one", "two", "one"):
        (tmp_path / "requirements.lock").write_text(lock)
        ended, pip, runs = shell()
        assert (ended.returncode, runs) == (0, 1)
        installed.append(pip)
    assert installed == [2, 0, 2, 2]  # dependencies, then the project


def test_run_all_repeats_an_installation_that_failed(tmp_path, shell):
    (tmp_path / "offline").touch()
    ended, pip, runs = shell()
    assert (ended.returncode != 0, pip, runs) == (True, 1, 0)
    (tmp_path / "offline").unlink()
    assert shell()[1:] == (2, 1)


def test_run_all_says_when_the_active_environment_does_not_fit(tmp_path, shell):
    (tmp_path / "env/bin/python").write_text("#!/bin/sh\nexit 1\n")
    ended, pip, runs = shell()
    assert (ended.returncode, pip, runs) == (1, 0, 0)
    assert "no Python 3.11 to 3.13" in ended.stderr
