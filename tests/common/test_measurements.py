"""A measurement is read as it was written, and one that was changed, cut off or exchanged is refused in one line."""

import json
import math
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from bkd_utils.common import measurements
from bkd_utils.common.files import read_json, sha256_file, sha256_text, write_json
from bkd_utils.common.measurements import Machine, Measurement, digest, key, paths, read, sealed, write

MACHINE = Machine(processor="x86_64 AVX2", cores=2, device="cpu", fast_bf16=False)
LARGE = [[0.5 * i, -1.5 * i] for i in range(40)]


def made(result, **fields):
    """A measurement of a result."""
    given = {
        "version": 1,
        "stage": "squares",
        "arguments": {"n": 2, "device": "cpu"},
        "inputs": {"adapters": ["a" * 64]},
    }
    given |= {"code": "b" * 64, "commit": None, "libraries": {"torch": "2"}, "machine": MACHINE, "seconds": 1.25}
    return Measurement.model_construct(
        **given | {"digest": digest(result), "arrays": None, "seal": "", "result": result} | fields
    )


def same(one, other):
    """Equal to the last bit and of the same types, True and 1, 0.0 and -0.0, 1 and 1.0 being different."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    sign = math.copysign(1, one) == math.copysign(1, other) if isinstance(one, float) else True
    return type(one) is type(other) and one == other and sign


# --- as it was written ------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([-0.0, 1e-320, 5e-324, 1.7976931348623157e308, 0.1 + 0.2]),
    st.integers(-(2**70), 2**70),
    st.sampled_from([2**63 - 1, 2**63, -(2**63), -(2**63) - 1]),
)
KEYS = st.one_of(st.sampled_from(["", "/", "a/b", "a", "b", "~", "~1", "0", "1", "$array"]), st.text(max_size=3))
# Lists long enough to be taken out, of one type or of several, regular or not.
LISTS = st.one_of(
    st.lists(st.floats(allow_nan=False, allow_infinity=False), min_size=60, max_size=70),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=60, max_size=70),
    st.lists(NUMBERS, min_size=60, max_size=70),
    st.lists(st.booleans(), min_size=60, max_size=70),
    st.lists(st.lists(st.floats(0, 1), min_size=8, max_size=8), min_size=7, max_size=9),
    st.lists(st.lists(st.floats(0, 1), min_size=0, max_size=9), min_size=7, max_size=30),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5), LISTS),
    lambda inside: st.one_of(st.lists(inside, max_size=4), st.dictionaries(KEYS, inside, max_size=4)),
    max_leaves=12,
)


def has_mark_alone(value):
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return (isinstance(value, dict) and value.keys() == {"$array"}) or any(map(has_mark_alone, inside))


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(result=VALUES)
def test_every_json_value_comes_back_to_the_bit_or_is_refused(tmp_path_factory, result):
    folder = tmp_path_factory.mktemp("kept")
    try:
        file = write(folder, made(result))
    except ValueError:
        assert has_mark_alone(result)
        assert paths(folder) == []
    else:
        assert not has_mark_alone(result)
        assert same(read(file).result, result)
        before = sorted((path.name, path.read_bytes()) for path in file.parent.iterdir())
        write(folder, read(file))
        assert sorted((path.name, path.read_bytes()) for path in file.parent.iterdir()) == before
    finally:
        shutil.rmtree(folder)


def test_the_mark_of_an_array_is_refused_as_the_only_key_and_named(tmp_path):
    one = made({"a/b": [{"$array": 3}]})
    with pytest.raises(ValueError, match=r"a result cannot have .* only key '\$array', at /a~1b/0"):
        write(tmp_path, one)
    assert list(tmp_path.iterdir()) == []


def test_large_arrays_stand_beside_the_json_under_their_places(tmp_path):
    ints, tall = list(range(64)), [[i / 3] for i in range(100)]
    file = write(tmp_path, made({"a": {"b/c": tall, "few": [1.0] * 63}, "d": [ints, "text"]}))
    beside = load_file(file.with_suffix(".safetensors"))
    assert {place: (array.shape, array.dtype) for place, array in beside.items()} == {
        "/a/b~1c": ((100, 1), np.float64),
        "/d/0": ((64,), np.int8),
    }
    written = read_json(file)["result"]
    assert written == {"a": {"b/c": {"$array": "/a/b~1c"}, "few": [1.0] * 63}, "d": [{"$array": "/d/0"}, "text"]}


@pytest.mark.parametrize(
    ("last", "kind"),
    [
        (0, np.int8),
        (127, np.int8),
        (128, np.int16),
        (-(2**15) - 1, np.int32),
        (2**31 - 1, np.int32),
        (2**31, np.int64),
        (-(2**63), np.int64),
        (0.5, np.float16),
        (65504.0, np.float16),
        (65505.0, np.float32),
        (2.0**-24, np.float16),
        (2.0**-25, np.float32),
        (float(np.float32(0.1)), np.float32),
        (0.1, np.float64),
        (1e300, np.float64),
        (-0.0, np.float16),
    ],
)
def test_an_array_is_of_the_smallest_type_that_holds_all_its_numbers_exactly(tmp_path, last, kind):
    values = [type(last)(i % 2) for i in range(100)] + [last]
    file = write(tmp_path, made({"a": values}))
    assert load_file(file.with_suffix(".safetensors"))["/a"].dtype == kind
    assert same(read(file).result["a"], values)


def test_keys_with_slashes_do_not_share_an_array(tmp_path):
    result = {"a/b": [1.0] * 64, "a": {"b": [2.0] * 64}, "a~1b": [3.0] * 64}
    assert read(write(tmp_path, made(result))).result == result


@pytest.mark.parametrize("change", [{"seconds": 9.5}, {"commit": "a" * 40}, {"libraries": {"torch": "3"}}])
def test_a_changed_field_that_is_no_result_is_found(tmp_path, change):
    file = write(tmp_path, made(LARGE))
    write_json(file, read_json(file) | change)
    with pytest.raises(ValueError, match=rf"{file}: fields were changed since it was written"):
        read(file)
    write_json(file, sealed(read_json(file)))
    found = read(file)
    assert {name: getattr(found, name) for name in change} == change


def test_all_fields_come_back(tmp_path):
    one = made(LARGE, commit="f" * 40 + "+", seconds=0.1 + 0.2)
    back = read(write(tmp_path, one))
    made_of_it = {"arrays", "seal"}
    assert back.model_dump(exclude=made_of_it) == one.model_dump(exclude=made_of_it)
    assert back.machine == MACHINE
    assert back.id == f"squares/{back.key}" == one.id


def test_a_result_without_large_arrays_leaves_none_of_a_former_one(tmp_path):
    write(tmp_path, made(LARGE))
    file = write(tmp_path, made([1.0]))
    assert read(file).result == [1.0]
    assert [path.suffix for path in file.parent.iterdir()] == [".json"]


def test_the_key_has_stage_arguments_and_inputs_but_not_the_device():
    first = key("squares", {"n": 2, "device": "cpu"}, {"adapters": ["a"]})
    assert len(first) == 20
    assert (
        key("squares", {"device": "cuda", "n": 2}, {"adapters": ["a"]})
        == first
        == key("squares", {"n": 2}, {"adapters": ["a"]})
    )
    others = [("cubes", {"n": 2}, {"adapters": ["a"]}), ("squares", {"n": 3}, {"adapters": ["a"]})]
    others += [("squares", {"n": 2}, {"adapters": ["b"]}), ("squares", {"n": 2}, {}), ("squares", {"n": "2"}, {})]
    assert len({first, *(key(*other) for other in others)}) == 1 + len(others)


def test_files_are_listed_in_order_and_nothing_else_is(tmp_path):
    files = [write(tmp_path, made(n, arguments={"n": n})) for n in range(4)]
    write(tmp_path, made(LARGE, stage="a"))
    (tmp_path / "index.json").write_text("{}")
    (tmp_path / "squares" / ".x.json.1.part").write_text("{}")
    assert paths(tmp_path)[0].parent.name == "a"
    assert paths(tmp_path)[1:] == sorted(files)


def test_another_process_that_writes_the_same_key_in_between_leaves_a_whole_result(tmp_path, monkeypatch):
    """Its arrays come after our arrays, and its JSON file before ours."""
    real, other = measurements.write_json, made([[1.0] * 100])

    def late(path, value):
        monkeypatch.setattr(measurements, "write_json", real)
        write(tmp_path, other)
        real(path, value)

    monkeypatch.setattr(measurements, "write_json", late)
    file = write(tmp_path, made([[2.0] * 100]))
    assert read(file).result == [[2.0] * 100]


# --- what is refused --------------------------------------------------------------------------------------------------


def refused(file, told):
    """Reading raises ValueError with one line that begins with the file's place and says what is wrong."""
    with pytest.raises(ValueError, match=told) as error:
        read(file)
    text = str(error.value)
    assert len(text.splitlines()) == 1
    assert str(file.with_suffix("")) in text.split(" ")[0]


