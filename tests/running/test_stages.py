"""Stages by name: all are known, one call can be asked about and measured into a folder."""

import ast
import os

import pytest

from bkd_utils.common import cache, measurements
from bkd_utils.common.files import PACKAGE, UserError
from bkd_utils.running import stages

CALLS = []


def cubes(*, n: int, device: str = "auto") -> list[int]:
    CALLS.append(n)
    return [i**3 for i in range(n)]


def sums(*, n: int) -> int:
    return sum(cache.STAGES["cubes"](n=n))


@pytest.fixture(autouse=True)
def known(monkeypatch):
    monkeypatch.setattr(cache, "STAGES", {})
    cache.stage(cubes)
    cache.stage(sums)
    CALLS.clear()


def decorated(path):
    """Names of the functions of a file that are stages."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        how = {ast.unparse(one) for one in getattr(node, "decorator_list", [])}
        if how & {"stage", "named_stage", "organism_stage", "made_stage"}:
            yield node.name


def test_all_stages_of_the_package_are_known(monkeypatch):
    monkeypatch.undo()
    found = [name for path in PACKAGE.rglob("*.py") for name in decorated(path)]
    assert len(found) == len(set(found)) >= 20
    assert set(found) <= cache.STAGES.keys()
    assert all(stages.stage(name).__name__ == name for name in found)


def test_an_unknown_stage_and_arguments_that_it_does_not_have_are_one_line():
    with pytest.raises(UserError, match="unknown stage 'cube'; known: cubes, sums"):
        stages.stage("cube")
    for given, told in [({}, "missing.*'n'"), ({"n": 1, "m": 2}, "'m'"), ({"n": {1}}, "argument n")]:
        with pytest.raises(UserError, match=f"stage cubes: .*{told}") as error:
            stages.question("cubes", given)
        assert len(str(error.value).splitlines()) == 1


def test_a_call_is_measured_into_a_folder_once(tmp_path):
    file = stages.measure("cubes", {"n": 3}, folder=tmp_path)
    assert file == cache.place(tmp_path, stages.question("cubes", {"n": 3, "device": "cuda"}))
    assert measurements.read(file).result == [0, 1, 8]
    assert stages.measure("cubes", {"n": 3}, folder=tmp_path) == file
    assert CALLS == [3]


def test_nothing_that_ships_is_used_and_what_a_stage_needs_is_kept_beside_it(tmp_path, monkeypatch):
    shipped, new = tmp_path / "shipped", tmp_path / "new"
    stages.measure("sums", {"n": 3}, folder=shipped)
    monkeypatch.setenv("BKD_SHIPPED", str(shipped))
    monkeypatch.setenv("BKD_KEEP", str(shipped))
    stages.measure("sums", {"n": 3}, folder=new)
    assert CALLS == [3, 3]
    assert [one.relative_to(new) for one in measurements.paths(new)] == [
        one.relative_to(shipped) for one in measurements.paths(shipped)
    ]
    assert (os.environ["BKD_SHIPPED"], os.environ["BKD_KEEP"]) == (str(shipped), str(shipped))


def test_a_measurement_that_could_not_be_written_is_an_error(tmp_path):
    """A stage gives its result in any case; the file is what is asked for here."""
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"cannot write to {tmp_path / 'file'}: "):
        stages.measure("cubes", {"n": 3}, folder=tmp_path / "file")


def test_the_environment_is_put_back_after_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_KEEP", "before")
    monkeypatch.delenv("BKD_SHIPPED", raising=False)
    seen = []

    def failing() -> int:
        seen.append((os.environ["BKD_KEEP"], os.environ["BKD_SHIPPED"]))
        raise ZeroDivisionError

    cache.stage(failing)
    with pytest.raises(ZeroDivisionError):
        stages.measure("failing", {}, folder=tmp_path)
    assert seen == [(str(tmp_path), "")]
    assert os.environ["BKD_KEEP"] == "before"
    assert "BKD_SHIPPED" not in os.environ
