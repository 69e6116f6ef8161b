"""Files that other programs read: GitHub, VS Code, Binder, pre-commit. None of these runs here, so each file is held to
what its program asks of it, and to the rest of the project."""

import re
import shlex
import subprocess
import tomllib

import nbformat
import pytest
import yaml
from test_project import ORGANISMS, PAPERS, ROOT, tracked
from typer.main import get_command

from bkd_utils.__main__ import app
from bkd_utils.common.files import read_json

FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
HOOKS = {
    hook["id"]: hook
    for repository in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    for hook in repository["hooks"]
}
LOCK = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)


def allowed(python):
    """Is a version of Python, as in 3.11-bookworm, one that the project allows?"""
    bounds = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    low, high = (int(minor) for minor in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", bounds).groups())
    return low <= int(re.match(r"3\.(\d+)", python)[1]) < high


def commands(text):
    """The commands of ours that a text calls, each with its options."""
    called = re.findall(r"-m bkd_utils ([a-z]+)([^`\n&]*)", text)
    return {name: re.findall(r"--[a-z-]+", options) for name, options in called}


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_hook_has_a_pinned_environment_of_its_own_and_that_of_ruff_is_ours(hook):
    assert (hook["language"], hook["name"][:1].isalpha()) == ("python", True)
    (pin,) = hook["additional_dependencies"]
    name, version = pin.split("==")
    assert LOCK.get(name, version) == version
    assert shlex.split(hook["entry"])
    re.compile(hook.get("exclude", ""))


def test_outputs_and_counts_of_notebooks_stay_and_metadata_of_a_machine_go():
    words = shlex.split(HOOKS["notebook-metadata"]["entry"])
    assert {"nbstripout", "--keep-output", "--keep-count", "--keep-id"} <= set(words)
    assert "cell.metadata.papermill" in words[words.index("--extra-keys") + 1].split()
    for path in PAPERS:
        notebook = nbformat.read(path, as_version=4)
        assert notebook.metadata.keys() == {"kernelspec", "language_info"}, path
        assert notebook.metadata.language_info == {"name": "python"}, path
        assert {key for cell in notebook.cells for key in cell.metadata} <= {"tags"}, path
        assert any(cell.get("outputs") for cell in notebook.cells), path


def test_no_file_but_an_organism_is_larger_than_the_hook_allows():
    hook = HOOKS["large-files"]
    limit = 1024 * int(re.search(r"--maxkb=(\d+)", hook["entry"])[1])
    large = [path.relative_to(ROOT).as_posix() for path in tracked() if path.stat().st_size > limit]
    assert [name for name in large if not re.match(hook["exclude"], name)] == []
    assert {name.split("/")[2] for name in large} <= {folder.name for folder in ORGANISMS}


def test_the_hooks_look_for_keys_and_secrets_in_every_text():
    assert all(HOOKS[name]["types"] == ["text"] for name in ("private-keys", "secrets"))
    assert "exclude" not in HOOKS["private-keys"]


@pytest.mark.parametrize("path", [path for path in FORMS if path.stem != "config"], ids=lambda path: path.stem)
def test_a_form_for_issues_is_one(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert form.keys() == {"name", "description", "labels", "body"}
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in fields} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert all(field["attributes"]["options"] for field in fields if field["type"] == "dropdown")
    assert any(field.get("validations", {}).get("required") for field in fields)
    (doctor,) = [field for field in fields if field["id"] == "doctor"]
    assert "`python -m bkd_utils doctor --json`" in doctor["attributes"]["description"]
    assert doctor.get("validations", {}).get("required", False) == (path.stem == "bug")
    known = get_command(app).commands
    for name, options in commands(path.read_text(encoding="utf-8")).items():
        assert set(options) <= {option for parameter in known[name].params for option in parameter.opts}


def test_github_runs_what_a_person_runs():
    flow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    assert set(flow[True]) == {"push", "pull_request"}  # `on`, which is a truth value of YAML 1.1
    assert flow["permissions"] == {"contents": "read"}
    (job,) = flow["jobs"].values()
    assert job["runs-on"].startswith("ubuntu-")
    (run,) = [step["run"] for step in job["steps"] if "run" in step]
    assert (ROOT / run).stat().st_mode & 0o100
    given = {step["uses"].split("@")[0]: step["with"] for step in job["steps"] if "uses" in step}
    assert allowed(given["actions/setup-python"]["python-version"])
    assert given["actions/checkout"]["fetch-depth"] == 0  # the mutations ask what has changed since a commit
    assert f"/{given['actions/cache']['path']}/" in (ROOT / ".gitignore").read_text().splitlines()


def test_the_dev_container_installs_from_the_lock():
    container = read_json(ROOT / ".devcontainer/devcontainer.json")
    name, _, version = container["image"].partition(":")
    assert name == "python"
    assert allowed(version)
    made = container["postCreateCommand"]
    assert made.startswith("./run_all.sh --list && ")  # which installs what the lock says and runs nothing
    assert commands(made) == {"fetch": [], "doctor": []}
    interpreter = container["customizations"]["vscode"]["settings"]["python.defaultInterpreterPath"]
    assert interpreter == "${containerWorkspaceFolder}/.venv/bin/python"
    assert container["hostRequirements"].keys() == {"cpus", "memory", "storage"}


def test_binder_installs_from_the_lock():
    (python, pip) = yaml.safe_load((ROOT / ".binder/environment.yml").read_text())["dependencies"]
    assert (python.startswith("python="), pip) == (True, "pip")
    assert allowed(python.removeprefix("python="))
    script = ROOT / ".binder/postBuild"
    assert script.stat().st_mode & 0o100
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    lines = [line.split() for line in script.read_text().splitlines() if line.startswith("python -m pip install")]
    assert [line[-2:] for line in lines] == [["-r", "requirements.lock"], ["-e", "."]]
    assert "--no-deps" in lines[1]
    assert commands(script.read_text()) == {"fetch": []}


def test_the_page_about_other_machines_says_of_each_what_was_not_tested():
    text = (ROOT / "notebooks/pages/elsewhere.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")
    ]
    assert rows[0] == ["where", "file", "what it does", "not tested"]
    assert len(rows) == 6
    assert all(len(row) == 4 and row[3] for row in rows)
    assert "-r requirements.lock" in text


def test_the_changelog_has_the_form_that_it_says():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *days = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert first == "Unreleased"
    assert days == sorted(days, reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", day) for day in days)
    kinds = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