@pytest.fixture
def file(tmp_path):
    """A measurement with an array of 80 numbers."""
    return write(tmp_path, made({"small": [1.5, 2.5], "large": LARGE}))


def rewritten(file, **fields):
    file.write_text(json.dumps(read_json(file) | fields), encoding="utf-8")


@pytest.mark.parametrize("name", list(Measurement.model_fields))
def test_a_missing_field_is_named(file, name):
    given = read_json(file)
    del given[name]
    file.write_text(json.dumps(given))
    refused(file, f"{name} is missing")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("version", 2),
        ("version", "1"),
        ("version", True),
        ("version", 1.0),
        ("stage", "../up"),
        ("stage", ["squares"]),
        ("arguments", []),
        ("inputs", None),
        ("code", "b" * 63),
        ("code", "B" * 64),
        ("commit", 3),
        ("libraries", {"torch": 2.13}),
        ("machine", {"cores": 2}),
        ("machine", MACHINE.model_dump() | {"cores": "2"}),
        ("machine", MACHINE.model_dump() | {"fast_bf16": 0}),
        ("machine", MACHINE.model_dump() | {"host": "x"}),
        ("seconds", "1.25"),
        ("seconds", float("nan")),
        ("digest", None),
        ("arrays", True),
        ("when", "yesterday"),
    ],
)
def test_a_field_of_another_kind_is_named(file, name, value):
    rewritten(file, **{name: value})
    refused(file, name)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is not valid JSON"),
        ('{"version"', "is not valid JSON"),
        ("[]", "should be a valid dictionary"),
        ("null", "should be a valid dictionary"),
        ("{}", "version is missing"),
    ],
)
def test_what_is_no_measurement_is_refused(file, text, told):
    file.write_text(text)
    refused(file, told)


