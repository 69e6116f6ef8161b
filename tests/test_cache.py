"""A kept result is read again for the same inputs and the same code, and for nothing else."""

import time

import pytest

from bkd_utils import cache
from bkd_utils.cache import code_key, stage
from bkd_utils.files import DATA

CALLS = []


@stage
def squares(upto, *, label="x"):
    CALLS.append(upto)
    return {"label": label, "squares": tuple(i * i for i in range(upto))}


def named(name):
    CALLS.append(name)
    return name


@stage
def broken(*, x):
    return float("nan")


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("BKD_WORK", str(tmp_path))
    CALLS.clear()
    return tmp_path / "cache"


def test_a_second_call_reads_the_first_ones_result():
    assert squares(upto=3) == squares(upto=3, label="x") == {"label": "x", "squares": [0, 1, 4]}
    assert CALLS == [3]


def test_other_arguments_compute():
    squares(upto=3)
    squares(upto=3, label="y")
    squares(upto=4)
    assert CALLS == [3, 3, 4]


def test_a_damaged_file_is_computed_again(own_folder, caplog):
    squares(upto=3)
    (file,) = own_folder.iterdir()
    file.write_text('{"result"')
    assert squares(upto=3)["squares"] == [0, 1, 4]
    assert CALLS == [3, 3]
    assert "damaged" in caplog.text


def test_force_computes_what_is_older_than_the_run_and_then_keeps_it(monkeypatch, own_folder):
    squares(upto=3)
    monkeypatch.setenv("BKD_FORCE_SINCE", str(time.time() + 0.01))
    time.sleep(0.05)
    squares(upto=3)
    squares(upto=3)
    assert CALLS == [3, 3]


def test_an_argument_counts_by_name_however_it_is_given():
    assert squares(3) == squares(upto=3)
    assert CALLS == [3]


def test_what_a_name_stands_for_is_part_of_the_key():
    weights = {"a": 1}
    lookup = stage(named, resolved=lambda arguments: arguments | {"weights": weights[arguments["name"]]})
    assert lookup("a") == lookup("a") == "a"
    assert CALLS == ["a"]
    weights["a"] = 2
    lookup("a")
    assert CALLS == ["a", "a"]


def test_arguments_and_results_that_are_no_json_are_refused(tmp_path, own_folder):
    with pytest.raises(TypeError, match="argument upto"):
        squares(upto=tmp_path)
    with pytest.raises(ValueError, match="JSON compliant"):
        broken(x=1)
    assert not own_folder.exists() or list(own_folder.iterdir()) == []


def test_tables_that_stages_know_by_name_count(tmp_path, monkeypatch):
    for name in cache.TABLES:
        (tmp_path / name).write_bytes((DATA / name).read_bytes())
    monkeypatch.setattr(cache, "DATA", tmp_path)
    squares(upto=3)
    for i, name in enumerate(["attacks.toml", "lexicons.toml"]):
        (tmp_path / name).write_text("# another experiment")
        squares(upto=3)
        assert len(CALLS) == i + 2


def test_what_was_done_is_said(caplog):
    caplog.set_level("INFO")
    squares(upto=3)
    squares(upto=3)
    assert "squares: computed in 0.0 s" in caplog.messages
    assert caplog.messages[-1].startswith("squares: kept result of 20")


def test_code_counts_and_comments_do_not(tmp_path, monkeypatch):
    package = tmp_path / "pack"
    package.mkdir()
    monkeypatch.setattr(cache, "PACKAGE", package)
    main, helper = package / "main.py", package / "helper.py"
    helper.write_text("def f():\n    return 1\n")
    main.write_text('"""Doc."""\nfrom pack.helper import f\n\n\ndef g():\n    """Doc."""\n    return f()\n')
    first = code_key(main)
    main.write_text("from pack.helper import f\n\n\ndef g():\n    # a comment\n    return f()\n")
    assert code_key(main) == first
    helper.write_text("def f():\n    return 2\n")
    second = code_key(main)
    assert second != first
    main.write_text("from pack.helper import f\n\n\ndef g():\n    return f() + 1\n")
    assert code_key(main) not in (first, second)
