"""A result is the same after it was written as JSON and read again, and other keys are refused."""

from dataclasses import dataclass

import pytest

from bkd_utils.common.cache import stage
from bkd_utils.common.files import read_json
from bkd_utils.common.results import Result


@dataclass(frozen=True)
class Part(Result):
    value: float


@dataclass(frozen=True)
class Whole(Result):
    first: Part
    more: list[Part]
    by_name: dict[str, list[Part]]
    maybe: Part | None
    heads: list[list[int]]


WHOLE = Whole(Part(1.0), [Part(2.0)], {"add, raw": [Part(3.0)]}, None, [[0, 1]])
CALLS = []


@stage
def measured(*, parts: dict[str, Part]) -> Whole:
    CALLS.append(parts)
    return WHOLE


@stage
def rows(*, n: int) -> list[Part]:
    return [Part(float(i)) for i in range(n)]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    CALLS.clear()
    return tmp_path / "measurements"


def test_a_result_comes_back_from_json_with_all_results_in_it():
    assert WHOLE.to_json() == {
        "first": {"value": 1.0},
        "more": [{"value": 2.0}],
        "by_name": {"add, raw": [{"value": 3.0}]},
        "maybe": None,
        "heads": [[0, 1]],
    }
    assert Whole.from_json(WHOLE.to_json()) == WHOLE
    given = WHOLE.to_json() | {"maybe": {"value": 4.0}}
    assert Whole.from_json(given).maybe == Part(4.0)


def test_missing_and_unknown_fields_are_named():
    with pytest.raises(ValueError, match=r"Part has other fields \(missing: value; unknown: valeu\)"):
        Part.from_json({"valeu": 1.0})
    with pytest.raises(ValueError, match="Part is made of a dictionary, not of float"):
        Whole.from_json(WHOLE.to_json() | {"first": 1.0})
    with pytest.raises(ValueError, match="is no list"):
        Whole.from_json(WHOLE.to_json() | {"more": {"value": 1.0}})


def test_a_stage_gives_back_the_result_that_it_kept():
    assert measured(parts={"a": Part(1.0)}) == measured(parts={"a": Part(1.0)}) == WHOLE
    assert rows(n=2) == rows(n=2) == [Part(0.0), Part(1.0)]
    measured(parts={"a": Part(2.0)})  # a result among the arguments is part of the key
    assert [{"a": Part(1.0)}, {"a": Part(2.0)}] == CALLS


def test_a_kept_file_with_other_fields_is_put_aside_and_measured_again(own_folder, caplog):
    measured(parts={})
    (file,) = own_folder.glob("measured/*.json")
    assert read_json(file)["result"]["first"] == {"value": 1.0}
    file.write_text(file.read_text().replace('"first"', '"premier"'))
    assert measured(parts={}) == WHOLE
    assert len(CALLS) == 2
    assert f"{file}: result was changed" in caplog.text
    assert file.with_suffix(".damaged").is_file()
