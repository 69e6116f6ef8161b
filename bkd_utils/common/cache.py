"""Keep the result of an expensive stage under a key made of its inputs and its code.

A rerun after a kill repeats the stage that was running and no other. The code part of the key is the syntax tree of the
stage's module and of every module of this package that it imports, so a changed line recomputes and a changed comment
or docstring does not. Versions of the libraries that compute are part of it, too.
"""

import ast
import contextlib
import functools
import importlib.metadata
import inspect
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from symtable import symtable
from typing import Any, ParamSpec, TypeVar, get_type_hints

from bkd_utils.common.files import DATA, WORK, canonical_json, keep_json, read_json, sha256_file, sha256_text
from bkd_utils.common.results import plain, restored

# Tables that stages read themselves. Recipes and profiles reach stages as arguments only.
TABLES = ("attacks.toml", "instructions.toml", "lexicons.toml", "sources.toml", "surrogates.toml")
LIBRARIES = ("torch", "transformers", "peft")
P = ParamSpec("P")
R = TypeVar("R")
PACKAGE = Path(__file__).resolve().parents[1]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
log = logging.getLogger(__name__)


def stage(function: Callable[P, R], *, resolved: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> Callable[P, R]:
    """Cache a function whose arguments and result are JSON values or Results (`results.Result`).

    A kept file is read as what the function's return annotation says. `resolved` turns the arguments into what the key
    is made of: where an argument is a name, what the name stands for must be in it. Raises TypeError for arguments that
    are not JSON values (pass names, not paths or models), ValueError for a result with NaN. A result that cannot be
    written, as on a full disk, is returned all the same, with a warning.
    """
    kind = get_type_hints(function).get("return")

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = inspect.signature(function).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = plain(bound.arguments)
        folder = Path(os.environ.get("BKD_WORK") or WORK).expanduser() / "cache"
        path = folder / f"{function.__name__}-{key(function, resolved(arguments))[:20]}.json"
        if (kept := _kept(path, kind)) is not None:
            log.info("%s: kept result of %s", function.__name__, kept["when"])
            return kept["result"]
        started = time.monotonic()
        result = plain(function(*args, **kwargs))
        seconds, when = round(time.monotonic() - started, 2), time.strftime("%Y-%m-%d %H:%M:%S")
        keep_json(path, {"when": when, "seconds": seconds, "arguments": arguments, "result": result})
        log.info("%s: computed in %.1f s", function.__name__, seconds)
        # What comes back is what a rerun will read, tuples turned into lists and all.
        return restored(kind, json.loads(json.dumps(result)))

    return run


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
    """Versions of the libraries whose arithmetic a result depends on."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def _kept(path: Path, kind: Any) -> dict | None:
    if not path.is_file() or path.stat().st_mtime < float(os.environ.get("BKD_FORCE_SINCE", 0)):
        return None
    try:
        kept = read_json(path)
        return {"result": restored(kind, kept["result"]), "when": kept["when"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        aside = path.with_suffix(".damaged")
        with contextlib.suppress(OSError):  # another process has moved it in the meantime, or the folder is read-only
            os.replace(path, aside)
        log.warning("%s is damaged (%s); it was moved to %s and is computed again", path, error, aside.name)
        return None


def code_key(module: Path) -> str:
    """Hash of a module's code and of the code of all modules of this package that it imports, directly or not.

    Raises ImportError for an import of this package that leads to no file.
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
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
                node.body = node.body[1:] or [ast.Pass()]
        seen[label] = sha256_text(ast.dump(tree))
    return sha256_text(canonical_json([[sha256_file(DATA / name) for name in TABLES], sorted(seen.items())]))


def _imports(tree: ast.AST, importer: Path) -> list[Path]:
    """Files of this package that a module imports. Raises ImportError for one that does not exist."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = importer.relative_to(PACKAGE.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            targets = [(module, alias.name) for alias in node.names]
        else:
            continue
        where = f"{importer.name}, line {node.lineno}"
        found += [_source(module, name, where) for module, name in targets if module.split(".")[0] == PACKAGE.name]
    return found


def _source(module: str, name: str | None, where: str) -> Path:
    """The file behind `import module` or `from module import name`; the name may be a module itself."""
    place = PACKAGE.joinpath(*module.split(".")[1:])
    inside = [place / f"{name}.py", place / name / "__init__.py"] if name else []
    for path in [*inside, place.with_suffix(".py")]:
        if path.is_file():
            return path
    folder = place / "__init__.py"
    if folder.is_file():
        bound = symtable(folder.read_text(encoding="utf-8"), str(folder), "exec").get_identifiers()
        if name is None or name in bound:
            return folder
    dotted = f"{module}.{name}" if name else module
    raise ImportError(f"{where}: {dotted} is no module of this package, so the key of a kept result cannot include it")
