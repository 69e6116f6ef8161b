"""Measuring again: everything once, in parts, and on from where it was killed."""

import io
import os
import re
import shutil
import subprocess
import sys

import pytest
import toy_stages as toys
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from typer.testing import CliRunner

from bkd_utils.__main__ import app
from bkd_utils.common import files
from bkd_utils.common.files import ROOT, UserError
from bkd_utils.common.measurements import read, write
from bkd_utils.common.spot_checks import Spot
from bkd_utils.running import publishing, remeasuring
from bkd_utils.running.remeasuring import Cell, parse_shard, read_cells, remeasure, split


@pytest.fixture(autouse=True)
def _toys():
    with toys.known():
        yield


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    monkeypatch.setenv("BKD_SHIPPED", str(folder))
    for x in range(4):
        toys.measure(folder, x=x, changed={"code": "0" * 64, "seconds": float(x)})
    return folder


def call(source, folder, *ids, **options):
    """How many were measured, were there already and failed, and all that `remeasure` prints."""
    console = Console(file=io.StringIO(), width=200)
    every = [f"{path.parent.name}/{path.stem}" for path in source.glob("*/*.json")]
    failed = remeasure(ids or every, folder=folder, console=console, **options)
    *_, last = console.file.getvalue().splitlines()
    counts = tuple(map(int, re.fullmatch(r"(\d+) measured, (\d+) there already, (\d+) failed", last).groups()))
    assert counts[2] == failed
    return counts, console.file.getvalue()


def test_all_is_measured_anew_by_the_code_that_is_here_and_only_once(source, tmp_path):
    done, printed = call(source, tmp_path / "new")
    assert done == (4, 0, 0)
    assert "4 measurements: 4 to measure, 0 there already; about 6 s on two cores by the record" in printed
    assert toys.results(tmp_path / "new") == toys.results(source)
    assert all(read(tmp_path / "new" / path).code != "0" * 64 for path in toys.results(source))
    before = toys.tree(tmp_path / "new")
    done, printed = call(source, tmp_path / "new")
    assert done == (0, 4, 0)
    assert toys.tree(tmp_path / "new") == before


def test_seconds_of_a_graphics_card_are_told_and_stand_for_more_on_a_processor(source, tmp_path, monkeypatch):
    assert "graphics card" not in call(source, tmp_path / "one")[1]
    for path in source.glob("*/*.json"):
        one = read(path)
        if one.arguments["x"] != 3:
            write(source, one.model_copy(update={"machine": one.machine.model_copy(update={"device": "cuda"})}))
    assert "about 6 s on two cores by the record, 3 of them on a graphics card" in call(source, tmp_path / "two")[1]
    monkeypatch.setattr(remeasuring, "spots", lambda: {"toy_square": Spot(on_cpu=8.0)})
    assert "about 27 s on two cores by the record, 3 of them on a graphics card" in call(source, tmp_path / "three")[1]


def test_the_time_can_be_asked_for_and_nothing_is_measured(source, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "WORK", tmp_path)
    monkeypatch.setattr(publishing, "shipped_by", lambda names: [read(path).id for path in source.glob("*/*.json")])
    asked = CliRunner().invoke(app, ["run", "--remeasure", "--list", "--shard", "1/2"])
    assert asked.exit_code == 0, asked.output
    assert "2 to measure, 0 there already; about 3 s on two cores by the record" in " ".join(asked.output.split())
    assert not (tmp_path / "remeasured").exists()


def test_what_is_there_by_other_code_or_damaged_is_measured_again(source, tmp_path):
    call(source, tmp_path / "new")
    first, second, third, _ = sorted((tmp_path / "new").glob("*/*.json"))
    toys.change(first, code="1" * 64)
    toys.change(second, machine=read(second).machine.model_dump() | {"device": "cuda"})
    third.write_text("{")
    assert call(source, tmp_path / "new")[0] == (3, 1, 0)


def test_only_the_chosen_ones_are_measured(source, tmp_path):
    names = [read(path).id for path in sorted(source.glob("*/*.json"))[:2]]
    done, _ = call(source, tmp_path / "new", *names)
    assert done == (2, 0, 0)
    assert sorted(toys.results(tmp_path / "new")) == sorted(f"{name}.json" for name in names)


