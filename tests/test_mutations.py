"""The mutation runner on a toy package: what it calls killed, survived and invalid, and that it only reads."""

import subprocess
import time

import mutations
import pytest

CODE = "def double(x):\n    return 2 * x\n\n\ndef shown(x):\n    return f'{x}'\n"
TESTS = """
import pytest
from bkd_utils.sums import double, shown

@pytest.mark.parametrize("x", [0, 3])
def test_double(x):
    assert double(x) == 2 * x

def test_shown():
    assert shown(1)

def test_red():
    assert False

@pytest.fixture
def doubled():
    assert double(2) == 4

def test_behind_a_fixture(doubled):
    pass
"""
ENDLESS = """
import time
from bkd_utils.sums import double

def test_double():
    while double(1) != 2:
        time.sleep(0.1)
"""
ENTRY = '[[mutation]]\nname = "{}"\nfile = "sums.py"\nold = "{}"\nnew = "{}"\ntest = "tests/test_sums.py{}"\n'


@pytest.fixture
def root(tmp_path):
    files = {"bkd_utils/__init__.py": "", "bkd_utils/sums.py": CODE, "tests/test_sums.py": TESTS, "README.md": "toy"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def run(root, capsys):
    """Runs the given entries; the exit status, the lines by name of mutation, and the last line."""

    def runs(*entries, options=()):
        (root / "tests" / "mutations.toml").write_text("".join(ENTRY.format(*entry) for entry in entries))
        before = contents(root)
        status = mutations.main(["--root", str(root), *options])
        assert contents(root) == before  # the checkout is only read
        lines = capsys.readouterr().out.splitlines()
        return status, [line for line in lines if line.startswith("[")], lines[-1]

    return runs


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_killed_survived_and_invalid(run):
    status, lines, last = run(
        ("killed", "2 * x", "3 * x", "::test_double"),
        ("other test", "2 * x", "3 * x", "::test_shown"),
        ("not there", "4 * x", "3 * x", "::test_double"),
        ("twice there", "return", "yield", "::test_double"),
        ("no import", "def double", "def triple", "::test_double"),
        ("red before", "2 * x", "3 * x", "::test_red"),
        ("no test", "2 * x", "3 * x", "::test_triple"),
        ("no file", "2 * x", "3 * x", "_of_what.py::test_double"),
        ("in a fixture", "2 * x", "3 * x", "::test_behind_a_fixture"),
        ("no change", "2 * x", "2 * x", "::test_double"),
    )
    assert status == 1
    said = ["killed", "SURVIVED", *["invalid"] * 8]
    assert [line.split()[1] for line in lines] == said
    assert "test_double[3] - " in lines[0]
    assert "::test_shown still passes" in lines[1]
    assert "the old text is 0 times in bkd_utils/sums.py" in lines[2]
    assert "the old text is 2 times" in lines[3]
    assert "no failed test" in lines[4]
    assert "does not pass without the mutation" in lines[5]
    assert "::test_triple is not collected" in lines[6]
    assert "is not collected" in lines[7]
    assert "no failed test" in lines[8]
    assert "old and new text are the same" in lines[9]
    assert last == "1 killed, 1 survived, 8 invalid"


def test_all_killed_is_a_success_and_one_can_be_chosen(run):
    entries = [("times three", "2 * x", "3 * x", "::test_double"), ("empty", "f'{x}'", "''", "::test_shown")]
    status, lines, last = run(*entries)
    assert (status, len(lines), last) == (0, 2, "2 killed, 0 survived, 0 invalid")
    status, lines, last = run(*entries, options=["--only", "times"])
    assert (status, last) == (0, "1 killed, 0 survived, 0 invalid")
    assert "times three" in lines[0]


def git(root, *command):
    identity = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    subprocess.run(["git", *identity, *command], cwd=root, check=True, capture_output=True)


def test_only_what_differs_from_a_commit(run, root):
    entry = ("times three", "2 * x", "3 * x", "::test_double")
    (root / "bkd_utils" / "other.py").write_text("")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "toy")
    assert run(entry, options=["--changed", "HEAD"]) == (0, [], "0 killed, 0 survived, 0 invalid")
    (root / "bkd_utils" / "other.py").write_text("x = 1\n")
    assert run(entry, options=["--changed", "HEAD"])[1] == []
    (root / "bkd_utils" / "sums.py").write_text(CODE + "\n")
    assert run(entry, options=["--changed", "HEAD"])[2] == "1 killed, 0 survived, 0 invalid"


def test_after_some_minutes_no_more_is_started(run, monkeypatch):
    entries = [("first", "2 * x", "3 * x", "::test_double"), ("second", "2 * x", "4 * x", "::test_double")]
    assert run(*entries, options=["--minutes", "0"]) == (0, [], "0 killed, 0 survived, 0 invalid, 2 not run")
    tried = mutations.Runner.tried

    def slow(*given):
        outcome = tried(*given)
        monkeypatch.setattr(mutations.time, "monotonic", lambda: float("inf"))
        return outcome

    monkeypatch.setattr(mutations.Runner, "tried", slow)
    status, lines, last = run(*entries, options=["--minutes", "5", "--jobs", "1"])
    assert (status, last) == (0, "1 killed, 0 survived, 0 invalid, 1 not run")
    assert [line.split()[2] for line in lines] == ["first"]


def test_a_test_that_does_not_end_is_ended(run, root):
    (root / "tests" / "test_sums.py").write_text(ENDLESS)
    before = time.monotonic()
    _, (line,), last = run(("endless", "2 * x", "3 * x", "::test_double"), options=["--timeout", "2"])
    assert time.monotonic() - before < 60
    assert "still running after 2 s" in line
    assert last == "0 killed, 0 survived, 1 invalid"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '[[mutation]]\nname = "half"\nfile = "sums.py"\n',
            "mutation 'half' has missing or unknown keys: new, old, test",
        ),
        (ENTRY.format("a", "b", "c", "") * 2, "mutation 'a' is listed twice"),
        ("[[mutation", "Expected"),
    ],
)
def test_a_wrong_list_is_an_error(root, capsys, text, message):
    (root / "tests" / "mutations.toml").write_text(text)
    with pytest.raises(SystemExit, match="2"):
        mutations.main(["--root", str(root)])
    assert message in capsys.readouterr().err


def test_an_unknown_commit_or_name_is_an_error(run, root, capsys):
    git(root, "init", "-q")
    entry = ("times three", "2 * x", "3 * x", "::test_double")
    for options, message in (
        (["--changed", "nowhere"], "git does not know 'nowhere'"),
        (["--only", "x"], "no mutation"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(entry, options=options)
        assert message in capsys.readouterr().err


def test_every_change_of_the_list_can_be_made_and_its_tests_are_there():
    """A change that is not found any more would never be made, and its test would bite nothing."""
    for one in mutations.read([mutations.ROOT / "tests" / "mutations.toml"]):
        text = (mutations.ROOT / one.path).read_text(encoding="utf-8")
        assert text.count(one.old) == 1, one.name
        for node in one.test:
            path, _, name = node.partition("::")
            defined = f"def {name.partition('[')[0]}("
            assert not name or defined in (mutations.ROOT / path).read_text(encoding="utf-8"), (one.name, node)