def test_a_binary_file_is_refused(file):
    file.write_bytes(b"\xff\xfe\x00")
    refused(file, "is not valid JSON")


def test_one_changed_number_is_refused_wherever_it_is(file):
    text = file.read_text()
    file.write_text(text.replace("2.5", "2.25"))
    refused(file, "result was changed since it was written")
    file.write_text(text.replace('"n": 2', '"n": 3'))
    refused(file, "stage, arguments or inputs are those of squares/")
    file.write_text(text)
    read(file)


def test_a_changed_number_in_an_array_is_refused_even_if_its_hash_is_renewed(file):
    beside = file.with_suffix(".safetensors")
    arrays = load_file(beside)
    place = arrays["/large"][3]
    place[1] = np.nextafter(place[1], place.dtype.type(np.inf))  # the smallest change that its type can hold
    save_file(arrays, beside)
    refused(file, "not the arrays that belong to its measurement")
    rewritten(file, arrays=sha256_file(beside))
    refused(file, "result was changed since it was written")


def test_another_organism_fits_no_name(file):
    rewritten(file, inputs={"adapters": ["c" * 64]})
    refused(file, "stage, arguments or inputs are those of squares/")


def test_a_file_under_another_name_is_refused(file):
    file.with_suffix(".safetensors").rename(file.with_name("f" * 20 + ".safetensors"))
    other = file.rename(file.with_name("f" * 20 + ".json"))
    refused(other, f"those of squares/{file.stem}")


