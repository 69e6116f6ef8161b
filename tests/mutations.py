"""Do the tests bite? Makes each listed change to a copy of the package and says which named test turned red.

    python tests/mutations.py                          # all of tests/mutations.toml
    python tests/mutations.py --changed origin/main    # those whose file or test differs from there
    python tests/mutations.py --only alignment

An entry of the list has `name`, `file` (under the package), `old` (exact text that is in the file once), `new` and
`test` (one pytest node or several, of which at least one must fail). The checkout is only read.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bkd_utils"
# What a copy of its own is made of, for tests write into neither; the rest is linked.
COPIED = (PACKAGE, "tests", "pyproject.toml")


@dataclass(frozen=True)
class Mutation:
    """One change to a file of the package, and the tests of which one must fail with it."""

    name: str
    file: str
    old: str
    new: str
    test: tuple[str, ...]

    @property
    def path(self) -> str:
        return f"{PACKAGE}/{self.file}"


@dataclass(frozen=True)
class Outcome:
    """`verdict` is killed, SURVIVED or invalid; `why` names the test that failed, or what is wrong with the entry."""

    verdict: str
    why: str


def read(paths: Sequence[Path]) -> list[Mutation]:
    """The entries of some lists. Raises ValueError for a missing or unknown key and for a name that is there twice."""
    found: dict[str, Mutation] = {}
    for path in paths:
        for entry in tomllib.loads(path.read_text(encoding="utf-8")).get("mutation", []):
            name, keys = entry.get("name", "without a name"), set(Mutation.__dataclass_fields__)
            if wrong := entry.keys() ^ keys:
                raise ValueError(f"{path}: mutation {name!r} has missing or unknown keys: {', '.join(sorted(wrong))}")
            if name in found:
                raise ValueError(f"{path}: mutation {name!r} is listed twice")
            tests = [entry["test"]] if isinstance(entry["test"], str) else entry["test"]
            found[name] = Mutation(**entry | {"test": tuple(tests)})
    return list(found.values())


def changed(mutations: Sequence[Mutation], base: str, *, root: Path) -> list[Mutation]:
    """Those whose file or one of whose tests differs from a commit. Raises CalledProcessError for an unknown one."""

    def names(*command: str) -> set[str]:
        return set(
            subprocess.run(["git", *command], cwd=root, capture_output=True, text=True, check=True).stdout.split("\n")
        )

    differ = names("diff", "--name-only", "--relative", base) | names("ls-files", "--others", "--exclude-standard")
    return [one for one in mutations if differ & {one.path, *(_file(test) for test in one.test)}]


def _file(test: str) -> str:
    return test.partition("::")[0]


def _is(test: str, line: str) -> bool:
    """Is a line of pytest's output, from the node on, about this test or about one inside it?"""
    return line == test or line.startswith((f"{test}[", f"{test}::", f"{test} - "))


@contextmanager
def copied(root: Path) -> Iterator[Path]:
    """A tree in which the package and the tests can be changed; what else the tests read is linked."""
    with tempfile.TemporaryDirectory(prefix="mutation-") as name:
        tree = Path(name) / "tree"
        tree.mkdir()
        for path in root.iterdir():
            if path.name in COPIED and path.is_dir():
                shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            elif path.name in COPIED:
                shutil.copyfile(path, tree / path.name)
            elif not path.name.startswith(".") and path.name != "work":
                (tree / path.name).symlink_to(path)
        yield tree


def run_tests(tree: Path, *options: str, root: Path, timeout: float) -> tuple[int, list[str]]:
    """Exit status and lines of pytest in a process of its own."""
    work = {"BKD_WORK": str(tree.parent / "work"), "TMPDIR": str(tree.parent)}
    assets = {"BKD_ASSETS": os.environ.get("BKD_ASSETS", str(root / "data" / "assets"))}
    # One core, lines that are not cut, and no plugins that happen to be installed.
    alone = {"OMP_NUM_THREADS": "1", "COLUMNS": "1000", "NO_COLOR": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", *options]
    environment = os.environ | alone | work | assets
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout)
    return done.returncode, done.stdout.splitlines()


