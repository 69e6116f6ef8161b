"""The key of the code: what changes a result changes it, what only moves or explains code does not."""

import ast
import os

import pytest

from bkd_utils.common import code_key as module
from bkd_utils.common.code_key import code_key

# A stage's module, what it takes from others, and what these take in turn.
FILES = {
    "__init__.py": "",
    "main.py": (
        '"""Doc."""\n\nfrom pack.helper import f\nfrom pack.low.deep import LIMIT\n\n\n'
        'def g(x):\n    """Doc."""\n    return f(x) + LIMIT\n'
    ),
    "helper.py": "from pack.low.deep import scale\n\n\ndef f(x):\n    return scale(x)\n",
    "low/__init__.py": "",
    "low/deep.py": "LIMIT = 10\n\n\ndef scale(x):\n    return 2 * x\n",
    "unused.py": "X = 1\n",
}


class Package:
    """A package of a few files, and the key of its module `main`."""

    def __init__(self, folder):
        self.folder, self.written = folder, 0
        for name, text in FILES.items():
            self.write(name, text)

    def write(self, name, text):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        self.written += 1  # a time of its own for every version, whatever the clock of the disk can tell apart
        os.utime(path, (self.written, self.written))

    def edit(self, name, old, new):
        text = (self.folder / name).read_text(encoding="utf-8")
        assert text.count(old) == 1, (name, old)
        self.write(name, text.replace(old, new))

    def move(self, old, new):
        text = (self.folder / old).read_text(encoding="utf-8")
        (self.folder / old).unlink()
        self.write(new, text)

    def key(self, name="main.py"):
        return code_key(self.folder / name)


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "PACKAGE", tmp_path / "pack")
    return Package(tmp_path / "pack")


def nothing(package):
    package.edit("main.py", '"""Doc."""\n\nfrom', "from")
    package.edit("main.py", '    """Doc."""\n', "    # a comment\n")
    package.edit("main.py", "f(x) + LIMIT", "(f(x)\n            + LIMIT)")
    package.edit("low/deep.py", "def scale(x):\n", 'def scale(x):\n    """What it does."""\n')
    package.edit("low/deep.py", "LIMIT = 10\n", '"""A module."""\n\nLIMIT = 10\n')


def moved(package):
    """As a formatter leaves it: the moved module's import stands in another place of the sorted list."""
    package.move("helper.py", "upper/helper.py")
    first, second = "from pack.helper import f\n", "from pack.low.deep import LIMIT\n"
    package.edit("main.py", first + second, second + "from pack.upper.helper import f\n")


def renamed(package):
    package.move("low/deep.py", "low/shallow.py")
    for name in ("main.py", "helper.py"):
        package.edit(name, "pack.low.deep", "pack.low.shallow")


def relative(package):
    package.edit("main.py", "from pack.helper", "from .helper")
    package.edit("main.py", "from pack.low.deep", "from .low.deep")


def in_a_function(package):
    package.edit("main.py", "from pack.helper import f\n", "")
    package.edit("main.py", "    return", "    from pack.helper import f\n\n    return")


def beside(package):
    package.edit("unused.py", "1", "2")
    package.write("low/more.py", "Y = 3\n")


@pytest.mark.parametrize("change", [nothing, moved, renamed, relative, in_a_function, beside])
def test_what_only_explains_or_moves_code_changes_nothing(package, change):
    before = package.key()
    change(package)
    assert package.key() == before


def test_a_module_that_was_moved_with_its_stage_keeps_its_key(package):
    before = package.key()
    package.move("main.py", "low/main.py")
    assert package.key("low/main.py") == before


@pytest.mark.parametrize(
    "edit",
    [
        ("main.py", "f(x) + LIMIT", "f(x) - LIMIT"),
        ("helper.py", "scale(x)", "scale(-x)"),
        ("low/deep.py", "LIMIT = 10", "LIMIT = 11"),
        ("low/deep.py", "2 * x", "3 * x"),
        ("low/deep.py", "2 * x", "2.0 * x"),
        ("low/deep.py", "2 * x", "x if x else None"),
        ("low/deep.py", "def scale(x):", "def scale(x=None):"),
        ("low/deep.py", "    return", "    if not x:\n        return\n    return"),
        ("main.py", '    """Doc."""\n', '    """Doc."""\n    """Doc."""\n'),
    ],
)
def test_a_changed_line_changes_the_key_wherever_it_is(package, edit):
    before = package.key()
    package.edit(*edit)
    assert package.key() != before


def test_a_name_that_is_taken_from_another_module_changes_the_key(package):
    """Both modules are read in any case, and both have the name."""
    package.write("low/other.py", "LIMIT = 12\n")
    package.edit("helper.py", "from pack", "from pack.low.other import LIMIT as MORE\nfrom pack")
    before = package.key()
    package.edit("main.py", "pack.low.deep", "pack.low.other")
    second = package.key()
    assert second != before
    package.edit("main.py", "import LIMIT", "import LIMIT as f, LIMIT")
    assert package.key() != second


def test_another_name_from_the_same_module_under_the_same_name_changes_the_key(package):
    package.edit("low/deep.py", "LIMIT = 10\n", "LIMIT = 10\nMORE = 12\n")
    before = package.key()
    package.edit("main.py", "import LIMIT", "import MORE as LIMIT")
    assert package.key() != before


def test_other_versions_of_python_give_the_same_key(package, monkeypatch):
    """Since 3.12 functions and classes have a field more in their trees."""
    before = package.key()
    for node in (ast.FunctionDef, ast.ClassDef):
        if "type_params" not in node._fields:
            monkeypatch.setattr(node, "_fields", (*node._fields, "type_params"))
            monkeypatch.setattr(node, "type_params", [], raising=False)
    module._parsed.cache_clear()
    assert package.key() == before


@pytest.fixture
def nested(package):
    """A module of the same name in two places, and a folder that re-exports."""
    for name, text in {
        "same.py": "X = 1\n",
        "one/__init__.py": "from pack.one.inner import f\n",
        "one/inner.py": "from pack.one.same import X\n\n\ndef f():\n    return X\n",
        "one/same.py": "X = 2\n",
    }.items():
        package.write(name, text)
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
    nested.write("main.py", line + "\n")
    first = nested.key()
    nested.write("same.py", "X = 3\n")
    assert nested.key() == first  # another module of that name, which nobody imports
    nested.write("one/same.py", "X = 3\n")
    assert nested.key() != first


@pytest.mark.parametrize("line", ["from pack import gone", "from pack.one.gone import f", "import pack.gone"])
def test_an_import_that_leads_nowhere_is_an_error_and_not_left_out_of_the_key(nested, line):
    nested.write("main.py", "X = 1\n" + line + "\n")
    with pytest.raises(ImportError, match=r"main.py, line 2: pack.*gone.* is no module of this package"):
        nested.key()
