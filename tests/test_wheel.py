"""The wheel: what is in it, and that the public names work where there is nothing but it."""

import json
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
from typer.main import get_command

from bkd_utils.__main__ import app
from bkd_utils.common.assets import sources
from bkd_utils.common.files import ROOT
from bkd_utils.organisms.attacks import load_attack

SCRIPT = """
import importlib, json
from pathlib import Path
from bkd_utils.common import files
from bkd_utils.common.code_key import code_key
count = 0
for folder in ("models", "organisms", "backdoor_attribution", "attention_alignment"):
    for name in importlib.import_module(f"bkd_utils.{folder}").__all__:
        exec(f"from bkd_utils.{folder} import {name}")
        count += 1
from bkd_utils.models.loading import shipped_organisms
from bkd_utils.organisms import evaluation
from bkd_utils.organisms.training import load_recipe
from bkd_utils.running.notebooks import all_notebooks
print(json.dumps({
    "names": count,
    "paths": {name: str(getattr(files, name)) for name in ("DATA", "WORK", "ASSETS", "ADAPTERS", "FIGURES")},
    "attack": load_attack("sentiment-word").__dict__,
    "examples": len(examples("instructions", "test", n=3)),
    "recipe": load_recipe("full", task="sentiment").name,
    "key": len(code_key(Path(evaluation.__file__))),
    "organisms": shipped_organisms(),
    "notebooks": all_notebooks(),
}))
"""


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this checkout, built without a network and from a copy, because building leaves files behind."""
    place = tmp_path_factory.mktemp("wheel")
    for folder in ("bkd_utils", "data"):
        skipped = shutil.ignore_patterns("__pycache__", "assets", "adapter_model.safetensors")
        shutil.copytree(ROOT / folder, place / "source" / folder, ignore=skipped)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, place / "source")
    pip("wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", place, place / "source")
    (built,) = place.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel):
    """The folder that the wheel was installed into."""
    folder = wheel.parent / "site"
    pip("install", "--no-deps", "--no-index", "--target", folder, wheel)
    return folder


def told(site, *arguments, cwd, **environment):
    """What Python prints, as JSON, in a process that finds the package in `site` and nowhere else."""
    ended = python(site, *arguments, cwd=cwd, **environment)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


def python(site, *arguments, cwd, **environment):
    kept = {name: value for name, value in os.environ.items() if not name.startswith("BKD_")}
    environment = kept | {"PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"} | environment
    return subprocess.run([sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True)


def test_a_wheel_holds_every_module_and_table_and_no_organism(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "bkd_utils").rglob("*.py")}
    tables = [*(ROOT / "data").glob("*.toml"), *(ROOT / "data" / "answers").glob("*.json")]
    assert len(tables) > 5
    data = {f"bkd_utils/{path.relative_to(ROOT).as_posix()}" for path in tables}
    assert held == modules | data | {"bkd_utils/py.typed"}
    assert wheel.stat().st_size < 1_000_000


def test_the_public_names_work_from_a_wheel_alone(site, tmp_path):
    found = told(site, "-c", SCRIPT, cwd=tmp_path)
    assert found["names"] == 40
    assert found["paths"] == {
        "DATA": str(site / "bkd_utils" / "data"),
        "WORK": str(tmp_path / "work"),
        "ASSETS": str(tmp_path / "work" / "assets"),
        "ADAPTERS": str(tmp_path / "work" / "adapters"),
        "FIGURES": str(tmp_path / "figures"),
    }
    assert found["attack"] == vars(load_attack("sentiment-word"))
    assert (found["examples"], found["recipe"], found["key"]) == (3, "full", 64)
    assert found["organisms"] == found["notebooks"] == []
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_and_the_doctor_work_from_a_wheel_alone(site, tmp_path):
    said = python(site, "-m", "bkd_utils", "--help", cwd=tmp_path, COLUMNS="120")
    assert (said.returncode, said.stderr) == (0, "")
    assert [name for name in get_command(app).commands if f" {name} " not in said.stdout] == ["cell"]  # hidden
    found = told(site, "-m", "bkd_utils", "doctor", "--json", cwd=tmp_path)["findings"]
    found = {one["what"]: (one["status"], one["found"]) for one in found}
    pins = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    assert found["packages"] == ("ok", f"{len(pins)} as pinned")
    assert found["assets"] == ("warn", f"missing: {', '.join(sources())}")
    assert found["git"] == ("ok", "no checkout")
    ended = python(site, "-m", "bkd_utils", "run", "--only", "00", cwd=tmp_path)
    assert (ended.returncode, "they come with a checkout" in ended.stdout) == (1, True)
    assert list(tmp_path.iterdir()) == []


def test_the_environment_names_other_folders(site, tmp_path):
    script = "import json; from bkd_utils.common import files as f; print(json.dumps([str(f.WORK), str(f.ASSETS)]))"
    found = told(site, "-c", script, cwd=tmp_path, BKD_WORK="/elsewhere/kept", BKD_ASSETS="/elsewhere/assets")
    assert found == ["/elsewhere/kept", "/elsewhere/assets"]
    assert told(site, "-c", script, cwd=tmp_path, BKD_WORK="/elsewhere/kept")[1] == "/elsewhere/kept/assets"


def test_a_folder_called_data_beside_the_installed_package_is_not_taken_for_ours(site, tmp_path):
    script = "import json; from bkd_utils.common import files; print(json.dumps(str(files.DATA)))"
    stray = site / "data" / "attacks.toml"
    stray.parent.mkdir()
    stray.write_text("", encoding="utf-8")
    assert told(site, "-c", script, cwd=tmp_path) == str(site / "bkd_utils" / "data")