def unmutated(tests: Sequence[str], *, root: Path, timeout: float) -> dict[str, str]:
    """Test -> why it cannot serve, of those that are not there or do not pass as things are; one run for all."""
    if not tests:
        return {}
    with copied(root) as tree:
        files = sorted({_file(test) for test in tests if (tree / _file(test)).is_file()})
        nodes = run_tests(tree, "--collect-only", *files, root=root, timeout=timeout)[1] if files else []
        there = [test for test in tests if any(_is(test, node) for node in nodes)]
        wrong = {test: f"{test} is not collected" for test in tests if test not in there}
        shown = ("-rA", "--show-capture=no", "--tb=no")
        lines = run_tests(tree, *shown, *there, root=root, timeout=timeout)[1] if there else []
    for test in there:
        ends = [line.partition(" ")[0] for line in lines if _is(test, line.partition(" ")[2])]
        if not ends or set(ends) != {"PASSED"}:
            wrong[test] = f"{test} does not pass without the mutation"
    return wrong


def tried(mutation: Mutation, *, root: Path, timeout: float) -> Outcome:
    """Make the change in a copy and run its tests there."""
    with copied(root) as tree:
        path = tree / mutation.path
        if not path.is_file():
            return Outcome("invalid", f"there is no {mutation.path}")
        text = path.read_text(encoding="utf-8")
        if (count := text.count(mutation.old)) != 1 or mutation.old == mutation.new:
            why = f"the old text is {count} times in {mutation.path}" if count != 1 else "old and new text are the same"
            return Outcome("invalid", why)
        path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
        try:
            status, lines = run_tests(tree, "-x", "-rfE", "--tb=no", *mutation.test, root=root, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome("invalid", f"still running after {timeout:.0f} s")
    failed = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    if status == 0:
        return Outcome("SURVIVED", f"{', '.join(mutation.test)} still passes")
    # A module that cannot be imported, or a fixture that breaks, is no proof that a test looks at the science.
    if status == 1 and (named := [line for line in failed if any(_is(test, line) for test in mutation.test)]):
        return Outcome("killed", named[0][:200])
    return Outcome("invalid", f"pytest ended with {status} and no failed test: {' '.join(lines[-3:])[:200]}")


def judged(mutations: Sequence[Mutation], *, root: Path, jobs: int, timeout: float) -> dict[str, Outcome]:
    """Name -> outcome, with a line of progress for each."""
    tests = sorted({test for one in mutations for test in one.test})
    print(f"{len(mutations)} mutations; their {len(tests)} tests without any mutation first", flush=True)
    wrong = unmutated(tests, root=root, timeout=60 + timeout * len(tests))

    def outcome(one: Mutation) -> Outcome:
        unfit = [wrong[test] for test in one.test if test in wrong]
        return Outcome("invalid", "; ".join(unfit)) if unfit else tried(one, root=root, timeout=timeout)

    found = {}
    with ThreadPoolExecutor(jobs) as pool:
        for i, (one, result) in enumerate(zip(mutations, pool.map(outcome, mutations), strict=True), start=1):
            print(f"[{i}/{len(mutations)}] {result.verdict:8} {one.name} ({one.file}): {result.why}", flush=True)
            found[one.name] = result
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a mutation survives or is invalid."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lists", nargs="*", type=Path, help="lists of mutations (default: tests/mutations.toml)")
    parser.add_argument("--changed", metavar="BASE", help="only mutations whose file or test differs from this commit")
    parser.add_argument("--only", metavar="NAME", help="only mutations with this in their name")
    parser.add_argument("--jobs", type=int, default=2, help="how many at once (default: 2)")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for the tests of one mutation")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    given = parser.parse_args(arguments)
    root = given.root.resolve()
    try:
        mutations = read(given.lists or [root / "tests" / "mutations.toml"])
        if given.changed:
            mutations = changed(mutations, given.changed, root=root)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    except subprocess.CalledProcessError as error:
        parser.error(f"git does not know {given.changed!r}: {error.stderr.strip()}")
    if given.only:
        mutations = [one for one in mutations if given.only in one.name]
        if not mutations:
            parser.error(f"no mutation with {given.only!r} in its name")
    found = judged(mutations, root=root, jobs=given.jobs, timeout=given.timeout) if mutations else {}
    counts = {
        verdict: sum(one.verdict == verdict for one in found.values()) for verdict in ("killed", "SURVIVED", "invalid")
    }
    print("{killed} killed, {SURVIVED} survived, {invalid} invalid".format(**counts))
    return int(counts["killed"] < len(found))


if __name__ == "__main__":
    sys.exit(main())
