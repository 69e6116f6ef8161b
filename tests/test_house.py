"""The rules of the house: eight folders that import downward only, leaf modules, short modules, tests beside them."""

import ast

import pytest

from bkd_utils.common.files import ROOT

PACKAGE = ROOT / "bkd_utils"
# From low to high; a folder imports from itself and from those before it.
FOLDERS = (
    "common",
    "models",
    "organisms",
    "backdoor_attribution",
    "attention_alignment",
    "experiments",
    "reports",
    "running",
)
METHODS = FOLDERS[1:5]
LONGEST, IN_ALL = 300, 17_899


def modules(package=PACKAGE):
    return sorted(package.rglob("*.py"))


def imports(path, package):
    """Line number and dotted name, without the package's own, of each internal import, those in functions included.

    `from package.folder import name` counts as `folder.name`, whether the name is a module or not.
    """
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(package.parent).parts[: -node.level] if node.level else ()
            start = ".".join([*above, *filter(None, [node.module])])
            found = [f"{start}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name.split(".")[1:]) for name in found if name.split(".")[0] == package.name)


def fault(name, own, package, folders):
    """What is wrong with an import of a dotted name by a module of floor `own`, or None."""
    if not name or name[0] not in folders:
        return "leads to no folder of the house"
    if folders.index(name[0]) > own:
        return "leads upward"
    if not package.joinpath(*name[:2]).with_suffix(".py").is_file():
        return "takes a name from a folder and not from a module"
    return None


def offences(package=PACKAGE, folders=FOLDERS):
    """Each import that leads upward or takes a name from a folder instead of a leaf module, as `file, line: text`."""
    found = []
    for path in modules(package):
        place = path.relative_to(package)
        # What stands beside the folders, the command line, is above them all.
        own = folders.index(place.parts[0]) if len(place.parts) > 1 else len(folders)
        lines = path.read_text(encoding="utf-8").splitlines()
        for number, name in imports(path, package):
            if wrong := fault(name, own, package, folders):
                found.append(f"{place.as_posix()}, line {number} {wrong}: {lines[number - 1].strip()}")
    return found


def test_imports_lead_downward_and_to_leaf_modules():
    found = offences()
    assert not found, "\n".join(found)


def test_the_folders_of_the_house_are_these_eight():
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} == set(FOLDERS)
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py"}
    assert [path for path in modules() if len(path.relative_to(PACKAGE).parts) > 2] == []


@pytest.mark.parametrize("name", [name for name in FOLDERS if name not in METHODS])
def test_only_the_method_folders_import_in_their_init(name):
    path = PACKAGE / name / "__init__.py"
    assert list(imports(path, PACKAGE)) == []
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_module_is_too_long():
    long = {
        path.relative_to(PACKAGE).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()
    }
    assert {name: count for name, count in long.items() if count > LONGEST} == {}
    assert sum(long.values()) <= IN_ALL


def test_every_module_says_its_job_and_none_is_a_heap_of_helpers():
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or path.name == "__main__.py", path
        assert path.stem.strip("_") not in ("util", "utils", "helper", "helpers", "misc"), path


def test_tests_are_in_folders_of_the_same_names_and_look_into_them():
    tests = sorted((ROOT / "tests").glob("*/**/test_*.py"))
    assert {path.relative_to(ROOT / "tests").parts[0] for path in tests} == set(FOLDERS)
    for path in tests:
        assert path.parent.parent == ROOT / "tests", path
        assert path.parent.name in {name[0] for _, name in imports(path, PACKAGE) if name}, path


# --- the checker itself ---------------------------------------------------------------------------------------------


def toy(folder, **files):
    """A package of two folders, `low` and `high`, with a module each; `files` replace or add to these."""
    given = {"low/__init__": "", "high/__init__": "", "low/one": "", "high/two": "", "__init__": ""} | files
    for name, text in given.items():
        path = folder / "toy" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "toy"


@pytest.mark.parametrize(
    "line",
    [
        "from toy.high import two",
        "from toy.high.two import name",
        "import toy.high.two as other",
        "from ..high.two import name",
        "from ..high import two",
    ],
)
def test_an_upward_import_is_found_even_in_a_function(line, tmp_path):
    package = toy(tmp_path, **{"low/one": f"def function():\n    {line}\n"})
    assert offences(package, ("low", "high")) == [f"low/one.py, line 2 leads upward: {line}"]


@pytest.mark.parametrize("line", ["from toy.low import one", "from toy.low.one import name", "import toy.low.one"])
def test_an_import_of_a_module_below_is_none(line, tmp_path):
    package = toy(tmp_path, **{"high/two": line, "__main__": line, "low/__init__": "from toy.low.one import name"})
    assert offences(package, ("low", "high")) == []


@pytest.mark.parametrize(
    "line", ["from toy.low import name", "import toy.low", "from toy import low", "from ..low import *"]
)
def test_a_name_taken_from_a_folder_is_found(line, tmp_path):
    package = toy(tmp_path, **{"high/two": f"{line}\n", "low/__init__": "from toy.low.one import name"})
    (found,) = offences(package, ("low", "high"))
    assert found.startswith("high/two.py, line 1 takes a name from a folder")


def test_an_import_from_outside_the_folders_is_found(tmp_path):
    package = toy(tmp_path, **{"low/one": "import os\nfrom toy import stray\n"})
    (found,) = offences(package, ("low", "high"))
    assert found == "low/one.py, line 2 leads to no folder of the house: from toy import stray"