def test_what_cannot_be_asked_is_named_and_the_others_go_on(source, tmp_path, monkeypatch):
    gone = read(toys.measure(source, x=9, organism="second")).id
    monkeypatch.delitem(toys.ORGANISMS, "second")
    broken = source / "toy_broken" / "0.json"
    toys.measure(source, stage="toy_killed", x=1)
    (one,) = source.glob("toy_killed/*.json")
    one.write_text(one.read_text().replace('"result": 1', '"result": NaN'))
    broken.parent.mkdir()
    broken.write_text("{")
    done, printed = call(source, tmp_path / "new")
    assert done == (4, 0, 3)
    assert f"  {gone} failed: unknown organism 'second'" in printed
    assert f"  toy_broken/0 failed: {broken} is not valid JSON" in printed
    assert f"  toy_killed/{one.stem} failed: {one}: it has numbers that are not finite" in printed
    assert "Traceback" not in printed
    assert call(source, tmp_path / "two", "toy_square/none")[0] == (0, 0, 1)


def test_a_stage_or_an_argument_that_is_no_more_fails_by_name(source, tmp_path, monkeypatch):
    stage = remeasuring.cache.STAGES.pop("toy_square")
    done, printed = call(source, tmp_path / "new")
    assert done[2] == 4
    assert "failed: unknown stage 'toy_square'; known: " in printed

    def toy_square(*, y: int) -> int:
        return y

    remeasuring.cache.stage(toy_square)
    done, printed = call(source, tmp_path / "new")
    assert done[2] == 4
    assert "failed: stage toy_square: " in printed
    assert stage.__name__ == "toy_square"


def test_a_stage_that_breaks_is_named_with_the_kind_of_its_error(source, tmp_path):
    with pytest.raises(ZeroDivisionError):
        toys.measure(source, stage="toy_broken", x=1)
    cell = Cell("toy_broken/1", "toy_broken", {"x": 1})
    console = Console(file=io.StringIO(), width=200)
    assert not remeasuring._measured(cell, tmp_path / "new", console)
    assert console.file.getvalue().startswith("  toy_broken/1 failed: ZeroDivisionError: ")


def test_two_files_of_one_call_are_measured_once(source, tmp_path, monkeypatch):
    """As when an organism was made anew and the measurement of the old one was not removed."""
    monkeypatch.setitem(toys.ORGANISMS, "first", "another")
    toys.measure(source, x=3)
    assert call(source, tmp_path / "new")[0] == (5, 0, 0)
    assert len(toys.results(tmp_path / "new")) == 4


def test_a_device_takes_the_place_of_the_one_on_record(source, tmp_path):
    call(source, tmp_path / "new", device="meta")
    assert {read(path).machine.device for path in (tmp_path / "new").glob("*/*.json")} == {"meta"}


