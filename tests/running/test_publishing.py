"""Measurements that ship: what notebooks use is there, and nothing else; the text beside them is made of them."""

import shutil
from pathlib import Path

import pytest

from bkd_utils.common import measurements
from bkd_utils.common.files import UserError, read_json
from bkd_utils.common.measurements import Machine, Measurement, digest
from bkd_utils.running import notebooks, publishing
from bkd_utils.running.ledger import Used

MACHINE = Machine(processor="x86_64 AVX2", cores=2, device="cpu", fast_bf16=False)


def keep(folder, stage, *, n, seconds=30.0, result=None):
    """Write a measurement of a stage; its id."""
    result = result or {"n": n}
    one = Measurement.model_construct(
        version=1,
        stage=stage,
        arguments={"n": n},
        inputs={},
        code="0" * 64,
        commit=None,
        libraries={},
        machine=MACHINE,
        seconds=seconds,
        digest=digest(result),
        arrays=None,
        seal="",
        result=result,
    )
    measurements.write(folder, one)
    return one.id


def used(*ids, how="measured here"):
    return Used({one: {"id": one, "how": how, "commit": None, "seconds": 1.0} for one in ids})


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "kept"


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(publishing, "MEASUREMENTS", tmp_path / "shipped")
    monkeypatch.setattr(notebooks, "all_notebooks", lambda **_: [Path("01_a.ipynb"), Path("02_b.ipynb")])
    return tmp_path / "shipped"


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def ids(folder):
    return [f"{path.parent.name}/{path.stem}" for path in measurements.paths(folder)]


def test_what_a_notebook_used_ships_with_an_index_and_a_text(kept, shipped):
    one, two, large = (
        keep(kept, "toy", n=1),
        keep(kept, "toy", n=2),
        keep(kept, "maps", n=1, result=[[0.5] * 8] * 16),
    )
    keep(kept, "toy", n=3)  # kept, but used by no notebook
    publishing.publish_measurements({"02_b": used(large, one), "01_a": used(two, one)}, kept=kept)
    assert ids(shipped) == sorted([one, two, large])
    assert list(read_json(shipped / "index.json").items()) == [
        ("01_a", sorted([one, two])),
        ("02_b", sorted([large, one])),
    ]
    assert measurements.read(shipped / f"{large}.json").result == [[0.5] * 8] * 16
    for name in (f"{one}.json", f"{large}.json", f"{large}.safetensors"):
        assert (shipped / name).read_bytes() == (kept / name).read_bytes()
    assert (shipped / "README.md").read_text(encoding="utf-8") == publishing.readme(shipped)


def test_of_a_notebook_about_a_model_of_the_readers_own_nothing_ships(kept, shipped):
    one, own = keep(kept, "toy", n=1), keep(kept, "toy", n=2)
    publishing.publish_measurements({"01_a": used(one), "08_your_own_model": used(own)}, kept=kept)
    assert ids(shipped) == [one]
    assert read_json(shipped / "index.json") == {"01_a": [one]}


def test_publishing_the_same_again_changes_no_byte(kept, shipped):
    every = used(keep(kept, "toy", n=1), keep(kept, "maps", n=1, result=[[0.5] * 8] * 16))
    publishing.publish_measurements({"01_a": every}, kept=kept)
    first = contents(shipped)
    publishing.publish_measurements({"01_a": every}, kept=kept)
    assert contents(shipped) == first
    shutil.rmtree(shipped)
    publishing.publish_measurements({"01_a": every}, kept=kept)
    assert contents(shipped) == first


