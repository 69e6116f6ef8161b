"""Do the tests bite? Makes each listed change to a copy of the package and says which named test turned red.

    python tests/mutations.py                          # all of tests/mutations.toml
    python tests/mutations.py --changed origin/main    # those whose file or test differs from there
    python tests/mutations.py --only alignment

An entry of the list has `name`, `file` (under the package), `old` (exact text that is in the file once), `new` and
`test` (one pytest node or several, of which at least one must fail). The checkout is only read. The heavy libraries are
imported once, in a process of which each run of pytest is a fork.
"""

import argparse
import ast
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "bkd_utils"
# What a copy of its own is made of, for tests write into neither; the rest is linked.
COPIED = (PACKAGE, "tests", "pyproject.toml")
# For every run of pytest: one core, and no plugins that happen to be installed.
ALONE = {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
ALONE |= {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}
# What these import only when it is used.
IMPORTED_LATER = {
    "torch": ["torch._dynamo"],
    "transformers": [f"transformers.models.{name}.modeling_{name}" for name in ("auto", "llama", "qwen2", "gpt2")],
}


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


def _is(test: str, node: str) -> bool:
    """Is a node of pytest this test or one inside it?"""
    return node == test or node.startswith((f"{test}[", f"{test}::"))


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


def third_party(root: Path) -> list[str]:
    """The modules of other projects that the package and the tests import when they are imported."""
    paths = [path for folder in (PACKAGE, "tests") for path in sorted((root / folder).rglob("*.py"))]
    found = {"pytest"}
    for path in paths:
        try:
            body = ast.parse(path.read_text(encoding="utf-8")).body
        except SyntaxError:
            continue  # the tests say so
        for node in body:
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    for name, later in IMPORTED_LATER.items():
        found |= set(later) if name in found else set()
    own = {PACKAGE, *(path.stem for path in paths)}
    return sorted(name for name in found if name.partition(".")[0] not in own | set(sys.stdlib_module_names))


def start_server(root: Path) -> multiprocessing.context.BaseContext:
    """Start the process that has imported the heavy modules, and of which every run of pytest is a fork.

    Where the system cannot fork, each run starts a fresh process.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    before = dict(os.environ)
    os.environ.update(ALONE)  # read when torch is imported
    try:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(third_party(root))
        forkserver.ensure_running()
    finally:
        os.environ.clear()
        os.environ.update(before)
    return context


class Seen:
    """A plugin of pytest that runs only the tests under some nodes and keeps what became of each."""

    def __init__(self, tests: Sequence[str]):
        self.tests, self.ended, self.why = tests, {}, {}

    def pytest_collection_modifyitems(self, config, items) -> None:
        other = [item for item in items if not any(_is(test, item.nodeid) for test in self.tests)]
        config.hook.pytest_deselected(items=other)
        items[:] = [item for item in items if item not in other]
        self.ended = dict.fromkeys((item.nodeid for item in items), "not run")

    def pytest_runtest_logreport(self, report) -> None:
        """A test that fails has `failed`; one whose fixtures break or that is skipped has the phase and what it did."""
        if report.when == "call" or not report.passed:
            self.ended[report.nodeid] = report.outcome if report.when == "call" else f"{report.when} {report.outcome}"
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            self.why[report.nodeid] = crash.message.partition("\n")[0] if crash else str(report.longrepr)[-200:]


def _child(tree: Path, root: Path, tests: Sequence[str], options: Sequence[str], imported: set[str]) -> None:
    """Run tests of a tree in this process, which is then of no further use, and write down how each ended."""
    if hasattr(os, "setsid"):
        os.setsid()  # whatever the tests start ends with them
    work = {"BKD_WORK": str(tree.parent / "work"), "TMPDIR": str(tree.parent)}
    os.environ.update(ALONE | work | {"BKD_ASSETS": os.environ.get("BKD_ASSETS", str(root / "data" / "assets"))})
    tempfile.tempdir, sys.dont_write_bytecode = None, True
    output = os.open(tree.parent / "output", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(tree)
    # Neither the checkout nor what was imported from there may be seen.
    sys.path[:] = [
        str(tree),
        str(tree / "tests"),
        *(path for path in sys.path if not Path(path).is_relative_to(root) or "site-packages" in path),
    ]
    for name in list(sys.modules):
        if name.partition(".")[0] in imported:
            del sys.modules[name]

    import pytest

    seen = Seen(tests)
    fixed = ["-o", "addopts=", "--import-mode=importlib", "-q", "--tb=short", "-p", "no:cacheprovider"]
    status = pytest.main([*fixed, *options, *sorted({_file(test) for test in tests})], plugins=[seen])
    package = sys.modules.get(PACKAGE)
    if package and not Path(package.__file__).is_relative_to(tree):
        raise RuntimeError(f"the tests imported {package.__file__}, not the copy in {tree}")
    report = {"status": int(status), "ended": seen.ended, "why": seen.why}
    (tree.parent / "report.json").write_text(json.dumps(report), encoding="utf-8")


@dataclass(frozen=True)
class Runner:
    """Runs tests in trees, each time in a process of its own."""

    root: Path
    timeout: float
    context: multiprocessing.context.BaseContext

    def run(self, tree: Path, tests: Sequence[str], *options: str, timeout: float | None = None) -> dict:
        """The exit `status` of pytest, how each test `ended`, and `why` some failed.

        Raises TimeoutError if they take too long, RuntimeError if the process broke down.
        """
        own = {PACKAGE, "conftest", "mutations", *(path.stem for path in (tree / "tests").rglob("*.py"))}
        process = self.context.Process(target=_child, args=(tree, self.root, tests, options, own))
        process.start()
        process.join(timeout or self.timeout)
        if late := process.is_alive():
            with suppress(ProcessLookupError, AttributeError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
        if late:
            raise TimeoutError(f"still running after {timeout or self.timeout:.0f} s")
        path = tree.parent / "report.json"
        if not path.is_file():
            last = (tree.parent / "output").read_text(encoding="utf-8", errors="replace")[-200:]
            raise RuntimeError(f"the process ended with {process.exitcode}: {last}")
        return json.loads(path.read_text(encoding="utf-8"))

    def unmutated(self, file: str, tests: Sequence[str]) -> dict[str, str]:
        """Test -> why it cannot serve, of those of one file that are not there or do not pass as things are."""
        with copied(self.root) as tree:
            if not (tree / file).is_file():
                return {test: f"{test} is not collected, there is no {file}" for test in tests}
            try:
                report = self.run(tree, tests, timeout=60 + self.timeout * len(tests))
            except (TimeoutError, RuntimeError) as error:
                return dict.fromkeys(tests, f"{file} without the mutation: {error}")
        wrong = {}
        for test in tests:
            ends = {node: end for node, end in report["ended"].items() if _is(test, node)}
            bad = [f"{end}: {report['why'].get(node, '')}" for node, end in ends.items() if end != "passed"]
            if not ends:
                wrong[test] = f"{test} is not collected"
            elif bad:
                wrong[test] = f"{test} does not pass without the mutation, {bad[0]}"
        return wrong

    def tried(self, mutation: Mutation) -> Outcome:
        """Make the change in a copy and run its tests there."""
        with copied(self.root) as tree:
            path = tree / mutation.path
            if not path.is_file():
                return Outcome("invalid", f"there is no {mutation.path}")
            text = path.read_text(encoding="utf-8")
            if (count := text.count(mutation.old)) != 1:
                return Outcome("invalid", f"the old text is {count} times in {mutation.path}")
            if mutation.old == mutation.new:
                return Outcome("invalid", "old and new text are the same")
            path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
            try:
                report = self.run(tree, mutation.test, "-x")
            except (TimeoutError, RuntimeError) as error:
                return Outcome("invalid", str(error))
        if report["status"] == 0:
            return Outcome("SURVIVED", f"{', '.join(mutation.test)} still passes")
        # A module that cannot be imported, or a fixture that breaks, is no proof that a test looks at the science.
        failed = [node for node, end in report["ended"].items() if end == "failed"]
        if report["status"] == 1 and failed:
            return Outcome("killed", f"{failed[0]} - {report['why'].get(failed[0], '')}"[:200])
        broken = "; ".join(f"{node}: {why}" for node, why in report["why"].items())
        return Outcome("invalid", f"pytest ended with {report['status']} and no failed test {broken}"[:300])


def judged(
    mutations: Sequence[Mutation], *, root: Path, jobs: int, timeout: float, minutes: float = float("inf")
) -> dict[str, Outcome]:
    """Name -> outcome, with a line of progress for each. After some minutes nothing more is started; half of them are
    for the tests without any mutation."""
    halfway, until = (time.monotonic() + seconds * minutes for seconds in (30, 60))
    tests = sorted({test for one in mutations for test in one.test})
    by_file = {file: list(group) for file, group in itertools.groupby(tests, key=_file)}
    print(f"{len(mutations)} mutations; their {len(tests)} tests without any mutation first", flush=True)
    runner = Runner(root, timeout, start_server(root))
    late = Outcome("not run", f"{minutes:g} minutes are over")

    def checked(file: str) -> dict[str, str] | None:
        return runner.unmutated(file, by_file[file]) if time.monotonic() < halfway else None

    def outcome(one: Mutation) -> Outcome:
        if time.monotonic() >= until or any(wrong[_file(test)] is None for test in one.test):
            return late
        unfit = [why for test in one.test if (why := wrong[_file(test)].get(test))]
        return Outcome("invalid", "; ".join(unfit)) if unfit else runner.tried(one)

    found = {}
    with ThreadPoolExecutor(jobs) as pool:
        wrong = dict(zip(by_file, pool.map(checked, by_file), strict=True))
        for i, (one, result) in enumerate(zip(mutations, pool.map(outcome, mutations), strict=True), start=1):
            if result is not late:
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
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no more mutations after this time")
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
    options = {"root": root, "jobs": given.jobs, "timeout": given.timeout, "minutes": given.minutes}
    found = judged(mutations, **options) if mutations else {}
    counts = Counter(one.verdict for one in found.values())
    said = f"{counts['killed']} killed, {counts['SURVIVED']} survived, {counts['invalid']} invalid"
    print(said + (f", {counts['not run']} not run" if counts["not run"] else ""))
    return int(counts["killed"] + counts["not run"] < len(found))


if __name__ == "__main__":
    sys.exit(main())
