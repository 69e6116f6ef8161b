"""A stage looks for its result where it is kept, then in what ships, and measures what is in neither."""

import errno
import inspect
import json
import os
import resource
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest

from bkd_utils.common import cache, measurements
from bkd_utils.common.cache import stage
from bkd_utils.common.files import ROOT, UserError, read_json, write_json
from bkd_utils.common.results import Result

CALLS = []
ENV = {"PYTHONPATH": str(ROOT)}
HERE = {"device": "cpu", "fast_bf16": False}


def squares(upto, *, label="x"):
    CALLS.append(upto)
    return {"label": label, "squares": tuple(i * i for i in range(upto))}


squares = stage(squares, resolved=lambda arguments: {"arithmetic": HERE})


def named(name):
    CALLS.append(name)
    return name


@stage
def broken(*, x):
    return {"nan": float("nan"), "object": object()}[x]


@stage
def outer(*, fail=False):
    found = squares(upto=2)["squares"]
    if fail:
        raise ZeroDivisionError
    return found


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Where results are kept."""
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    monkeypatch.setenv("BKD_LEDGER", str(tmp_path / "ledger"))
    CALLS.clear()
    return tmp_path / "measurements"


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """The folder of what ships, with one measurement in it."""
    folder = tmp_path / "shipped"
    monkeypatch.setenv("BKD_SHIPPED", str(folder))
    with monkeypatch.context() as patch:
        patch.setenv("BKD_KEEP", str(folder))
        squares(upto=3)
    (tmp_path / "ledger").unlink()
    CALLS.clear()
    return folder


def only(folder):
    (file,) = measurements.paths(folder)
    return file


def change(file, **fields):
    """Write other values into a measurement, those of its machine among them."""
    given = read_json(file)
    for name, value in fields.items():
        table = given["machine"] if name in given["machine"] else given
        assert name in table
        table[name] = value
    write_json(file, measurements.sealed(given))


def ledger(tmp_path):
    return [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]


def hows(tmp_path):
    return [line["how"] for line in ledger(tmp_path)]


OTHER_CODE, OTHER_LIBRARIES = {"code": "0" * 64}, {"libraries": {"torch": "0"}}
OTHER_ARITHMETIC = ({"device": "cuda"}, {"fast_bf16": True})


# --- what counts as the same question ---------------------------------------------------------------------------------


def test_a_second_call_reads_the_first_ones_result(tmp_path):
    assert squares(upto=3) == squares(upto=3, label="x") == {"label": "x", "squares": [0, 1, 4]}
    assert CALLS == [3]
    assert hows(tmp_path) == ["measured here", "kept here"]


def test_other_arguments_are_another_question():
    squares(upto=3)
    squares(upto=3, label="y")
    squares(upto=4)
    assert CALLS == [3, 3, 4]


def test_an_argument_counts_by_name_however_it_is_given():
    assert squares(3) == squares(upto=3)
    assert CALLS == [3]


def test_what_a_name_stands_for_is_part_of_the_key():
    weights = {"a": 1}
    lookup = stage(named, resolved=lambda arguments: {"inputs": {"weights": weights[arguments["name"]]}})
    assert lookup("a") == lookup("a") == "a"
    assert CALLS == ["a"]
    weights["a"] = 2
    lookup("a")
    assert CALLS == ["a", "a"]


def test_code_libraries_machine_and_device_are_said_and_not_part_of_the_key(monkeypatch):
    def asked(**given):
        found = cache.question(stage(lambda device, n=1: 0, resolved=lambda _: {"arithmetic": HERE}), **given)
        return found, measurements.key(found["stage"], found["arguments"], found["inputs"])

    first, key = asked(device="cpu")
    assert first["arguments"] == {"device": "cpu", "n": 1}
    assert first["libraries"].keys() == {"torch", "transformers", "peft"}
    assert (first["machine"].device, first["machine"].fast_bf16) == ("cpu", False)
    monkeypatch.setattr(cache, "code_key", lambda module: "other")
    monkeypatch.setattr(cache, "installed_versions", lambda: {"torch": "0"})
    second, same = asked(device="auto")
    assert (second["code"], second["libraries"]) != (first["code"], first["libraries"])
    assert same == key
    assert asked(device="cpu", n=2)[1] != key


def test_the_code_is_that_of_the_module_and_of_the_function(monkeypatch):
    """One module can hold several stages."""
    seen = []
    monkeypatch.setattr(cache, "code_key", lambda module: seen.append(module.name) or "code")
    assert cache.question(squares, 1)["code"] != cache.question(outer)["code"]
    assert seen == ["test_cache.py"] * 2


def test_versions_are_without_the_names_of_builds(monkeypatch):
    monkeypatch.setattr(cache.importlib.metadata, "version", lambda name: "2.13.0+cpu")
    assert set(cache.installed_versions.__wrapped__().values()) == {"2.13.0"}


def test_arguments_and_results_that_are_no_json_are_refused(tmp_path, own_folder):
    with pytest.raises(TypeError, match=r"stage squares: argument upto = .* is not a JSON value"):
        squares(upto=tmp_path)
    with pytest.raises(TypeError, match="argument upto = nan is not a JSON value"):
        squares(upto=float("nan"))
    with pytest.raises(ValueError, match=r"stage broken: .*JSON compliant"):
        broken(x="nan")
    with pytest.raises(TypeError, match=r"stage broken: .*object is not JSON serializable"):
        broken(x="object")
    assert not own_folder.exists()
    assert not (tmp_path / "ledger").exists()


# --- the order: kept, shipped, measured -------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [OTHER_CODE, OTHER_LIBRARIES, *OTHER_ARITHMETIC], ids=str)
def test_what_was_kept_by_other_code_libraries_or_arithmetic_is_measured_again(own_folder, tmp_path, other):
    squares(upto=3)
    change(only(own_folder), **other)
    squares(upto=3)
    squares(upto=3)
    assert hows(tmp_path) == ["measured here", "measured here", "kept here"]


def test_what_was_kept_at_another_commit_or_with_more_cores_counts(own_folder, tmp_path):
    squares(upto=3)
    change(only(own_folder), commit="f" * 40, cores=99, processor="another")
    squares(upto=3)
    assert hows(tmp_path) == ["measured here", "kept here"]


def test_what_ships_is_used_wherever_it_was_measured(shipped, tmp_path, caplog):
    change(only(shipped), commit="f" * 40, seconds=99.5, device="cuda", fast_bf16=True)
    assert squares(upto=3)["squares"] == [0, 1, 4]
    (line,) = ledger(tmp_path)
    own = only(shipped)
    assert line == {"id": f"squares/{own.stem}", "how": "shipped", "commit": "f" * 40, "seconds": 99.5}
    assert CALLS == caplog.messages == []


@pytest.mark.parametrize("other", [OTHER_CODE, OTHER_LIBRARIES], ids=str)
def test_what_ships_from_other_code_is_used_and_that_is_said(shipped, tmp_path, caplog, other):
    change(only(shipped), commit="f" * 40, **other)
    assert squares(upto=3)["squares"] == [0, 1, 4]
    assert hows(tmp_path) == ["shipped, other code"]
    assert CALLS == []
    (line,) = caplog.messages
    assert f"squares/{only(shipped).stem}" in line
    assert "f" * 40 in line


def test_what_is_kept_goes_before_what_ships(shipped, own_folder, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setenv("BKD_SHIPPED", "")
        squares(upto=3)
    squares(upto=3)
    change(only(own_folder), **OTHER_CODE)
    squares(upto=3)
    assert hows(tmp_path) == ["measured here", "kept here", "shipped"]


def test_another_question_than_what_ships_is_measured_and_kept_beside_it(shipped, own_folder, tmp_path):
    before = only(shipped).read_bytes()
    squares(upto=4)
    assert hows(tmp_path) == ["measured here"]
    assert read_json(only(own_folder))["result"]["squares"] == [0, 1, 4, 9]
    assert only(shipped).read_bytes() == before


@dataclass(frozen=True)
class Form(Result):
    squares: list[int]
    mean: float


def test_a_shipped_result_that_this_code_cannot_read_is_measured_again(shipped, tmp_path, monkeypatch, caplog):
    """A field was added to the class of the result since."""
    monkeypatch.setattr(cache, "STAGES", {})
    change(only(shipped), **OTHER_CODE)

    def now(upto, *, label="x") -> Form:
        return Form([i * i for i in range(upto)], 1.5)

    now.__name__ = now.__qualname__ = "squares"
    assert stage(now)(upto=3) == Form([0, 1, 4], 1.5)
    assert hows(tmp_path) == ["measured here"]
    assert f"{only(shipped)}: " in caplog.text
    assert "Form has other fields (missing: mean; unknown: label)" in caplog.text


@pytest.mark.parametrize("folder", ["kept", "shipped"])
def test_in_a_replay_nothing_is_measured(own_folder, shipped, tmp_path, monkeypatch, folder):
    if folder == "kept":
        monkeypatch.setenv("BKD_SHIPPED", "")
        squares(upto=3)
        CALLS.clear()
    monkeypatch.setenv("BKD_REPLAY", "1")
    assert squares(upto=3)["squares"] == [0, 1, 4]
    with pytest.raises(UserError, match=r'no measurement of squares ships for {"label":"x","upto":4}') as told:
        squares(upto=4)
    assert len(str(told.value).splitlines()) == 1
    assert CALLS == []
    assert hows(tmp_path)[-1] == {"kept": "kept here", "shipped": "shipped"}[folder]


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_results_that_a_stage_asks_for_itself_are_not_noted(tmp_path, own_folder):
    with pytest.raises(ZeroDivisionError):
        outer(fail=True)
    assert not (tmp_path / "ledger").exists()
    assert outer() == [0, 1]
    squares(upto=2)
    assert [line["id"].split("/")[0] for line in ledger(tmp_path)] == ["outer", "squares"]
    assert hows(tmp_path) == ["measured here", "kept here"]
    assert CALLS == [2]
    assert {file.parent.name for file in measurements.paths(own_folder)} == {"outer", "squares"}


def test_without_a_ledger_none_is_written(tmp_path, monkeypatch):
    monkeypatch.delenv("BKD_LEDGER")
    squares(upto=3)
    assert sorted(os.listdir(tmp_path)) == ["measurements"]


def test_what_was_measured_is_said(caplog):
    caplog.set_level("INFO")
    squares(upto=3)
    squares(upto=3)
    assert caplog.messages == ["squares: measured in 0.0 s"]


def test_stages_are_known_by_name():
    assert cache.STAGES["outer"] is outer
    assert list(inspect.signature(outer).parameters) == ["fail"]


# --- damage, disks and processes --------------------------------------------------------------------------------------


def test_a_damaged_kept_file_is_put_aside_and_measured_again(own_folder, caplog):
    squares(upto=3)
    file = only(own_folder)
    file.write_text('{"result"')
    assert squares(upto=3)["squares"] == [0, 1, 4]
    assert CALLS == [3, 3]
    assert f"{file} is not valid JSON" in caplog.text
    assert file.with_suffix(".damaged").read_text() == '{"result"'
    assert squares(upto=3)["squares"] == [0, 1, 4]
    assert CALLS == [3, 3]


def test_a_damaged_shipped_file_is_an_error_and_left_alone(shipped, own_folder):
    file = only(shipped)
    file.write_text(file.read_text().replace("4", "5"))
    before = file.read_bytes()
    with pytest.raises(ValueError, match="result was changed since it was written") as told:
        squares(upto=3)
    assert str(told.value).startswith(f"{file}: ")
    assert (file.read_bytes(), CALLS, own_folder.exists()) == (before, [], False)


def test_a_kept_result_that_cannot_be_read_or_moved_is_measured_again(monkeypatch, own_folder):
    squares(upto=3)

    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(measurements, "read", refuse)
    monkeypatch.setattr(cache.os, "replace", refuse)
    assert squares(upto=3)["squares"] == [0, 1, 4]
    assert CALLS == [3, 3]


@pytest.mark.parametrize("upto", [3, 300], ids=["no array", "an array"])
def test_where_nothing_can_be_written_the_result_comes_back_with_a_warning(tmp_path, monkeypatch, caplog, upto):
    monkeypatch.setenv("BKD_WORK", str(tmp_path / "file"))
    (tmp_path / "file").touch()  # where the folder would be
    assert len(squares(upto=upto)["squares"]) == upto
    (line,) = [message for message in caplog.messages if "could not be kept" in message]
    assert line.startswith("squares/")
    assert [upto] == CALLS
    assert hows(tmp_path) == ["measured here"]


@pytest.mark.parametrize("upto", [3, 300], ids=["no array", "an array"])
def test_on_a_full_disk_the_result_comes_back_and_no_part_of_a_file_stays(own_folder, monkeypatch, caplog, upto):
    """A limit on the size of files, which the system enforces in this process, stands for the disk."""
    monkeypatch.delenv("BKD_LEDGER")
    folder = own_folder / "squares"
    folder.mkdir(parents=True)
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), 64
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        found = squares(upto=upto)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(found["squares"]) == upto
    assert "could not be kept: File too large" in caplog.text
    assert list(folder.iterdir()) == []


SLOW = """
import os, sys, time
from bkd_utils.common import measurements
from bkd_utils.common.cache import stage

