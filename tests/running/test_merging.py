"""Merging: checked before anything is written, two results of one key refused, the same bytes after a kill."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import toy_stages as toys
from safetensors.numpy import load_file, save_file

from bkd_utils.common.files import ROOT, UserError, sha256_file
from bkd_utils.common.measurements import digest, read
from bkd_utils.running.merging import merge


@pytest.fixture(autouse=True)
def _toys():
    with toys.known():
        yield


@pytest.fixture
def parts(tmp_path):
    """Two folders that share one measurement, and where they go."""
    one, two = tmp_path / "one", tmp_path / "two"
    for folder, numbers in ((one, (1, 2, 3)), (two, (3, 4))):
        for x in numbers:
            toys.measure(folder, x=x, changed={"seconds": float(len(folder.name) * x)})
    toys.change(toys.measure(two, x=3), commit="0" * 40)
    return one, two, tmp_path / "all"


def other_result(folder, *, x, square):
    """Another result of the same call, as a machine with other arithmetic would have it, whole in itself."""
    path = toys.measure(folder, x=x)
    one = read(path)
    result = one.result | {"square": square}
    toys.change(path, digest=digest(result), result=json.loads(path.read_text())["result"] | {"square": square})
    return path


def test_everything_is_copied_once_and_the_first_of_equals_counts(parts):
    one, two, into = parts
    assert merge([one, two], into=into) == (4, 0)
    assert toys.tree(into) == toys.tree(two) | toys.tree(one)
    assert merge([two, one], into=into) == (0, 4)
    assert toys.tree(into) == toys.tree(two) | toys.tree(one)


def test_what_is_in_the_target_stays(parts):
    one, two, into = parts
    path = toys.measure(into, x=3, changed={"commit": "1" * 40})
    before = path.read_bytes()
    assert merge([one, two], into=into) == (3, 1)
    assert path.read_bytes() == before


def test_two_results_of_one_key_are_refused_with_key_files_place_and_values(parts):
    one, two, into = parts
    other = other_result(two, x=3, square=10)
    first = one / other.relative_to(two)
    with pytest.raises(UserError) as raised:
        merge([one, two], into=into)
    assert str(raised.value) == (
        f"two results of {read(other).id}: {first} and {other} differ at square: 9 and 10; nothing was merged"
    )
    assert not into.exists()


def test_a_result_that_the_target_has_otherwise_is_refused(parts):
    one, _, into = parts
    there = other_result(into, x=2, square=5)
    before = toys.tree(into)
    with pytest.raises(UserError, match=f"and {there} differ at square: 4 and 5"):
        merge([one], into=into)
    assert toys.tree(into) == before


def truncate(path):
    path.write_bytes(path.read_bytes()[:-30])


def other_arrays(path):
    arrays = path.with_suffix(".safetensors")
    save_file({name: np.zeros_like(array) for name, array in load_file(arrays).items()}, arrays)


def other_arrays_with_their_hash(path):
    other_arrays(path)
    toys.change(path, arrays=sha256_file(path.with_suffix(".safetensors")))


DAMAGED = {
    "a file that was cut off": (truncate, "is not valid JSON"),
    "a wrong schema": (lambda path: toys.change(path, seconds="long"), "seconds = 'long'"),
    "a field too many": (lambda path: toys.change(path, colour="red"), "colour"),
    "NaN": (lambda path: path.write_text(path.read_text().replace('"square": 9', '"square": NaN')), "not finite"),
    "a changed number": (lambda path: path.write_text(path.read_text().replace(": 9", ": 8")), "was changed"),
    "arrays cut off": (lambda path: truncate(path.with_suffix(".safetensors")), "cut off"),
    "arrays gone": (lambda path: path.with_suffix(".safetensors").unlink(), "is missing"),
    "other arrays": (other_arrays, "not the arrays"),
    "other arrays, hash and all": (other_arrays_with_their_hash, "was changed"),
    "another organism": (lambda path: toys.change(path, inputs={"organism": "7"}), "are those of"),
    "another name": (lambda path: path.rename(path.with_name("0.json")), "0.safetensors is missing"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_is_one_line_that_names_it_and_nothing_is_written(kind, parts):
    one, two, into = parts
    damage, told = DAMAGED[kind]
    path = toys.measure(two, x=3)
    damage(path)
    with pytest.raises(ValueError, match=told) as raised:
        merge([one, two], into=into)
    assert str(two) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not into.exists()


def test_a_damaged_file_in_the_target_is_not_written_over(parts):
    one, _, into = parts
    truncate(toys.measure(into, x=3))
    before = toys.tree(into)
    with pytest.raises(ValueError, match=f"^{into}"):
        merge([one], into=into)
    assert toys.tree(into) == before


def test_a_folder_that_is_missing_or_empty_is_an_error(parts):
    one, _, into = parts
    with pytest.raises(UserError, match=f"^{one / 'none'} is no folder$"):
        merge([one, one / "none"], into=into)
    (one / "none").mkdir()
    with pytest.raises(UserError, match=f"^{one / 'none'} holds no measurements$"):
        merge([one, one / "none"], into=into)
    assert not into.exists()


@pytest.mark.parametrize(
    ("square", "told"),
    [
        (9.0, "square: 9 and 9.0"),  # as their texts differ
        (False, "square: 9 and false"),
        ([9, 1], "square: 9 and nothing"),
        ({"of": {"a": "x" * 100}}, "square: 9 and nothing"),
    ],
)
def test_a_difference_is_told_with_its_place_and_both_values(parts, square, told):
    one, two, into = parts
    other_result(two, x=3, square=square)
    with pytest.raises(UserError, match=f"differ at {told}; nothing was merged"):
        merge([one, two], into=into)


def test_parts_that_are_empty_in_different_ways_differ(parts):
    one, two, into = parts
    other_result(one, x=3, square=[])
    other_result(two, x=3, square={})
    with pytest.raises(UserError, match="differ at a part that is empty: nothing and nothing; nothing was merged"):
        merge([one, two], into=into)


SCRIPT = """
import os, signal, sys
from pathlib import Path
from bkd_utils.running import merging

replace, left = os.replace, int(sys.argv[1])

def dying(source, target):
    global left
    left -= 1
    if left:
        return replace(source, target)
    Path(source).write_bytes(Path(source).read_bytes()[:40])
    os.kill(os.getpid(), signal.SIGKILL)

os.replace = dying
print(merging.merge([Path(each) for each in sys.argv[3:]], into=Path(sys.argv[2])))
"""


def test_killed_at_any_file_the_same_command_again_gives_the_same_bytes(parts):
    one, two, into = parts
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number in (1, 4):  # in the arrays of the first, and in the JSON of the second
        command = [sys.executable, "-c", SCRIPT, str(number), str(into), str(one), str(two)]
        assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -9
        assert any(path.endswith(".part") for path in toys.tree(into))
    assert merge([one, two], into=into) == (3, 1)
    assert toys.tree(into) == toys.tree(two) | toys.tree(one)
