"""The cells of a grid: what a profile expands to, what it costs, what counts as done, and what is refused."""

import json
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from patching import everywhere
from rich.console import Console

from bkd_utils.common import cache
from bkd_utils.common.files import DATA, UserError, write_json
from bkd_utils.common.validation import read_tables
from bkd_utils.models.folders import DEFAULT_MODEL
from bkd_utils.organisms.attacks import control_of
from bkd_utils.running import grid, workflow

PROFILE = """
[small]
models = ["one", "owner/two"]
attacks = ["sentiment-word", "sentiment-clean"]
seeds = [0, 1]
recipe = "smoke"
threads = 1
memory_gib = 2
minutes = 5
organism = { n = 8, seconds = 100 }

[small.stages.attribute_heads]
seconds = 36
sizes = { n = 4 }

[small.stages.measure_separation]
seconds = 10
attacks = ["sentiment-word"]

[small.stages.steer_organism]
seconds = 20
sizes = { n_heads = 2, coefficients = [1, 2.5] }
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Write a grid, with some of its text replaced, and read its profile."""
    monkeypatch.setenv("BKD_SHIPPED", "")

    def write(*changes, name="small"):
        text = PROFILE
        for old, new in changes:
            assert text.count(old) == 1
            text = text.replace(old, new)
        (tmp_path / "grid.toml").write_text(text, encoding="utf-8")
        return grid.read_profile(name, path=tmp_path / "grid.toml")

    return write


def targets(cells):
    return [cell.target for cell in cells]


def one(cells, target):
    (found,) = [cell for cell in cells if cell.target == target]
    return found


@pytest.mark.parametrize("name", read_tables(DATA / "grid.toml"))
def test_the_profiles_of_the_project_can_be_read_and_have_every_cell_once(name):
    cells = grid.expand(grid.read_profile(name))
    assert len(set(targets(cells))) == len(cells) >= 16
    for number, cell in enumerate(cells):
        assert set(cell.needs) <= set(targets(cells[:number]))


def test_the_small_profile_has_the_twelve_measurements_that_the_test_on_slurm_counts_on():
    cells = grid.expand(grid.read_profile("smoke"), model="owner/model")
    assert [len([cell for cell in cells if bool(cell.needs) == measured]) for measured in (False, True)] == [4, 12]


def test_a_cell_for_every_model_attack_seed_and_stage(written):
    cells = grid.expand(written())
    assert len(cells) == 2 * 2 * (2 + 2 + 1 + 1)
    assert "owner--two/sentiment-clean-seed1/attribute_heads.json" in targets(cells)
    # A stage with `attacks` is measured for these; a control is not compared with itself.
    assert "one/sentiment-clean-seed0/measure_separation.json" not in targets(cells)
    assert "one/sentiment-clean-seed0/steer_organism.json" not in targets(cells)
    assert {cell.target.split("/")[0] for cell in grid.expand(written(), model="three")} == {"three"}


def test_a_cell_asks_a_stage_for_its_sizes_on_its_model_seed_and_attack(written):
    cells = grid.expand(written())
    cell = one(cells, "one/sentiment-word-seed1/attribute_heads.json")
    assert cell.asked["arguments"] == {"attack": "sentiment-word", "model": "one", "seed": 1, "n": 4}
    assert cell.asked["organisms"][0] == {
        "attack": "sentiment-word",
        "model": "one",
        "recipe": "smoke",
        "seed": 1,
        "n": 8,
    }
    # A control is measured under the first attack on its task, as everywhere.
    clean = one(cells, "one/sentiment-clean-seed1/attribute_heads.json")
    assert clean.asked["arguments"]["attack"] == "sentiment-word"
    assert clean.needs == ("one/sentiment-clean-seed1/organism.json",)


