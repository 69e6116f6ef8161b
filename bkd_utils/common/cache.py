"""Keep the result of an expensive stage under a key made of its inputs and its code.

A rerun after a kill repeats the stage that was running and no other. The code part of the key is the syntax tree of the
stage's module and of every module of this package that it imports, without docstrings and comments: a changed line
recomputes, a changed comment does not. Versions of the libraries that compute are part of it, too.
"""

import ast
import contextlib
import functools
import importlib.metadata
import inspect
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_type_hints

from bkd_utils.common.files import DATA, WORK, canonical_json, read_json, sha256_file, sha256_text, write_json
from bkd_utils.common.results import plain, restored

# Tables that stages read themselves: prompts, surrogates, attacks. A change there is another experiment. Recipes and
# profiles reach stages as arguments only.
TABLES = ("attacks.toml", "instructions.toml", "lexicons.toml", "sources.toml", "surrogates.toml")
LIBRARIES = ("torch", "transformers", "peft")
P = ParamSpec("P")
R = TypeVar("R")
PACKAGE = Path(__file__).resolve().parents[1]
log = logging.getLogger(__name__)


def stage(function: Callable[P, R], *, resolved: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Callable[P, R]:
    """Cache a function whose arguments and result are JSON values or Results (`results.Result`).

    The function's return annotation decides what a kept file is read as: a Result, a list or a dictionary of Results,
    or JSON values. `resolved` turns the arguments into what the key is made of: where an argument is a name, what the
    name stands for must be in it. Raises TypeError for arguments that are not JSON values (pass names, not paths or
    models), ValueError for a result with NaN.
    """
    kind = get_type_hints(function).get("return")

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = plain(bound.arguments)
        path = folder() / f"{function.__name__}-{key(function, resolved(arguments))[:20]}.json"
        if (kept := _kept(path, kind)) is not None:
            log.info("%s: kept result of %s", function.__name__, kept["when"])
            return kept["result"]
        started = time.monotonic()
        result = plain(function(*args, **kwargs))
        seconds = round(time.monotonic() - started, 2)
        when = time.strftime("%Y-%m-%d %H:%M:%S")
        write_json(path, {"when": when, "seconds": seconds, "arguments": arguments, "result": result})
        log.info("%s: computed in %.1f s", function.__name__, seconds)
        # What comes back is what a rerun will read, tuples turned into lists and all.
        return restored(kind, read_json(path)["result"])

    return run


def folder() -> Path:
    return Path(os.environ.get("BKD_WORK", WORK)) / "cache"


def key(function: Callable, arguments: dict[str, Any]) -> str:
    """Content key of one call. Raises TypeError that names an argument which is not a JSON value."""
    for name, value in arguments.items():
        try:
            canonical_json(value)
        except (TypeError, ValueError) as error:
            raise TypeError(f"stage {function.__name__}: argument {name} = {value!r} is not a JSON value") from error
    module = Path(inspect.getsourcefile(inspect.unwrap(function)))
    return sha256_text(canonical_json([function.__qualname__, arguments, code_key(module), installed_versions()]))


@functools.cache
def installed_versions() -> dict[str, str]:
    """Versions of the libraries whose arithmetic a result depends on; after an upgrade, stages compute again."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _kept(path: Path, kind: Any) -> dict | None:
    if not path.is_file() or path.stat().st_mtime < float(os.environ.get("BKD_FORCE_SINCE", 0)):
        return None
    try:
        kept = read_json(path)
        return {"result": restored(kind, kept["result"]), "when": kept["when"]}
    except (ValueError, KeyError, TypeError) as error:
        aside = path.with_suffix(".damaged")
        with contextlib.suppress(FileNotFoundError):  # another process has moved it in the meantime
            os.replace(path, aside)
        log.warning("%s is damaged (%s); it was moved to %s and is computed again", path, error, aside.name)
        return None


def code_key(module: Path) -> str:
    """Hash of a module's code and of the code of all modules of this package that it imports, directly or not.

    Modules are listed by their path in the package, because folders may hold modules of the same name. Raises
    ImportError for an import of this package that leads to no file: a key without it would return results of old code.
    """
    seen: dict[str, str] = {}
    waiting = [module.resolve()]
    while waiting:
        path = waiting.pop()
        label = path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else path.name
        if label in seen:
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        waiting += _imports(tree, path)
        seen[label] = sha256_text(ast.dump(_without_docstrings(tree)))
    tables = [sha256_file(DATA / name) for name in TABLES]
    return sha256_text(canonical_json([tables, sorted(seen.items())]))


def _imports(tree: ast.AST, importer: Path) -> list[Path]:
    """Files of this package that a module imports. Raises ImportError for one that does not exist."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [(alias.name.split("."), None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level:
            parts = importer.relative_to(PACKAGE.parent).with_suffix("").parts[: -node.level]
            targets = [([*parts, *(node.module or "").split(".")], alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            targets = [(node.module.split("."), alias.name) for alias in node.names]
        else:
            continue
        for parts, name in targets:
            parts = [part for part in parts if part]
            if parts[:1] == [PACKAGE.name]:
                found.append(_source(parts[1:], name, f"{importer.name}, line {node.lineno}"))
    return found


def _source(parts: list[str], name: str | None, where: str) -> Path:
    """The file behind `import PACKAGE.parts` or `from PACKAGE.parts import name`; the name may be a module itself."""
    place = PACKAGE.joinpath(*parts)
    candidates = [] if name is None else [place / f"{name}.py", place / name / "__init__.py"]
    candidates += [place.with_suffix(".py")] * bool(parts)
    for path in candidates:
        if path.is_file():
            return path
    folder = place / "__init__.py"
    if folder.is_file() and (name is None or name in _names(ast.parse(folder.read_text(encoding="utf-8")))):
        return folder
    dotted = ".".join([PACKAGE.name, *parts, *([name] if name else [])])
    raise ImportError(f"{where}: {dotted} is no module of this package, so the key of a kept result cannot include it")


def _names(tree: ast.Module) -> set[str]:
    """The names that a folder's `__init__` binds."""
    found = {
        alias.asname or alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    return found | {name.id for node in tree.body for name in ast.walk(node) if isinstance(name, ast.Name)}


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(
            node, clean=False
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return tree
