"""The command line says in one line what is wrong, and its help works without a model."""

import os
import subprocess
import sys

import pytest

from bkd_utils.files import ROOT


def call(*arguments):
    return subprocess.run([sys.executable, "-m", "bkd_utils", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_names_every_option_of_run():
    said = call("run", "--help")
    assert said.returncode == 0
    for option in ("--profile", "--only", "--model", "--retrain", "--force", "--device", "--seed", "--list"):
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
    ],
)
def test_a_bad_option_is_one_line_that_names_it(arguments, message):
    said = call(*arguments)
    assert said.returncode == 1
    assert message in said.stdout
    assert "Traceback" not in said.stdout + said.stderr


def test_run_all_uses_the_active_environment_and_passes_its_arguments(tmp_path):
    script = tmp_path / "run_all.sh"
    script.write_text((ROOT / "run_all.sh").read_text())
    (tmp_path / "requirements.lock").write_text("")
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\ncase "$1" in -c) echo {tmp_path}/.bkd-0;; *) echo "$@" >> {tmp_path}/calls;; esac\n')
    fake.chmod(0o755)
    environment = os.environ | {"VIRTUAL_ENV": str(tmp_path), "PATH": f"{fake.parent}:{os.environ['PATH']}"}
    for arguments in (["--only", "00"], ["test", "-x"]):
        subprocess.run(["bash", str(script), *arguments], env=environment, check=True, capture_output=True)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line for line in calls if "bkd_utils" in line] == ["-m bkd_utils run --only 00", "-m bkd_utils test -x"]
    assert sum("requirements.lock" in line for line in calls) == 1  # the stamp spares the second installation