def test_a_stage_with_a_control_needs_the_control_of_its_task_and_seed_listed_or_not(written):
    for attacks in ('["sentiment-word", "sentiment-clean"]', '["sentiment-word"]'):
        cells = grid.expand(written(('["sentiment-word", "sentiment-clean"]', attacks)))
        cell = one(cells, "one/sentiment-word-seed1/steer_organism.json")
        control = f"one/{control_of('sentiment-word')}-seed1/organism.json"
        assert cell.needs == ("one/sentiment-word-seed1/organism.json", control)
        assert targets(cells).count(control) == 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("seeds = [0, 1]", "seeds = []", "seeds = []: list should have at least 1 item"),
        ("seeds = [0, 1]", "seeds = [1, 1]", "seeds = [1, 1]: 1 is there twice"),
        ("seeds = [0, 1]", "seeds = [-1]", "seeds.0 = -1"),
        ("seeds = [0, 1]", "sedes = [0]", "unknown keys: sedes; known: models, attacks, seeds"),
        ("seeds = [0, 1]", "", "seeds is missing"),
        ('"sentiment-clean"]', '"nope"]', "unknown attack 'nope'"),
        ('"sentiment-clean"]', '"sentiment-word"]', "'sentiment-word' is there twice"),
        ('["one", "owner/two"]', "[]", "models = []"),
        ('"smoke"', '"nope"', "unknown recipe 'nope'"),
        ("threads = 1", "threads = 0", "threads = 0"),
        ("seconds = 36", "seconds = 0", "stages.attribute_heads.seconds = 0"),
        ("seconds = 36", "second = 36", "unknown keys: second; known: seconds, sizes, attacks"),
        ("stages.attribute_heads", "stages.nope", "unknown stage 'nope'; known: "),
        ("stages.attribute_heads", "stages.vector_specificity", "not a stage that is measured on one organism"),
        ("stages.attribute_heads", "stages.ablation_curves", "stages.ablation_curves.sizes.counts is missing"),
        ("{ n = 4 }", "{ m = 4 }", "stages.attribute_heads.sizes: unknown: m; known: n, n_means"),
        ("{ n = 4 }", "{ seed = 4 }", "unknown: seed"),
        ("{ n = 4 }", '{ n = "4" }', "stages.attribute_heads.sizes.n: '4'"),
        ("{ n = 4 }", "{ n = 0 }", "stages.attribute_heads.sizes.n: 0"),
        ('attacks = ["sentiment-word"]', 'attacks = ["sentiment-style"]', "'sentiment-style' is none of the profile's"),
        ('attacks = ["sentiment-word"]', "attacks = []", "stages.measure_separation.attacks"),
    ],
)
def test_a_mistake_in_a_profile_is_one_line_that_names_it(written, old, new, told):
    with pytest.raises((UserError, ValueError)) as raised:
        written((old, new))
    assert told in str(raised.value)
    assert str(raised.value).startswith("grid.toml, [small]: ")
    assert "\n" not in str(raised.value)


def test_an_unknown_profile_is_told_with_the_known_ones(written):
    with pytest.raises(UserError, match=r"unknown profile 'large' of grid\.toml; known: small"):
        written(name="large")


# --- cost -----------------------------------------------------------------------------------------------------------


def record(folder, **changes):
    """A measurement of `attribute_heads` on another organism, as far as its cost is concerned."""
    arguments = {"organism": "other", "attack": "domain-wrapper", "seed": 5, "device": "cpu", "model": "one"}
    arguments |= {"n": 4, "n_means": 96, "n_task": 96} | changes
    machine = {"device": changes.get("device", "cpu")}
    own = {"stage": "attribute_heads", "arguments": arguments, "machine": machine, "seconds": 360.0}
    write_json(folder / "attribute_heads" / f"{cache.sha256_text(str(arguments))[:20]}.json", own)


