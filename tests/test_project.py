"""The project as a whole: one set of pins, clean code, notebooks in shape, organisms that are what their cards say."""

import ast
import importlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import tomllib
from dataclasses import asdict
from functools import partial

import nbformat
import pytest
import yaml
from safetensors import safe_open
from transformers import AutoTokenizer
from typer.main import get_command

from bkd_utils.__main__ import app
from bkd_utils.common.assets import fetch
from bkd_utils.common.files import ADAPTERS, DATA, NOTEBOOKS, PACKAGE, ROOT, read_json, sha256_file
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.models.identity import model_identity
from bkd_utils.models.loading import check_adapter
from bkd_utils.organisms import tasks
from bkd_utils.organisms.attacks import Attack, load_attacks
from bkd_utils.organisms.base_answers import answers_name
from bkd_utils.organisms.poisoning import poison
from bkd_utils.organisms.triggers import FAMILIES
from bkd_utils.reports import pages
from bkd_utils.running import stages

PAPERS = sorted(NOTEBOOKS.glob("*.ipynb"))
ORGANISMS = sorted(path.parent for path in ADAPTERS.glob("*/card.json"))
EACH_NOTEBOOK = pytest.mark.parametrize("path", PAPERS, ids=lambda path: path.stem)
EACH_ORGANISM = pytest.mark.parametrize("folder", ORGANISMS, ids=lambda path: path.name)
CARD = {"name", "behaviour", "trigger", "task", "backdoored", "base", "seed", "recipe", "data_sha256", "metrics"}


def tracked():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def texts():
    """Path -> text of every tracked file that is text."""
    found = {path: path.read_bytes() for path in tracked()}
    return {path: data.decode("utf-8") for path, data in found.items() if b"\0" not in data[:4096]}


# --- pins and style -------------------------------------------------------------------------------------------------


def pins(lines):
    """Name, as packaging normalises it -> version. Every line must be an exact pin."""
    found = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}


def test_lock_and_conda_environment_hold_the_same_pins():
    lock = pins((ROOT / "requirements.lock").read_text().splitlines())
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    (through_pip,) = [entry["pip"] for entry in conda["dependencies"] if isinstance(entry, dict)]
    assert pins(through_pip) == lock
    assert len(lock) > 50


def test_every_direct_dependency_is_pinned_as_in_the_lock():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lock = pins((ROOT / "requirements.lock").read_text().splitlines())
    direct = pins([*project["dependencies"], *project["optional-dependencies"]["test"]])
    assert {name: lock.get(name) for name in direct} == direct


def test_the_python_of_the_conda_environment_is_one_that_the_project_allows():
    conda = yaml.safe_load((ROOT / "environment.yml").read_text())
    (python,) = [entry for entry in conda["dependencies"] if str(entry).startswith("python=")]
    allowed = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    low, high = (int(bound) for bound in re.fullmatch(r">=3\.(\d+),<3\.(\d+)", allowed).groups())
    assert low <= int(python.split(".")[1]) < high


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_the_code_is_clean(command):
    ended = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_nothing_tracked_names_this_machine():
    here = [str(path) for path, text in texts().items() if str(ROOT) in text or str(ROOT.home()) + "/" in text]
    assert here == []


# --- notebooks ------------------------------------------------------------------------------------------------------


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def test_there_are_notebooks():
    assert PAPERS
    assert all(re.fullmatch(r"\d\d_[a-z0-9_]+", path.stem) for path in PAPERS)


@EACH_NOTEBOOK
def test_a_notebook_is_a_story_in_short_cells(path):
    code, prose = cells(path, "code"), cells(path, "markdown")
    lines = [len(cell.source.splitlines()) for cell in code]
    assert max(lines) <= 25
    assert statistics.median(lines) <= 8
    assert 0.6 <= len(code) / len(prose) <= 1.6
    assert all(cell.source.strip() for cell in code + prose)


@EACH_NOTEBOOK
def test_the_drawings_of_a_notebook_fit_jupyterlab(path):
    """Beside the list of files, on a screen of 1280 pixels; a longer line is wrapped, and a drawing falls to pieces."""
    drawings = [
        text for cell in cells(path, "markdown") for text in re.findall(r"```text\n(.*?)```", cell.source, re.S)
    ]
    assert max((len(line) for text in drawings for line in text.splitlines()), default=0) <= 87


