"""What people write is checked once, and every error is one line that says what is allowed."""

import os
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from patching import everywhere

from bkd_utils.common import validation
from bkd_utils.common.validation import (
    Count,
    Name,
    Seed,
    Text,
    check,
    check_shape,
    read_tables,
    read_toml,
    while_unchanged,
)


@pytest.mark.parametrize("value", ["a", "sentiment-word", "A_1.b", "x" * 80, "0"])
def test_a_name_is_a_name(value):
    check(Name, value, "name")


@pytest.mark.parametrize(
    "value", ["", ".", "..", ".a", "-a", "a/b", "/a", "../a", "a\\b", "a b", "a\n", "\u00e9t\u00e9", "x" * 81, 3, None]
)
def test_what_would_be_another_path_or_an_option_is_no_name(value):
    with pytest.raises(ValueError, match=r"^name: ") as caught:
        check(Name, value, "name")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Seed, -1),
        (Seed, 2**32),
        (Seed, True),
        (Seed, 1.0),
        (Seed, "1"),
        (Seed, None),
        (Count, 0),
        (Count, -3),
        (Count, 2.5),
        (Count, "many"),
        (Count, False),
        (Text, " "),
        (Text, "cf "),
        (Text, "\n"),
    ],
)
def test_a_value_out_of_bounds_is_shown_with_what_is_allowed(kind, value):
    with pytest.raises(ValueError, match=rf"^it: {value!r}: ".replace("\\", "\\\\")):
        check(kind, value, "it")


@dataclass(frozen=True)
class Box:
    name: Name
    size: Count
    note: Text | None = None


def test_a_long_value_is_cut_and_a_newline_in_it_stays_one_line():
    with pytest.raises(ValueError, match=r"box: size = .{57}\.\.\.: input should") as caught:
        check(Box, {"name": "a", "size": "line\n" * 50}, "box")
    assert len(str(caught.value).splitlines()) == 1


def test_a_table_is_read_anew_after_an_edit_and_not_before(tmp_path, monkeypatch):
    everywhere(monkeypatch, "DATA", tmp_path)
    path, calls = tmp_path / "t.toml", []

    @while_unchanged("t.toml")
    def value():
        calls.append(1)
        return read_toml(path)["a"]["b"]

    path.write_text("[a]\nb = 1")
    assert [value(), value(), len(calls)] == [1, 1, 1]
    before = path.stat()
    path.write_text("[a]\nb = 2")  # of the same length
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert [value(), value(), len(calls)] == [2, 2, 2]
    other = tmp_path / "other"
    other.write_text("[a]\nb = 3")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    os.replace(other, path)  # of the same length and time
    assert value() == 3
    path.unlink()
    with pytest.raises(ValueError, match=r"t.toml cannot be read: No such file"):
        value()


@pytest.mark.parametrize("data", [b"\xff\xfea", b"a = '\xe9'", b"[a]\n[a]", b"a =", b"a = 1\na = 2", b"\0"])
def test_a_file_that_is_no_toml_is_named(tmp_path, data):
    (tmp_path / "t.toml").write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.toml") as caught:
        read_tables(tmp_path / "t.toml")
    assert len(str(caught.value).splitlines()) == 1


def test_a_folder_in_the_place_of_a_table_is_named(tmp_path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        read_tables(tmp_path)


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_a_shape_is_held_to_its_axes(make):
    check_shape("means", make((2, 3)), layer=2, head=None)
    for shape in [(3, 2), (2,), (2, 3, 1), (2, 0)]:
        with pytest.raises(ValueError, match=r"^means must have the shape \[2 layer, head\], not \["):
            check_shape("means", make(shape), layer=2, head=None)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="means has values that are not finite"):
            check_shape("means", make((2, 3)) + value, layer=2, head=3)


def test_the_tables_of_a_checked_kind_keep_their_heading(tmp_path):
    path = tmp_path / "boxes.toml"
    path.write_text('[one]\nsize = 3\n[two]\nsize = 4\nnote = "x"')
    made = {name: validation.build(Box, table, path, name) for name, table in read_tables(path).items()}
    assert made == {"one": Box("one", 3), "two": Box("two", 4, "x")}