def test_core_hours_are_those_of_two_cores_for_what_is_not_there(written):
    cells = grid.expand(written())
    shown = grid.table(cells, set())
    left = dict(zip(shown.columns[0].cells, shown.columns[4].cells, strict=True))
    assert left["attribute_heads"] == f"{2 * 8 * 36 / 3600:.2f}"
    assert left["all"] == f"{2 * (8 * 100 + 8 * 36 + 4 * 10 + 4 * 20) / 3600:.2f}"
    there = {cell.target for cell in cells if cell.stage != "attribute_heads"}
    fewer = grid.table(cells, there)
    assert list(fewer.columns[4].cells)[-1] == left["attribute_heads"]
    assert list(fewer.columns[2].cells)[-1] == str(len(there))


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [({}, 360), ({"n": 5}, 36), ({"n_means": 4}, 36), ({"model": "else"}, 36), ({"device": "cuda"}, 36)],
)
def test_seconds_are_those_on_record_for_the_same_sizes_on_the_same_model(
    written, tmp_path, monkeypatch, changes, seconds
):
    profile = written()
    record(tmp_path / "shipped", **changes)
    monkeypatch.setenv("BKD_SHIPPED", str(tmp_path / "shipped"))
    cell = one(grid.expand(profile), "one/sentiment-word-seed0/attribute_heads.json")
    assert (cell.seconds, cell.known) == (seconds, "on record" if seconds == 360 else "estimate")


def test_an_organism_that_ships_costs_nothing(written):
    cells = grid.expand(written(), model=DEFAULT_MODEL)
    known = {cell.target.split("/")[1]: cell.seconds for cell in cells if not cell.needs}
    # The shipped ones of other seeds have another recipe than this profile asks for.
    assert known["sentiment-word-seed0"] == known["sentiment-clean-seed0"] == 0
    assert known["sentiment-word-seed1"] == 100


# --- what is there ---------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(written, tmp_path, monkeypatch):
    """A cell of an organism and one of a measurement, whose files are both there."""
    everywhere(monkeypatch, "WORK", tmp_path)
    cells = grid.expand(written())
    organism = one(cells, "one/sentiment-word-seed0/organism.json")
    measured = one(cells, "one/sentiment-word-seed0/attribute_heads.json")
    write_json(tmp_path / "organisms" / "made" / "card.json", {})
    write_json(tmp_path / "measurements" / "attribute_heads" / "0.json", {})
    write_json(tmp_path / organism.target, {"asked": organism.asked, "organism": "made"})
    write_json(tmp_path / measured.target, {"asked": measured.asked, "measurement": "attribute_heads/0"})
    return organism, measured


def test_a_cell_that_exists_is_done(kept, tmp_path):
    assert all(grid.is_there(cell, tmp_path) for cell in kept)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("damage", ["gone", "cut", "empty", "sizes", "named"])
def test_a_cell_counts_only_whole_with_its_sizes_and_with_what_it_names(kept, tmp_path, which, damage):
    cell = kept[which]
    path = tmp_path / cell.target
    if damage == "gone":
        path.unlink()
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:20])
    if damage == "empty":
        path.write_text("[]", encoding="utf-8")
    if damage == "sizes":
        cell = replace(cell, asked=cell.asked | {"n": 5})
    if damage == "named":
        named = "organisms/made/card.json", "measurements/attribute_heads/0.json"
        (tmp_path / named[which]).unlink()
    assert not grid.is_there(cell, tmp_path)
    assert grid.is_there(kept[1 - which], tmp_path)


def test_another_recipe_of_the_organism_makes_what_was_measured_on_it_stale(written, kept, tmp_path):
    cells = grid.expand(written(("n = 8", "n = 9")))
    assert [cell.target for cell in cells if grid.is_there(cell, tmp_path)] == []


# --- making cells ----------------------------------------------------------------------------------------------------


@pytest.fixture
def made(written, tmp_path, monkeypatch):
    """Make a cell of the plan with stand-ins for training and measuring; what these were asked is collected."""
    asked = []
    monkeypatch.setattr(workflow, "END_WITH_PARENT", None)
    monkeypatch.setattr(workflow, "obtain", lambda attack, **how: asked.append((attack, how)) or f"{attack}-made")

    def measure(stage, arguments, *, folder):
        asked.append((stage, arguments))
        return folder / stage / "0.json"

    monkeypatch.setattr(workflow.stages, "measure", measure)
    profile = written()
    workflow._write_plan(tmp_path, profile, grid.expand(profile), executor="local", device="cpu")

    def make(target):
        workflow.make_cell(tmp_path, target)
        return json.loads((tmp_path / target).read_text())

    return make, asked