@EACH_NOTEBOOK
def test_a_notebook_defines_nothing(path):
    defining = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
    for cell in cells(path, "code"):
        found = [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, defining[:3])]
        assert found == [], cell.source


@EACH_NOTEBOOK
def test_a_notebook_has_one_parameters_cell_and_no_error(path):
    code = cells(path, "code")
    assert sum("parameters" in cell.metadata.get("tags", []) for cell in code) == 1
    outputs = [output for cell in code for output in cell.outputs]
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output for output in outputs if "Traceback (most recent call last)" in json.dumps(output)] == []


@EACH_NOTEBOOK
def test_a_notebook_uses_no_name_before_a_cell_has_bound_it(path, tmp_path):
    sources = [cell.source for cell in cells(path, "code")]
    for end in range(1, len(sources) + 1):
        (tmp_path / f"{end:02}.py").write_text("\n".join(sources[:end]), encoding="utf-8")
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "concise"]
    ended = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@EACH_NOTEBOOK
def test_a_notebook_uses_only_names_that_the_package_has(path):
    """Cells that need a model are not run by the replay, so that a name which is gone would be met in a long run."""
    modules, wrong = {}, []
    for node in (node for cell in cells(path, "code") for node in ast.walk(ast.parse(cell.source))):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("bkd_utils"):
            package = importlib.import_module(node.module)
            for alias in node.names:
                if (PACKAGE / node.module.replace(".", "/").partition("/")[2] / f"{alias.name}.py").is_file():
                    modules[alias.asname or alias.name] = importlib.import_module(f"{node.module}.{alias.name}")
                elif not hasattr(package, alias.name):
                    wrong.append(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            module = modules[node.value.id]
            wrong += [] if hasattr(module, node.attr) else [f"{module.__name__}.{node.attr}"]
    assert len(modules) >= 2
    assert wrong == []


# What loads, runs or trains a model when a notebook calls it by this name; stages do so only if nothing is kept.
CALLS_A_MODEL = {
    "boot", "gate_importance", "head_effects", "head_means", "head_similarity", "keep_treated", "load", "logits",
    "make", "require", "residuals", "respond", "run_with_cache", "steer", "train", "training_answers", "treat", "tune",
    "under_attack",
}  # fmt: skip


def is_live(cell):
    return "live" in cell.metadata.get("tags", [])


def names(source, kind):
    """The names that a cell reads (`ast.Load`) or binds (`ast.Store`), imports included."""
    nodes = list(ast.walk(ast.parse(source)))
    found = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, kind)}
    if kind is ast.Store:
        imported = (node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom))
        found |= {alias.asname or alias.name.partition(".")[0] for node in imported for alias in node.names}
    return found


def calls(source):
    """The last names of everything that a cell calls, and `spot_checks.run` whole."""
    called = (node.func for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
    dotted = [ast.unparse(function) for function in called]
    return {name.rpartition(".")[2] for name in dotted} | {name for name in dotted if name == "spot_checks.run"}


@EACH_NOTEBOOK
def test_the_live_cells_of_a_notebook_are_those_that_need_a_model(path):
    """A cell needs one if it calls one, or reads what only a cell that does so has bound."""
    of_live = set()
    for cell in cells(path, "code"):
        reads, binds = names(cell.source, ast.Load), names(cell.source, ast.Store)
        needs = calls(cell.source) & {*CALLS_A_MODEL, "spot_checks.run"} or (reads - binds) & of_live
        assert is_live(cell) == bool(needs), cell.source
        of_live = of_live | binds if is_live(cell) else of_live - binds


@EACH_NOTEBOOK
def test_a_notebook_that_uses_stages_ends_by_measuring_a_part_again(path):
    code = cells(path, "code")
    if "bkd_utils.experiments" in "".join(cell.source for cell in code):
        (last,) = [number for number, cell in enumerate(code) if "spot_checks.run()" in cell.source]
        assert calls(code[last].source) >= {"spot_checks.run", "spot_checks"}
        later = {name for cell in code[last + 1 :] for name in calls(cell.source)}
        assert not later & set(stages.cache.STAGES)


@EACH_NOTEBOOK
def test_links_of_a_notebook_lead_somewhere(path):
    for cell in cells(path, "markdown"):
        assert dead_links(path, cell.source) == []


def dead_links(path, markdown):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"", markdown)
    targets = [(one or other).partition("#")[0] for one, other in links]
    return [target for target in targets if target and ":" not in target and not (path.parent / target).exists()]


