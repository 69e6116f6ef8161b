"""Marks: what agrees on a spot check counts as measured by the code of today, and nothing else in its file changes."""

import io
import json

import pytest
import toy_stages as toys
from rich.console import Console

from bkd_utils.common import cache, spot_checks
from bkd_utils.common.files import UserError
from bkd_utils.common.measurements import digest, read
from bkd_utils.common.spot_checks import Spot
from bkd_utils.running.restamping import restamp

OLD = {"code": "0" * 64, "commit": "1" * 40}


@pytest.fixture(autouse=True)
def _toys(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_KEEP", str(tmp_path / "kept"))
    monkeypatch.setattr(spot_checks, "spots", lambda: {"toy_square": Spot(), "toy_killed": Spot(none="it is random")})
    with toys.known():
        yield


@pytest.fixture
def source(tmp_path, monkeypatch):
    folder = tmp_path / "shipped"
    monkeypatch.setenv("BKD_SHIPPED", str(folder))
    for x in range(3):
        toys.measure(folder, x=x, changed=OLD if x else None)
    return folder


def call():
    console = Console(file=io.StringIO(), width=200)
    return restamp(console), console.file.getvalue()


def test_what_agrees_gets_the_mark_of_this_code_and_keeps_everything_else(source):
    before = {path: json.loads(path.read_text()) for path in source.glob("*/*.json")}
    arrays = {path: path.read_bytes() for path in source.glob("*/*.safetensors")}
    found, printed = call()
    assert (found.renewed, found.current, found.differing, found.unchecked) == (2, 1, [], {})
    assert printed.splitlines()[-1] == "2 renewed, 1 are of this code, 0 differ, 0 could not be checked"
    for path, old in before.items():
        new = json.loads(path.read_text())
        changed = {name for name in new if new[name] != old[name]}
        assert changed == ({"code", "commit", "seal"} if old["code"] == "0" * 64 else set())
        assert list(new) == list(old)
        assert path.read_text() == json.dumps(new, indent=2) + "\n"
        assert cache.is_of_this_code(read(path), cache.question(cache.STAGES["toy_square"], **new["arguments"]))
    assert {path: path.read_bytes() for path in arrays} == arrays
    assert call()[0].current == 3


def test_other_libraries_are_renewed_too(source):
    path = toys.measure(source, x=0)
    toys.change(path, libraries={"torch": "0"})
    assert call()[0].renewed == 3
    assert read(path).libraries == cache.installed_versions()


def test_what_differs_keeps_its_mark_and_is_listed_with_place_and_both_values(source):
    path = toys.measure(source, x=7)
    result = read(path).result | {"square": 50}
    raw = json.loads(path.read_text())["result"] | {"square": 50}
    toys.change(path, result=raw, digest=digest(result), **OLD)
    before = path.read_bytes()
    found, printed = call()
    assert [one.id for one in found.differing] == [read(path).id]
    assert f"{read(path).id}, square: 50 ships, 49 was measured here" in printed
    assert path.read_bytes() == before
    assert found.renewed == 2


def test_what_cannot_be_checked_is_listed_with_the_reason_and_stays(source, monkeypatch):
    gone = toys.measure(source, x=8, organism="second", changed=OLD)
    monkeypatch.delitem(toys.ORGANISMS, "second")
    monkeypatch.setenv("KILL", "/")
    unspotted = toys.measure(source, stage="toy_killed", x=1, changed=OLD)
    before = toys.tree(source)
    monkeypatch.setitem(toys.ORGANISMS, "first", "another")
    found, printed = call()
    assert toys.tree(source) == before
    assert found.renewed == 0
    assert found.unchecked[f"toy_square/{gone.stem}"] == "unknown organism 'second'"
    assert "has changed" in found.unchecked[f"toy_killed/{unspotted.stem}"]
    assert len(found.unchecked) == 5
    monkeypatch.setitem(toys.ORGANISMS, "first", "1")
    found, printed = call()
    assert "it is random" in found.unchecked[f"toy_killed/{unspotted.stem}"]
    assert f"toy_killed/{unspotted.stem} could not be checked: " in printed
    assert printed.splitlines()[-1] == "2 renewed, 1 are of this code, 0 differ, 2 could not be checked"
    assert unspotted.read_bytes() == before[f"toy_killed/{unspotted.name}"]


def test_a_damaged_file_is_an_error_before_anything_is_renewed(source):
    path = toys.measure(source, x=2)
    path.with_suffix(".safetensors").unlink()
    before = toys.tree(source)
    with pytest.raises(ValueError, match=f"{path.stem}.safetensors is missing"):
        call()
    assert toys.tree(source) == before


def test_after_ctrl_c_what_was_renewed_stays(source, monkeypatch):
    check, calls = spot_checks.check, []

    def interrupted(one):
        calls.append(one)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return check(one)

    monkeypatch.setattr(spot_checks, "check", interrupted)
    with pytest.raises(KeyboardInterrupt):
        call()
    assert call()[0].renewed == 1


def test_a_folder_without_measurements_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_SHIPPED", str(tmp_path))
    with pytest.raises(UserError, match="holds no measurements"):
        call()