def test_nan_is_refused_in_json_and_in_arrays(file, tmp_path):
    given = read_json(file)
    for value in (math.nan, math.inf):
        rewritten(file, result=given["result"] | {"small": [value, 2.5]})
        refused(file, "not JSON compliant")
        rewritten(file, result=given["result"], arguments={"n": value})
        refused(file, "not JSON compliant")
        rewritten(file, **given)
    beside = file.with_suffix(".safetensors")
    save_file({"/large": np.full((40, 2), np.nan)}, beside)
    rewritten(file, arrays=sha256_file(beside))
    refused(file, "not JSON compliant")


@pytest.mark.parametrize("result", [math.nan, [math.inf], {"a": [0.5] * 99 + [math.nan]}], ids=str)
def test_nan_is_not_written_and_overwrites_nothing(tmp_path, result):
    file = write(tmp_path, made(LARGE))
    one = made(None)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, one.model_copy(update={"result": result}))
    assert read(file).result == LARGE


def test_a_result_under_the_digest_of_another_is_not_written(tmp_path):
    with pytest.raises(ValueError, match=r"squares/.*: the digest .* is that of another result"):
        write(tmp_path, made([1.0], digest=digest([2.0])))
    assert list(tmp_path.iterdir()) == []


def test_arrays_that_are_missing_cut_off_or_those_of_another_are_refused(file, tmp_path):
    beside = file.with_suffix(".safetensors")
    content = beside.read_bytes()
    beside.write_bytes(content[:-8])
    refused(file, "not the arrays that belong to its measurement")
    rewritten(file, arrays=sha256_file(beside))
    refused(file, "is no whole safetensors file")
    rewritten(file, arrays=sha256_text(""))
    beside.write_bytes(b"")
    refused(file, "is no whole safetensors file")
    other = write(tmp_path, made([[2.0] * 100], arguments={"n": 7}))
    shutil.copyfile(other.with_suffix(".safetensors"), beside)
    refused(file, "not the arrays that belong to its measurement")
    rewritten(file, arrays=sha256_file(beside))
    refused(file, "there is no array '/large' beside it")
    beside.unlink()
    refused(file, "safetensors is missing")


@pytest.mark.parametrize("mark", [3, None, [], {"a": 1}, "/small"], ids=str)
def test_a_mark_that_leads_to_no_array_is_refused(file, mark):
    rewritten(file, result={"small": [1.5, 2.5], "large": {"$array": mark}})
    refused(file, "there is no array")


def test_marks_without_arrays_are_refused(file):
    rewritten(file, arrays=None)
    refused(file, "result was changed since it was written")


# --- where from -------------------------------------------------------------------------------------------------------


def test_a_machine_is_described_without_its_name():
    found = measurements.machine_of({"device": "cpu", "fast_bf16": True})
    assert (found.device, found.fast_bf16) == ("cpu", True)
    assert found.cores >= 1
    assert measurements.machine_of({}).device is None


def test_the_commit_is_marked_where_files_were_changed_and_none_outside_of_a_checkout(monkeypatch):
    told = {"status": "", "rev-parse": "f" * 40 + "\n"}
    monkeypatch.setattr(measurements.subprocess, "check_output", lambda command, **_: told[command[1]])
    fresh = measurements.commit.__wrapped__
    assert fresh() == "f" * 40
    told["status"] = " M bkd_utils/__main__.py\n"
    assert fresh() == "f" * 40 + "+"
    monkeypatch.setattr(measurements.files, "CHECKOUT", False)
    assert fresh() is None


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert measurements.commit.__wrapped__() is None


def test_shipped_measurements_are_in_data_unless_the_environment_says_otherwise(monkeypatch, tmp_path):
    assert measurements.shipped_folder() is None  # so it is in all tests
    monkeypatch.setenv("BKD_SHIPPED", str(tmp_path))
    assert measurements.shipped_folder() == tmp_path
    monkeypatch.delenv("BKD_SHIPPED")
    assert measurements.shipped_folder() == measurements.files.DATA / "measurements"