@stage
def slow(*, x):
    time.sleep(0.5)
    return {"x": x, "who": [float(sys.argv[1])] * 100_000}

if len(sys.argv) > 2:  # killed when the arrays are there and the JSON file is not
    measurements.write_json = lambda *_: os.kill(os.getpid(), 9)
print(sum(slow(x=1)["who"]))
"""


@pytest.fixture
def slow(tmp_path):
    """A process that asks for the stage above."""
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    command, how = [sys.executable, str(script)], {"cwd": ROOT, "stdout": subprocess.PIPE, "text": True}
    return lambda *arguments: subprocess.Popen([*command, *arguments], env=os.environ | ENV, **how)


def test_two_processes_that_measure_the_same_leave_one_whole_result(slow, own_folder):
    both = [slow(number) for number in "12"]
    assert [process.communicate(timeout=300)[0] for process in both] == ["100000.0\n", "200000.0\n"]
    assert measurements.read(only(own_folder)).result["who"][0] in (1.0, 2.0)
    assert len(list(own_folder.glob("slow/*"))) == 2


def test_after_a_kill_between_arrays_and_json_the_same_call_measures_again(slow, own_folder, tmp_path):
    killed = slow("1", "die")
    assert killed.wait(timeout=300) == -signal.SIGKILL
    assert [file.suffix for file in own_folder.glob("slow/*")] == [".safetensors"]
    assert slow("2").communicate(timeout=300)[0] == "200000.0\n"
    assert measurements.read(only(own_folder)).result["who"][0] == 2.0
    assert hows(tmp_path) == ["measured here"]


def test_a_result_killed_while_it_replaced_one_of_other_code_is_no_result(slow, own_folder, tmp_path):
    """The arrays are new and the JSON file is old."""
    assert slow("1").wait(timeout=300) == 0
    change(only(own_folder), **OTHER_CODE)
    assert slow("2", "die").wait(timeout=300) == -signal.SIGKILL
    assert slow("3").communicate(timeout=300)[0] == "300000.0\n"
    assert hows(tmp_path) == ["measured here", "measured here"]
