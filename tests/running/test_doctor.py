"""The doctor: what is missing, damaged, full, slow or another version is named, and nothing of that makes it crash."""

import importlib.metadata
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from rich.console import Console

from bkd_utils.common import measurements
from bkd_utils.common.assets import ASSETS, RECEIPT, sources
from bkd_utils.common.files import FIGURES, ROOT, read_json
from bkd_utils.running import doctor, runner

GIB = 2**30
WHAT = ["python", "packages", "assets", "disk", "memory", "graphics card", "jupyterlab", "git", "speed"]
RUN = {one["name"][:2]: one for one in read_json(FIGURES / "run.json")["notebooks"]}


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A Python with nothing installed."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


def call(python, *arguments, cwd=ROOT):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [str(python), "-m", "bkd_utils", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_where_nothing_is_installed_everything_that_lacks_is_named(bare):
    ended = call(bare, "doctor", "--json")
    told = json.loads(ended.stdout)
    assert (ended.returncode, told["status"], ended.stderr) == (1, "fail", "")
    assert [one["what"] for one in told["findings"]] == WHAT
    found = {one["what"]: one for one in told["findings"]}
    direct = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    missing = found["packages"]["found"].removeprefix("missing: ").split(", ")
    assert missing == [line.split("==")[0].replace("_", "-") for line in direct]
    assert [found[name]["status"] for name in ("python", "disk")] == ["ok", "ok"]
    assert found["speed"]["found"] == "ModuleNotFoundError: No module named 'torch'"


def test_any_command_says_so_where_the_command_line_cannot_work(bare):
    ended = call(bare, "run", "--only", "00")
    assert ended.returncode == 1
    assert [line.split(": ")[:2] for line in ended.stdout.splitlines()][1] == ["packages", "fail"]


def test_here_nothing_is_broken_and_no_path_is_told():
    ended = call(sys.executable, "doctor", "--json")
    told = json.loads(ended.stdout)
    assert (ended.returncode, {one["status"] for one in told["findings"]} <= {"ok", "warn"}) == (0, True), told
    assert [(set(one), one["what"]) for one in told["findings"]] == [
        ({"what", "status", "found", "advice"}, each) for each in WHAT
    ]
    assert not [place for place in (ROOT, Path.home(), Path(sys.prefix)) if str(place) in ended.stdout]


@pytest.mark.parametrize(
    ("statuses", "code"), [(["ok", "ok"], 0), (["ok", "warn"], 0), (["fail", "warn"], 1), (["warn", "fail", "ok"], 1)]
)
def test_the_status_is_one_only_if_something_is_broken(statuses, code, monkeypatch, capsys):
    findings = [(f"thing {i}", status, "[red]found[/red]", "A sentence.") for i, status in enumerate(statuses)]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    console = Console(file=io.StringIO(), width=100)
    assert [doctor.report(console), doctor.report(), doctor.report(as_json=True)] == [code] * 3
    shown = console.file.getvalue()
    assert shown.count("[red]found[/red]") == shown.count("A sentence.") == len(statuses)
    lines, _, given = capsys.readouterr().out.partition("{")
    assert lines.splitlines() == [": ".join(one) for one in findings]
    assert [tuple(one.values()) for one in json.loads("{" + given)["findings"]] == findings


def test_what_cannot_be_examined_is_a_finding_without_the_name_of_its_user(monkeypatch):
    def broken():
        raise OSError(f"no such\nlibrary in {Path.home() / 'lib'}")

    broken.__name__ = "graphics_card"
    monkeypatch.setattr(doctor, "graphics_card", broken)
    for name in ("assets", "jupyterlab", "speed"):
        monkeypatch.setattr(doctor, name, named(name))
    found = {what: rest for what, *rest in doctor.examine()}
    assert found["graphics card"] == ["fail", "OSError: no such library in ~/lib", "This could not be examined."]
    assert found["speed"] == ["ok", "stands in", ""]


def named(name):
    def look():
        return "ok", "stands in", ""

    look.__name__ = name
    return look


def test_a_python_that_the_project_does_not_allow(monkeypatch):
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    low, high = (int(bound) for bound in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", allowed).groups())
    told = {}
    for minor in range(low - 1, high + 1):
        monkeypatch.setattr(sys, "version_info", (3, minor, 1))
        told[minor] = doctor.python()[0] != "fail"
    assert told == {minor: low <= minor < high for minor in told}


def test_a_python_that_is_no_environment_of_its_own(monkeypatch):
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    assert doctor.python()[0] == "warn"
    monkeypatch.setenv("CONDA_PREFIX", "/conda")
    assert doctor.python()[0] == "ok"


@pytest.fixture
def versions(monkeypatch):
    """Name -> version that differs from the locked one, or None for a missing package; everything else is as locked."""
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = dict(line.split("==") for line in lines if "==" in line)
    other = {}

    def version(name):
        found = (locked | other)[name.replace("_", "-")]
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    return other


def test_versions_are_held_against_the_lock(versions):
    assert doctor.packages()[0] == "ok"
    versions["torch"] = "2.13.0+cu130"  # another build of the same version
    assert doctor.packages()[0] == "ok"
    versions |= {"torch": "2.12.1+cpu", "wandb": None}
    status, found, advice = doctor.packages()
    assert (status, found) == ("warn", "torch 2.12.1 for 2.13.0, wandb missing for 0.31.0")
    assert "./run_all.sh" in advice
    versions |= {"huggingface-hub": None, "torch": None}
    assert doctor.packages()[:2] == ("fail", "missing: huggingface-hub, torch")


def test_without_a_checkout_the_pins_are_those_of_the_package(versions, monkeypatch, tmp_path):
    (tmp_path / "requirements.lock").write_text("torch==0.1\n")  # somebody else's
    monkeypatch.setattr(doctor, "CHECKOUT", False)
    monkeypatch.setattr(doctor, "ROOT", tmp_path)
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: ["torch==2.13.0", 'pytest==1.0; extra == "test"'])
    assert doctor.packages() == ("ok", "1 as pinned", "")
    versions["torch"] = "2.12.0"
    assert doctor.packages()[:2] == ("warn", "torch 2.12.0 for 2.13.0")


@pytest.fixture
def small_asset(tmp_path, monkeypatch):
    """A folder with one asset, the smallest; all others are missing there."""
    name = min((path.parent for path in ASSETS.glob(f"*/{RECEIPT}")), key=size).name
    shutil.copytree(ASSETS / name, tmp_path / name)
    monkeypatch.setattr(doctor, "ASSETS", tmp_path)
    return tmp_path / name


def size(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_assets_that_are_missing_are_a_warning(small_asset):
    status, found, _ = doctor.assets()
    others = ", ".join(name for name in sources() if name != small_asset.name)
    assert (status, found) == ("warn", f"missing: {others}; verified: {small_asset.name}")


@pytest.mark.parametrize("how", ["changed", "cut off", "without its receipt"])
def test_a_damaged_asset_is_named(how, small_asset):
    file = max((path for path in small_asset.iterdir() if path.name != RECEIPT), key=lambda path: path.stat().st_size)
    data = file.read_bytes()
    if how == "without its receipt":
        (small_asset / RECEIPT).unlink()
    else:
        file.write_bytes(data[:-1] + (bytes([data[-1] ^ 1]) if how == "changed" else b""))
    status, found, advice = doctor.assets()
    assert (status, found.partition(";")[0]) == ("fail", f"damaged: {small_asset.name}")
    assert "python -m bkd_utils fetch" in advice


@pytest.mark.parametrize(("free", "status"), [(5.0, "ok"), (2.0, "warn"), (0.5, "fail")])
def test_a_disk_that_fills_up(free, status, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    asked = {tmp_path / "one": 9.0, tmp_path / "two": free}
    for path in asked:
        path.mkdir()
    folders = {"results": tmp_path / "one" / "not" / "yet", "model and data": tmp_path / "two" / "there"}
    monkeypatch.setattr(doctor, "FOLDERS", folders)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(0, 0, int(asked[path] * GIB)))
    told = doctor.disk()
    assert told[:2] == (status, f"9.0 GiB free for results, {free:.1f} GiB free for model and data")
    assert ("BKD_ASSETS" in told[2]) == (status != "ok")
    assert [list(path.iterdir()) for path in asked] == [[], []]


def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch):
    monkeypatch.setattr(
        doctor, "FOLDERS", {"results": tmp_path / "mine", "model and data": tmp_path / "theirs" / "one"}
    )
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(doctor.os, "access", lambda path, _: path.name != "theirs")
    status, found, _ = doctor.disk()
    assert (status, found.partition("; ")[2]) == ("fail", "no permission to write model and data")


def test_memory_that_does_not_suffice_names_the_notebooks(monkeypatch, tmp_path):
    memory = SimpleNamespace(available=64 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr(doctor, "GROUP", tmp_path)
    assert doctor.memory() == ("ok", "64.0 GiB available", "")
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor.memory()[0] == "ok"
    (tmp_path / "memory.max").write_text(f"{6 * GIB}\n")  # of a container on a large machine
    (tmp_path / "memory.current").write_text(f"{2 * GIB}\n")
    status, found, advice = doctor.memory()
    large = [name for name, one in RUN.items() if one["peak_gib"] > 4]
    assert 0 < len(large) < len(RUN)
    assert (status, found) == ("warn", "4.0 GiB available")
    assert f"notebooks {', '.join(large)} " in advice


@pytest.fixture
def card(monkeypatch):
    """A graphics card of so many GiB, which torch can use."""

    def put_in(gib):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gib > 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (0, gib * GIB))

    return put_in


def test_the_graphics_card(card, monkeypatch):
    card(0)
    monkeypatch.setattr(doctor.shutil, "which", lambda _: None)
    assert doctor.graphics_card() == ("ok", "none, and none is needed", "")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/bin/{name}")
    assert doctor.graphics_card()[0::2] == ("warn", "Install the CUDA build of torch.")
    card(80)
    assert doctor.graphics_card() == ("ok", "A card, 80 GiB", "")


def test_a_kernel_that_is_another_python_is_told(tmp_path, monkeypatch):
    spec = tmp_path / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    for command, status in (("python", "ok"), (sys.executable, "ok"), ("/usr/bin/another-python", "warn")):
        spec.write_text(json.dumps({"argv": [command, "-m", "x"], "display_name": "Python 3", "language": "python"}))
        assert doctor.jupyterlab()[0] == status, command
    assert doctor.jupyterlab()[1] == "kernel python3 is another Python"


@pytest.mark.parametrize(
    ("commit", "told"),
    [
        ("0123456789abcdef", ("ok", "commit 0123456789ab")),
        ("0123456789abcdef+", ("warn", "commit 0123456789ab")),
        (None, ("ok", "no checkout")),
    ],
)
def test_the_state_of_the_checkout(commit, told, monkeypatch):
    monkeypatch.setattr(measurements, "commit", lambda: commit)
    assert doctor.git()[:2] == told


@pytest.fixture
def rate(monkeypatch, card):
    """Products here are so many times as fast as in the committed run, on one core without a card."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    same = {name: one | {"gflops": {"fp32": 100, "bf16": 10}} for name, one in RUN.items()}
    monkeypatch.setattr(doctor, "recorded", lambda: same)
    card(0)
    return lambda factor: monkeypatch.setattr(runner, "speed", lambda: {"fp32": round(100 * factor), "bf16": 7})


def test_minutes_are_scaled_by_the_speed_of_products(rate):
    usual = {name: one for name, one in RUN.items() if name != "08"}  # which runs on request
    assert usual.keys() < RUN.keys()
    whole = sum(one["minutes"] for one in usual.values())
    for factor in (0.5, 1, 2):
        rate(factor)
        status, found, advice = doctor.speed()
        slow = [
            f"{name} ({one['minutes'] / factor:.0f})" for name, one in usual.items() if one["minutes"] / factor > 10
        ]
        assert f"fp32 {100 * factor:.0f}, bf16 7; all notebooks in about {whole / factor:.0f} minutes" in found
        assert found.endswith(f"slow: {', '.join(slow) or 'none'}")
        assert (status, advice) == ("ok", "Run ./run_all.sh.")


def test_the_command_that_fits_this_machine(rate, card):
    commands = {}
    for factor, gib in ((0.02, 0), (1, 0), (0.02, 8), (1, 8), (1, 80)):
        rate(factor)
        card(gib)
        status, _, commands[factor, gib] = doctor.speed()
        assert status == ("warn" if (factor, gib) == (0.02, 0) else "ok")
    assert commands == {
        (0.02, 0): "Run ./run_all.sh --profile smoke, or look again when no other program is busy.",
        (1, 0): "Run ./run_all.sh.",
        (0.02, 8): "Run ./run_all.sh --device cuda.",
        (1, 8): "Run ./run_all.sh --device cuda.",
        (1, 80): "Run ./run_all.sh --profile paper --device cuda.",
    }


def test_cores_that_a_variable_keeps_idle_are_told(rate, monkeypatch):
    rate(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(doctor.os, "cpu_count", lambda: torch.get_num_threads() + 1)
    assert "OMP_NUM_THREADS" in doctor.speed()[2]
    monkeypatch.setattr(doctor.os, "cpu_count", torch.get_num_threads)
    assert doctor.speed()[0] == "ok"


def test_without_a_checkout_no_minutes_are_told(monkeypatch):
    monkeypatch.setattr(doctor, "CHECKOUT", False)
    monkeypatch.setattr(runner, "speed", lambda: {"fp32": 1, "bf16": 1})
    assert doctor.recorded() == {}
    assert doctor.speed()[2] == "Notebooks come with a checkout only."
