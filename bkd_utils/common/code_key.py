"""A key of the code behind a result: the syntax trees of a module and of all that it imports of this package.

A changed line gives another key. A changed comment or docstring does not, nor does a file that was moved, nor one that
was renamed if others take names from it: where a name is imported from is left out, and what stands there counts by its
own content. What Python's version adds to a tree is left out, too."""

import ast
import functools
from pathlib import Path
from symtable import symtable
from typing import Any

from bkd_utils.common.files import PACKAGE, canonical_json, sha256_text

# They keep results and compute none, so that a better way of keeping makes nothing stale.
KEEPING = ("cache.py", "code_key.py", "measurements.py")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_key(module: Path) -> str:
    """Hash of a module's code and of the code of all modules of this package that it imports, directly or not, but for
    those that keep results. Raises ImportError for an import of this package that leads to no file."""
    seen: dict[Path, str] = {}
    waiting = [module.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            imported = [(name, own, _source(of, name, where)) for of, name, own, where in _read(path)[1]]
            imported = [one for one in imported if one[2] not in {PACKAGE / "common" / name for name in KEEPING}]
            # Which of two modules a name is taken from counts, by what the module holds and not by its place; the order
            # of imports does not, because a sorted list of them changes when a file is moved.
            taken = {(name or "", own or "", _read(source)[0]) for name, own, source in imported}
            seen[path] = sha256_text(canonical_json([_read(path)[0], sorted(taken)]))
            waiting += [source for *_, source in imported]
    return sha256_text(canonical_json(sorted(seen.values())))


def _read(path: Path) -> tuple[str, list[tuple[str, str | None, str | None, str]]]:
    """Hash of a module's own code, and its imports of this package: module, name in it, name here and its line."""
    found = path.stat()
    return _parsed(path, PACKAGE, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=512)
def _parsed(path: Path, package: Path, *_: int) -> tuple[str, list[tuple[str, str | None, str | None, str]]]:
    tree, imports = ast.parse(path.read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(package.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            targets = [(module, alias.name, alias.asname or alias.name) for alias in node.names]
        else:
            continue
        where = f"{path.name}, line {node.lineno}"
        imports += [(*target, where) for target in targets if target[0].split(".")[0] == package.name]
    return sha256_text(canonical_json(_plain(tree, package.name))), imports


def _plain(value: Any, package: str) -> Any:
    """A syntax tree as JSON values, without what `code_key` leaves out. Empty fields are left out because newer
    versions of Python have more of them."""
    if isinstance(value, list):
        return [_plain(one, package) for one in value if not (isinstance(one, ast.Pass) or _is_own(one, package))]
    if not isinstance(value, ast.AST):
        return repr(value)
    fields = dict(ast.iter_fields(value))
    if isinstance(value, DOCUMENTED) and ast.get_docstring(value, clean=False) is not None:
        fields["body"] = fields["body"][1:]
    plain = {name: _plain(inside, package) for name, inside in fields.items() if inside is not None}
    return [type(value).__name__, {name: inside for name, inside in plain.items() if inside != []}]


def _is_own(node: Any, package: str) -> bool:
    """Is it a `from ... import` of this package?"""
    return isinstance(node, ast.ImportFrom) and bool(node.level or node.module.split(".")[0] == package)


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