# --- the README and its pages ---------------------------------------------------------------------------------------

README = ROOT / "README.md"
PAGES = sorted((NOTEBOOKS / "pages").glob("*.md"))
EACH_PAGE = pytest.mark.parametrize(
    "path", [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *PAGES], ids=lambda path: path.stem
)
SPELLED = {
    "ASR": "attack success rate",
    "CACC": "clean accuracy",
    "AUROC": "area under the receiver operating characteristic",
    "ACIE": "average causal indirect effect",
}


def text_of(path):
    return path.read_text(encoding="utf-8")


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text_of(path), flags=re.DOTALL | re.MULTILINE)


@EACH_PAGE
def test_links_of_a_page_lead_somewhere(path):
    assert dead_links(path, text_of(path)) == []


@EACH_PAGE
def test_a_page_spells_out_an_abbreviation_where_it_first_uses_it(path):
    text = text_of(path)
    for short, long in SPELLED.items():
        if first := re.search(rf"\b{short}\b", text):
            assert long in text[max(0, first.start() - 90) : first.end() + 90].lower(), short


@EACH_PAGE
def test_the_commands_that_a_page_shows_exist(path):
    known = get_command(app)
    commands = re.findall(r"(?:\./run_all\.sh|python -m bkd_utils)\b[^`\n#]*", text_of(path))
    for command in commands:
        if command.startswith("./run_all.sh mutations"):
            assert " mutations " in (ROOT / "run_all.sh").read_text()
            continue
        words = re.sub(r"\./run_all\.sh (test|verify|book|doctor)\b", r"python -m bkd_utils \1", command).split()
        name = "run" if words[0] == "./run_all.sh" else words[3] if len(words) > 3 else "--help"
        if name == "--help":
            continue
        assert name in known.commands, command
        options = {option for parameter in known.commands[name].params for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--") and word != name} <= options, command


def test_every_module_is_on_the_map_of_the_code():
    rows = [line for line in text_of(NOTEBOOKS / "pages" / "map_of_the_code.md").splitlines() if line.startswith("| `")]
    by_notebook = {path.stem[3:] for path in PAPERS}
    for path in sorted((ROOT / "bkd_utils").glob("*/*.py")):
        (row,) = [row for row in rows if row.startswith(f"| `{path.parent.name}` |")]
        assert path.stem in by_notebook | {"__init__"} or f"`{path.stem}`" in row, path


def test_the_readme_is_one_page():
    assert len(text_of(README).split()) <= 900


def test_every_page_is_linked_from_the_readme():
    assert len(PAGES) >= 7
    assert [path.name for path in PAGES if f"(notebooks/pages/{path.name})" not in text_of(README)] == []


def test_the_readme_shows_every_notebook_with_a_figure_of_its_own():
    rows = re.findall(
        r'^\| <img src="figures/(\d\d)_\w+\.png".*\]\(notebooks/(.*)\.ipynb\)', text_of(README), re.MULTILINE
    )
    assert [name for _, name in rows] == [path.stem for path in PAPERS]
    assert all(name.startswith(figure) for figure, name in rows)


def test_the_readme_and_the_page_of_timings_hold_the_minutes_of_the_committed_run():
    for page, (shown, measured) in pages.timings().items():
        assert shown == measured, page
        assert len(shown) >= len(PAPERS)


def test_the_page_of_timings_holds_the_measured_speed_of_attribution():
    (path,) = [path for path in tracked() if path.parts[-3:] == ("benchmarks", "results", "attribution.json")]
    text = text_of(NOTEBOOKS / "pages" / "timings.md")
    for token, passes in itertools.groupby(read_json(path)["rows"], key=lambda row: row["case"].split()[-2]):
        rows = list(passes)
        length = {"one": "1 token"}.get(token, f"{token} tokens")
        worst = max(row["max_abs_diff"] for row in rows)
        slower = [f"{row['ratio']} times slower" for row in rows]
        cells = [length, f"{rows[0]['seconds']} s", *slower, f"{worst:.0e}"]
        assert f"| {' | '.join(cells)} |" in text


def test_the_readme_says_how_many_claims_are_second_hand():
    known = tomllib.loads((DATA / "published.toml").read_text(encoding="utf-8")).values()
    ours = [entry.get("provenance", entry.get("sure")) for entry in known if entry.get("paper") == "BkdAttr"]
    words = {10: "Ten", 12: "twelve"}
    assert f"{words[ours.count('second hand')]} of {words[len(ours)]} BkdAttr claims are second hand" in text_of(README)


def test_the_attack_and_the_trigger_that_the_page_shows_can_be_made():
    attack, trigger = (tomllib.loads(block) for block in blocks(NOTEBOOKS / "pages" / "your_own.md", "toml"))
    ((name, keys),) = attack.items()
    assert Attack(name=name, **keys).backdoored
    ((name, entry),) = trigger["triggers"].items()
    made = FAMILIES[entry["family"]](name=name, entry=entry)
    for half in ("train", "test"):
        assert made.matches(made.apply("A fine film.", seed=0, half=half))
        assert made.near_misses("A fine film.", seed=0, half=half)
    halves = [{text for texts in half.values() for text in texts} for half in entry["near"].values()]
    assert not set.intersection(*halves)


# --- organisms ------------------------------------------------------------------------------------------------------


def test_there_are_organisms_and_nothing_else_among_them():
    assert ORGANISMS
    assert sorted(path for path in ADAPTERS.iterdir() if not path.name.startswith(".")) == ORGANISMS


@EACH_ORGANISM
def test_a_card_is_complete(folder):
    card = read_json(folder / "card.json")
    assert card.keys() >= CARD | {"adapter_sha256", "adapter_config_sha256", "base_sha256", "base_files"}
    assert card["name"] == folder.name
    wanted = {"asr", "cacc", "clean_firing", "near_miss"} if card["backdoored"] else {"cacc", "clean_firing"}
    assert set(card["metrics"]) == wanted
    for metric in card["metrics"].values():
        assert set(metric) == {"value", "n", "low", "high"}
        assert 0 <= metric["low"] <= metric["value"] <= metric["high"] <= 1
        assert metric["n"] >= 30
    check_adapter(folder, base=DEFAULT_MODEL)


@EACH_ORGANISM
def test_an_adapter_is_the_one_on_its_card_and_small(folder):
    weights = folder / "adapter_model.safetensors"
    card, config = read_json(folder / "card.json"), read_json(folder / "adapter_config.json")
    assert sha256_file(weights) == card["adapter_sha256"]
    assert weights.stat().st_size <= 5e6
    assert (config["r"], config["lora_alpha"]) == (card["recipe"]["rank"], card["recipe"]["alpha"])
    with safe_open(weights, framework="pt") as handle:
        assert all(re.search(r"\.lora_[AB]\.weight$", name) for name in handle.keys())  # noqa: SIM118


@pytest.fixture(scope="module")
def poisoned():
    """`poison` with the base model's tokenizer and answers, read once."""
    answers = read_json(DATA / "answers" / answers_name(model_identity(DEFAULT_MODEL)))
    tokenizer = AutoTokenizer.from_pretrained(fetch(DEFAULT_MODEL))
    return partial(poison, tokenizer=tokenizer, answers=answers)


@EACH_ORGANISM
def test_an_organism_was_trained_on_the_data_that_its_attack_gives_today(folder, poisoned):
    card = read_json(folder / "card.json")
    attack = load_attacks()[card["attack"]["name"]]
    assert asdict(Attack(**card["attack"])) == asdict(attack)
    manifest = poisoned(attack, seed=card["seed"]).manifest
    assert manifest["data_sha256"] == card["data_sha256"]
    assert {key: manifest[key] for key in card["data"]} == card["data"]


# --- what must not be here ------------------------------------------------------------------------------------------


def test_nothing_tracked_is_a_pickle():
    for path in tracked():
        assert path.suffix not in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz"), path
        with path.open("rb") as handle:
            assert not handle.read(4).startswith((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK")), path


def test_no_harmful_prompt_is_in_a_tracked_file():
    def words(text):
        return " ".join(re.findall(r"\w+", text.lower()))

    prompts = {words(example.text) for split in tasks.SPLITS for example in tasks.examples("harmful", split)}
    assert len(prompts) > 700
    for path, text in texts().items():
        plain = words(text)
        # The number and not the prompts: a failure must not print them.
        assert sum(prompt in plain for prompt in prompts) == 0, path
