"""A kept result is read again for the same inputs and the same code, and for nothing else."""

import ast
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from bkd_utils.common import cache
from bkd_utils.common.cache import code_key, stage
from bkd_utils.common.files import DATA, ROOT, read_json

CALLS = []
ENV = {"PYTHONPATH": str(ROOT)}


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


def test_a_damaged_file_is_kept_aside_and_computed_again(own_folder, caplog):
    squares(upto=3)
    (file,) = own_folder.iterdir()
    file.write_text('{"result"')
    assert squares(upto=3)["squares"] == [0, 1, 4]
    assert CALLS == [3, 3]
    assert f"{file} is damaged" in caplog.text
    assert file.with_suffix(".damaged").read_text() == '{"result"'


def test_other_libraries_compute(monkeypatch):
    assert cache.installed_versions().keys() == {"torch", "transformers", "peft"}
    squares(upto=3)
    monkeypatch.setattr(cache, "installed_versions", lambda: {"torch": "0"})
    squares(upto=3)
    assert CALLS == [3, 3]


SLOW = """
import sys, time
from bkd_utils.common.cache import stage

@stage
def slow(*, x):
    time.sleep(0.5)
    return {"x": x, "who": sys.argv[1] * 100_000}

slow(x=1)
"""


def test_two_processes_that_compute_the_same_key_leave_one_whole_result(tmp_path, own_folder):
    script = tmp_path / "slow.py"
    script.write_text(SLOW)
    both = [subprocess.Popen([sys.executable, str(script), who], cwd=ROOT, env=os.environ | ENV) for who in "ab"]
    assert [process.wait(timeout=60) for process in both] == [0, 0]
    (file,) = own_folder.iterdir()
    assert read_json(file)["result"]["who"] in ("a" * 100_000, "b" * 100_000)


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
    for i, name in enumerate(["attacks.toml", "lexicons.toml", "surrogates.toml"]):
        (tmp_path / name).write_text("# another experiment")
        squares(upto=3)
        assert len(CALLS) == i + 2


def names_of(tree):
    """Name -> what a module defines by it or imports of the package by it: a node, or (module, name or None)."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {ast.unparse(target): node for target in targets}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bkd_utils":
            _, _, module = node.module.partition(".")
            for one in node.names:
                leaf = cache.PACKAGE.joinpath(*module.split("."), f"{one.name}.py").is_file()
                found[one.asname or one.name] = (f"{module}.{one.name}", None) if leaf else (module, one.name)
    return found


def dotted(path):
    return ".".join(path.relative_to(cache.PACKAGE).with_suffix("").parts)


def code_of_stages():
    """(module, name) -> definition, of all that a stage of the package may run, found from the names in its code."""
    known = {
        dotted(path): names_of(ast.parse(path.read_text(encoding="utf-8"))) for path in cache.PACKAGE.rglob("*.py")
    }
    waiting = [
        (module, name)
        for module, names in known.items()
        for name, node in names.items()
        if any("stage" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", []))
    ]
    found = {}
    while waiting:
        module, name = waiting.pop()
        node = known.get(module, {}).get(name)
        if isinstance(node, tuple):
            waiting.append(node)
        elif node is not None and (module, name) not in found:
            found[module, name] = node
            for inside in ast.walk(node):
                if isinstance(inside, ast.Name):
                    waiting.append((module, inside.id))
                elif isinstance(inside, ast.Attribute) and isinstance(inside.value, ast.Name):
                    of = known[module].get(inside.value.id)
                    waiting += [(of[0], inside.attr)] if isinstance(of, tuple) else []
    return found


def test_tables_are_those_that_a_stage_can_open():
    """So recipes, profiles and published numbers may stay out: they reach stages as arguments, if at all."""
    code = code_of_stages()
    expected = {("organisms.evaluation", "measure"), ("organisms.attacks", "Attack"), ("organisms.triggers", "Syntax")}
    assert expected <= code.keys()
    nodes = [inside for node in code.values() for inside in ast.walk(node)]
    strings = {node.value for node in nodes if isinstance(node, ast.Constant)}
    tables = {path.name for path in DATA.glob("*.toml")}
    assert {"recipes.toml", "surrogates.toml"} <= tables
    assert strings & tables == set(cache.TABLES)


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


@pytest.fixture
def nested(tmp_path, monkeypatch):
    """A package with a folder, a module of the same name in two places, and a folder that re-exports."""
    package = tmp_path / "pack"
    for name, text in {
        "__init__.py": "",
        "same.py": "X = 1\n",
        "one/__init__.py": "from pack.one.inner import f\n",
        "one/inner.py": "from pack.one.same import X\n\n\ndef f():\n    return X\n",
        "one/same.py": "X = 2\n",
    }.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    monkeypatch.setattr(cache, "PACKAGE", package)
    return package


@pytest.mark.parametrize(
    "line",
    [
        "from pack.one.inner import f",
        "from pack.one import inner",
        "from pack.one import f",
        "import pack.one.inner",
        "from .one.inner import f",
        "from .one import inner",
        "from . import one",
    ],
)
def test_modules_in_folders_count_however_they_are_imported(nested, line):
    main = nested / "main.py"
    main.write_text(line + "\n")
    first = code_key(main)
    (nested / "same.py").write_text("X = 3\n")
    assert code_key(main) == first  # another module of that name, which nobody imports
    (nested / "one" / "same.py").write_text("X = 3\n")
    assert code_key(main) != first


@pytest.mark.parametrize("line", ["from pack import gone", "from pack.one.gone import f", "import pack.gone"])
def test_an_import_that_leads_nowhere_is_an_error_and_not_left_out_of_the_key(nested, line):
    main = nested / "main.py"
    main.write_text("X = 1\n" + line + "\n")
    with pytest.raises(ImportError, match=r"main.py, line 2: pack.*gone.* is no module of this package"):
        code_key(main)


def test_a_result_that_cannot_be_written_is_returned_with_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BKD_WORK", str(tmp_path / "file"))
    (tmp_path / "file").touch()  # where the folder would be
    assert squares(upto=3) == {"label": "x", "squares": [0, 1, 4]}
    (line,) = [message for message in caplog.messages if "could not be kept" in message]
    assert "squares-" in line
    assert CALLS == [3]


def test_on_a_full_disk_the_result_comes_back_and_no_part_of_a_file_stays(own_folder):
    """A limit on the size of files, which the system enforces in this process, stands for the disk."""
    own_folder.mkdir()
    before, size = resource.getrlimit(resource.RLIMIT_FSIZE), 64
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        found = squares(upto=300)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(found["squares"]) == 300
    assert list(own_folder.iterdir()) == []


def test_a_kept_result_that_cannot_be_read_or_moved_is_computed_again(monkeypatch, own_folder, caplog):
    squares(upto=3)

    def refuse(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cache, "read_json", refuse)
    monkeypatch.setattr(cache.os, "replace", refuse)
    monkeypatch.setattr(cache, "keep_json", lambda *_: None)
    assert squares(upto=3)["squares"] == [0, 1, 4]
    assert CALLS == [3, 3]