def test_what_no_notebook_uses_any_more_is_removed_and_nothing_of_other_notebooks(kept, shipped):
    old, shared, new = keep(kept, "maps", n=1, result=[[0.5] * 8] * 16), keep(kept, "toy", n=1), keep(kept, "toy", n=2)
    other = keep(kept, "other", n=1)
    publishing.publish_measurements({"01_a": used(old, shared), "02_b": used(shared, other)}, kept=kept)
    publishing.publish_measurements({"01_a": used(new)}, kept=kept)
    assert read_json(shipped / "index.json") == {"01_a": [new], "02_b": sorted([shared, other])}
    assert ids(shipped) == sorted([new, shared, other])
    assert not (shipped / f"{old}.safetensors").exists()


def test_nothing_is_removed_before_all_notebooks_are_in_the_index(kept, shipped):
    """What the index does not name may be that of a notebook that has not been published yet."""
    old, new = keep(shipped, "toy", n=1), keep(kept, "toy", n=2)
    publishing.publish_measurements({"01_a": used(new)}, kept=kept)
    assert ids(shipped) == sorted([old, new])
    publishing.publish_measurements({"02_b": used()}, kept=kept)
    assert ids(shipped) == [new]


def test_what_ships_already_stays_and_is_not_replaced_by_what_other_code_once_kept(kept, shipped):
    one = keep(shipped, "toy", n=1, result={"by": "this code"})
    assert keep(kept, "toy", n=1, result={"by": "other code"}) == one
    publishing.publish_measurements({"01_a": used(one, how="shipped")}, kept=kept)
    assert measurements.read(shipped / f"{one}.json").result == {"by": "this code"}
    publishing.publish_measurements({"01_a": used(one)}, kept=kept)
    assert measurements.read(shipped / f"{one}.json").result == {"by": "other code"}


def test_a_damaged_one_is_refused_before_anything_is_removed(kept, shipped):
    one, two = keep(kept, "toy", n=1), keep(kept, "toy", n=2)
    publishing.publish_measurements({"01_a": used(one)}, kept=kept)
    before = contents(shipped)
    path = kept / f"{two}.json"
    path.write_text(path.read_text().replace('"n": 2\n', '"n": 3\n'))
    with pytest.raises(ValueError, match=f"{two}.json: ") as caught:
        publishing.publish_measurements({"01_a": used(two)}, kept=kept)
    assert len(str(caught.value).splitlines()) == 1
    assert contents(shipped) == before


@pytest.mark.parametrize("how", ["measured here", "shipped"])
def test_one_that_is_nowhere_is_refused_before_anything_is_written(how, kept, shipped):
    """A full disk lets a notebook go on with a result that could not be kept."""
    one = keep(kept, "toy", n=1)
    gone = keep(kept, "toy", n=2)
    (kept / f"{gone}.json").unlink()
    with pytest.raises(UserError, match=f"{gone} was used but is nowhere kept"):
        publishing.publish_measurements(
            {"01_a": Used(used(one).measurements | used(gone, how=how).measurements)}, kept=kept
        )
    assert not shipped.exists()


def test_the_text_has_a_line_by_stage(kept, shipped):
    one, two = keep(kept, "toy", n=1, seconds=30.0), keep(kept, "toy", n=2, seconds=60.0)
    large = keep(kept, "maps", n=1, seconds=6.0, result=[[1 / 3] * 8] * 1600)
    publishing.publish_measurements({"01_a": used(one, large), "02_b": used(one, two)}, kept=kept)
    rows = [line for line in publishing.readme(shipped).splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[:4] for row in rows] == [["| `maps`", "01", "1", "0.1"], ["| `toy`", "01, 02", "2", "1.5"]]
    assert 102 <= int(rows[0].split(" | ")[4].strip(" |")) <= 106  # 1600 * 8 numbers of 8 bytes


def test_without_measurements_there_is_an_empty_index_and_text(tmp_path):
    assert publishing.index_of(tmp_path) == {}
    assert publishing.readme(tmp_path).endswith("|---|---|---|---|---|\n")


def test_the_text_tells_every_field_of_a_file():
    told = ", ".join(publishing.FIELDS)
    assert set(told.split(", ")) == set(Measurement.model_fields) - {"version"}