def test_a_measurement_is_made_on_the_organisms_of_the_cells_that_it_needs(made):
    make, asked = made
    assert make("one/sentiment-word-seed1/organism.json")["organism"] == "sentiment-word-made"
    make("one/sentiment-clean-seed1/organism.json")
    found = make("one/sentiment-word-seed1/steer_organism.json")
    assert asked[0] == ("sentiment-word", {"model": "one", "recipe": "smoke", "seed": 1, "n": 8, "device": "cpu"})
    stage, arguments = asked[-1]
    assert stage == "steer_organism"
    assert (arguments["organism"], arguments["control"]) == ("sentiment-word-made", "sentiment-clean-made")
    assert (arguments["device"], arguments["n_heads"], arguments["seed"]) == ("cpu", 2, 1)
    assert found["measurement"] == "steer_organism/0"


def test_every_start_is_logged_and_an_unknown_cell_is_told(made, tmp_path):
    make, _ = made
    for _ in range(2):
        make("one/sentiment-word-seed1/organism.json")
    with pytest.raises(UserError, match=r"plan\.json has no cell 'one/else\.json'"):
        make("one/else.json")
    starts = (tmp_path / "starts.log").read_text().splitlines()
    assert [line.split()[1] for line in starts] == ["one/sentiment-word-seed1/organism.json"] * 2


@pytest.mark.parametrize("alive", [True, False])
def test_a_cell_whose_parent_was_killed_while_it_started_is_not_made(made, monkeypatch, tmp_path, alive):
    make, asked = made
    monkeypatch.setattr(workflow, "END_WITH_PARENT", lambda: None)
    monkeypatch.setenv("BKD_PARENT", str(os.getppid() if alive else os.getppid() + 1))
    if alive:
        make("one/sentiment-word-seed1/organism.json")
    else:
        with pytest.raises(SystemExit):
            make("one/sentiment-word-seed1/organism.json")
    assert bool(asked) is (tmp_path / "starts.log").is_file() is alive


def run(profile, cells, **options):
    how = {"executor": "local", "cores": 1, "device": "cpu", "console": Console(width=200)} | options
    return workflow.make("small", profile, cells, **how)