def test_after_ctrl_c_the_same_call_goes_on(source, tmp_path, monkeypatch):
    measure, calls = remeasuring.stages.measure, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*args, **options)

    monkeypatch.setattr(remeasuring.stages, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call(source, tmp_path / "new")
    assert call(source, tmp_path / "new")[0] == (2, 2, 0)


def test_a_source_without_measurements_and_a_folder_that_is_none_are_refused(source, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to"):
        call(source, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    for name, told in (("empty", "holds no measurements"), ("none", "is no folder")):
        monkeypatch.setenv("BKD_SHIPPED", str(tmp_path / name))
        with pytest.raises(UserError, match=f"^{tmp_path / name} {told}$"):
            call(source, tmp_path / "new")
    monkeypatch.setenv("BKD_SHIPPED", "")
    with pytest.raises(UserError, match="nothing ships"):
        call(source, tmp_path / "new")


def test_a_result_that_could_not_be_kept_is_no_success(source, tmp_path, monkeypatch):
    monkeypatch.setattr(remeasuring.measurements, "write", lambda *_: None)
    done, printed = call(source, tmp_path / "new")
    assert done == (0, 0, 4)
    assert "failed: its result is not in" in printed


# --- shards ---------------------------------------------------------------------------------------------------------


def test_a_shard_is_a_number_of_a_number():
    assert parse_shard("2/8") == (2, 8)
    assert parse_shard("1/1") == (1, 1)


@pytest.mark.parametrize("text", ["3/2", "0/4", "1/0", "a/b", "-1/2", "1/-2", "1", "1/2/3", "", " 1/2", "1.0/2", "²/3"])
def test_a_shard_that_is_none_is_refused_before_anything_is_read(text, tmp_path):
    with pytest.raises(UserError, match=r"shard .*: a shard is K/N with K from 1 to N") as raised:
        call(tmp_path / "none", tmp_path / "new", shard=text)
    assert repr(text) in str(raised.value)
    assert not (tmp_path / "new").exists()


@given(st.lists(st.floats(0, 1e4), max_size=40), st.integers(1, 60))
def test_every_cell_is_in_exactly_one_shard_and_no_shard_has_much_more_than_another(seconds, parts):
    cells = [Cell(f"stage/{number:03}", seconds=each) for number, each in enumerate(seconds)]
    found = split(cells, parts)
    assert len(found) <= parts
    assert sorted((cell for part in found for cell in part), key=lambda cell: cell.id) == cells
    assert found == split(cells[::-1], parts)
    loads = [sum(cell.seconds for cell in part) for part in found]
    # Taking the longest first onto the shortest part never leaves two parts further apart than the longest cell.
    assert max(loads) - min(loads) <= max([0.0, *seconds]) + 1e-6


def test_the_shards_together_are_the_whole(source, tmp_path):
    counts = [call(source, tmp_path / "new", shard=f"{number}/3")[0][0] for number in (1, 2, 3)]
    assert counts == [1, 1, 2]  # 3 s, 2 s, and 1 s with 0 s
    assert toys.results(tmp_path / "new") == toys.results(source)
    assert call(source, tmp_path / "new", shard="7/8")[0] == (0, 0, 0)


def test_cells_come_in_order(source):
    every = [f"{path.parent.name}/{path.stem}" for path in source.glob("*/*.json")]
    names = [cell.id for cell in read_cells([*every[::-1], every[0]])]
    assert names == sorted(every)


def test_a_stage_on_an_organism_is_measured_again_while_the_organism_is_there(tiny_organism, tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_SHIPPED", str(tmp_path / "shipped"))
    asked = {"organism": "tiny", "attack": "sentiment-word", "model": tiny_organism, "n": 2, "n_means": 2}
    path = toys.measure(tmp_path / "shipped", stage="attribute_heads", changed={"code": "0" * 64}, **asked)
    assert call(tmp_path / "shipped", tmp_path / "new")[0] == (1, 0, 0)
    assert toys.results(tmp_path / "new") == toys.results(tmp_path / "shipped")
    shutil.rmtree(tmp_path / "organisms" / "tiny")
    done, printed = call(tmp_path / "shipped", tmp_path / "two")
    assert done == (0, 0, 1)
    assert f"attribute_heads/{path.stem} failed: unknown organism 'tiny'" in printed


# --- a kill ---------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
import toy_stages
from bkd_utils.running.remeasuring import remeasure
with toy_stages.known():
    remeasure(sys.argv[2:], folder=Path(sys.argv[1]), console=Console())
"""


def test_after_a_kill_the_same_command_goes_on_and_what_was_measured_stays_to_the_byte(source, tmp_path, monkeypatch):
    monkeypatch.setenv("KILL", os.devnull)
    toys.measure(source, stage="toy_killed", x=1)  # comes before all toy_square
    folder, every = tmp_path / "new", [f"{path.parent.name}/{path.stem}" for path in source.glob("*/*.json")]
    command = [sys.executable, "-c", SCRIPT, str(folder), *every]
    # Two of four squares are there when the kill comes.
    names = [read(path).id for path in sorted(source.glob("toy_square/*.json"))[:2]]
    call(source, folder, *names)
    before = toys.tree(folder)
    environment = os.environ | {"KILL": str(tmp_path / "mark"), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    options = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True}
    assert subprocess.run(command, **options).returncode == -9
    assert toys.tree(folder) == before
    ended = subprocess.run(command, **options)
    assert "3 measured, 2 there already, 0 failed" in ended.stdout, ended.stderr
    after = toys.tree(folder)
    assert {path: after[path] for path in before} == before
    assert toys.results(folder) == toys.results(source)
