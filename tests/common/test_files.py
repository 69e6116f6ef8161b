"""Files are written completely or not at all."""

import errno
import os
import subprocess
import sys

import pytest

from bkd_utils.common import files
from bkd_utils.common.files import (
    ROOT,
    UserError,
    atomic_path,
    canonical_json,
    check_writable,
    keep_json,
    read_json,
    write_json,
)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_write_keeps_the_old_file_and_leaves_nothing(tmp_path, error):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail_halfway():
        with atomic_path(target) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail_halfway()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_replaces_a_folder_that_has_content(tmp_path):
    target = tmp_path / "d"
    target.mkdir()
    (target / "old").write_text("1")
    with atomic_path(target) as temporary:
        temporary.mkdir()
        (temporary / "new").write_text("2")
    assert os.listdir(target) == ["new"]
    assert os.listdir(tmp_path) == ["d"]


def test_nan_is_refused_and_writes_nothing(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert os.listdir(tmp_path) == []


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not valid JSON"):
        read_json(tmp_path / "a.json")


def test_canonical_json_does_not_depend_on_the_order_of_keys():
    assert canonical_json({"b": 1, "a": [2]}) == canonical_json({"a": [2], "b": 1}) == '{"a":[2],"b":1}'


def in_another_process(code, **environment):
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        cwd=environment.get("PWD"),
    )
    return told.stdout.strip() + told.stderr.strip()


@pytest.mark.parametrize("name", ["BKD_WORK", "BKD_ASSETS"])
def test_a_relative_folder_of_work_stays_where_it_was_in_kernels_that_run_elsewhere(tmp_path, name):
    code = (
        f"import os; from bkd_utils.common import files; os.chdir('/'); print(files.{name[4:]}, os.environ['{name}'])"
    )
    where = str(tmp_path / "a b")
    assert in_another_process(code, PWD=str(tmp_path), **{name: "a b"}) == f"{where} {where}"
    home = in_another_process(code, HOME=str(tmp_path), **{name: "~/x"})
    assert home == f"{tmp_path / 'x'} {tmp_path / 'x'}"


def test_an_empty_setting_is_none():
    code = "from bkd_utils.common import files; print(files.WORK == files.ROOT / 'work')"
    assert in_another_process(code, BKD_WORK="") == "True"


def test_a_folder_that_can_be_written_to_is_made_and_left_empty(tmp_path):
    folder = tmp_path / "new parent" / "a b"
    check_writable(folder, tmp_path)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=f"cannot write to {folder}: ") as caught:
            check_writable(folder)
        assert len(str(caught.value).splitlines()) == 1

    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match="Read-only file system"):
        check_writable(tmp_path)


def test_what_can_be_computed_again_is_kept_if_possible_and_otherwise_warned_of(tmp_path, caplog):
    keep_json(tmp_path / "a.json", [1])
    assert read_json(tmp_path / "a.json") == [1]
    keep_json(tmp_path / "a.json" / "b.json", [2])
    (line,) = caplog.messages
    assert "b.json could not be kept: " in line
    with pytest.raises(ValueError, match="JSON compliant"):
        keep_json(tmp_path / "c.json", float("nan"))