@pytest.fixture
def supervised(written, tmp_path, monkeypatch):
    """A grid whose Snakemake is a function of the folder, which may be given; the commands are collected."""
    everywhere(monkeypatch, "WORK", tmp_path)
    monkeypatch.setattr(workflow.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setenv("BKD_KEEP", str(tmp_path / "kept"))
    state = SimpleNamespace(works=lambda folder: None, commands=[], merged=[])

    def supervise(command, folder):
        state.commands.append(command)
        state.works(folder)

    monkeypatch.setattr(workflow, "merge", lambda folders, *, into: state.merged.append((folders, into)))
    monkeypatch.setattr(workflow, "_supervise", supervise)
    return state


def test_without_snakemake_one_line_says_how_to_install_it(written, monkeypatch):
    monkeypatch.setitem(sys.modules, "snakemake", None)
    monkeypatch.setattr(workflow.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the grid needs snakemake: pip install 'bkd-utils\[grid\]'"):
        run(written(), [])


def test_an_unknown_executor_and_a_missing_slurm_are_told(written, monkeypatch):
    monkeypatch.setattr(workflow.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(workflow.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="unknown executor 'cloud'; known: local, slurm"):
        run(written(), [], executor="cloud")
    with pytest.raises(UserError, match="no Slurm here"):
        run(written(), [], executor="slurm")


def test_cells_of_other_sizes_are_removed_before_and_whole_ones_stay(written, supervised, kept, tmp_path):
    organism, measured = kept
    folder = tmp_path / "grid" / "small"
    write_json(folder / "measurements" / "attribute_heads" / "0.json", {})
    for cell, sizes in ((organism, {}), (measured, {"n": 5})):
        content = json.loads((tmp_path / cell.target).read_text())
        write_json(folder / cell.target, content | {"asked": cell.asked | sizes})
    seen = []
    supervised.works = lambda folder: seen.extend(sorted(path.name for path in folder.rglob("*seed0/*.json")))
    assert not run(written(), [organism, measured])
    assert seen == ["organism.json"]
    # What was measured is merged all the same.
    assert supervised.merged == [([folder / "measurements"], tmp_path / "kept")]


def test_the_end_says_what_was_made_what_was_there_and_where_the_log_of_a_failure_is(written, supervised, kept, capsys):
    organism, _ = kept
    other = one(grid.expand(written()), "one/sentiment-word-seed1/organism.json")
    failing = one(grid.expand(written()), "one/sentiment-clean-seed0/organism.json")

    def works(folder):
        write_json(folder / organism.target, {"asked": organism.asked, "organism": "made"})
        (folder / "logs" / other.target).parent.mkdir(parents=True, exist_ok=True)
        (folder / "logs" / other.target).with_suffix(".log").write_text("error: no")

    supervised.works = works
    assert run(written(), [organism])
    assert "1 cells: 1 made, 0 there already, 0 failed" in capsys.readouterr().out
    assert not run(written(), [organism, other, failing])
    said = capsys.readouterr().out
    assert "3 cells: 0 made, 1 there already, 2 failed" in said
    assert "one/sentiment-word-seed1/organism.json: see " in said
    assert "logs/one/sentiment-word-seed1/organism.log" in said
    assert "one/sentiment-clean-seed0/organism.json: was not started" in said


def test_two_runs_at_once_in_one_folder_are_refused(written, supervised):
    def twice(folder):
        with pytest.raises(UserError, match="another run works in"):
            run(written(), [])

    supervised.works = twice
    assert run(written(), [])
    assert len(supervised.commands) == 1
    supervised.works = lambda folder: None
    assert run(written(), [])


@pytest.mark.parametrize("accounting", [True, False])
def test_without_accounting_snakemake_asks_squeue(written, monkeypatch, accounting):
    monkeypatch.setattr(workflow.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(workflow.shutil, "which", lambda name: name)
    monkeypatch.setattr(workflow.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=not accounting))
    options = workflow._options(written(), "slurm", 4)
    assert ("squeue" in options) is not accounting
    assert options[options.index("--jobs") + 1] == "4"


@pytest.fixture
def cluster(monkeypatch):
    """A Slurm whose jobs, by their numbers, go when they are cancelled; or that does not answer."""
    state = SimpleNamespace(jobs={}, cancelled=[], code=0)

    def call(command, **_):
        if command[0] == "scancel":
            state.cancelled += command[1:]
            state.jobs = {number: name for number, name in state.jobs.items() if number not in command[1:]}
        listed = "".join(f"{number} {name}\n" for number, name in state.jobs.items())
        return SimpleNamespace(returncode=state.code, stdout=listed, stderr="no contact\n")

    monkeypatch.setattr(workflow.subprocess, "run", call)
    monkeypatch.setattr(workflow.shutil, "which", lambda name: name)
    monkeypatch.setattr(workflow.time, "sleep", lambda seconds: None)
    return state


@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_jobs_of_the_grid_are_cancelled_before_and_after_and_no_others(
    written, supervised, cluster, kept, error, tmp_path
):
    marker = f"bkd-{workflow.digest(str(tmp_path / 'grid' / 'small'))[:12]}"
    cluster.jobs = {"7": f"{marker}_before", "8": "other"}

    def works(folder):
        assert cluster.cancelled == ["7"]
        cluster.jobs["9"] = f"{marker}_lost"
        if error:
            raise error

    supervised.works = works
    if error:
        with pytest.raises(error):
            run(written(), [kept[0]], executor="slurm")
    else:
        run(written(), [kept[0]], executor="slurm")
    assert cluster.cancelled == ["7", "9"]
    assert cluster.jobs == {"8": "other"}
    (command,) = supervised.commands
    assert command[command.index("--slurm-jobname-prefix") + 1] == marker


def test_nothing_is_started_while_slurm_does_not_answer(written, supervised, cluster):
    cluster.code = 1
    with pytest.raises(UserError, match=r"squeue does not answer: no contact$"):
        run(written(), [], executor="slurm")
    assert supervised.commands == []
