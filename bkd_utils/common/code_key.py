"""A key of the code behind a result: the syntax trees of a module and of all that it imports of this package.

A changed line gives another key. A changed comment or docstring does not, nor does a file that was moved or renamed:
where a name is imported from is left out, and what stands there counts by its own content.
"""

import ast
import functools
from pathlib import Path
from symtable import symtable

from bkd_utils.common.files import canonical_json, sha256_text

PACKAGE = Path(__file__).resolve().parents[1]
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_key(module: Path) -> str:
    """Hash of a module's code and of the code of all modules of this package that it imports, directly or not.

    Raises ImportError for an import of this package that leads to no file.
    """
    seen: dict[Path, str] = {}
    waiting = [module.resolve()]
    while waiting:
        path = waiting.pop()
        if path not in seen:
            imported = [_source(*name) for name in _own_imports(path)]
            # Which of two modules a name is taken from counts, by what the module holds and not by its place.
            seen[path] = sha256_text(canonical_json([_content(path), [_content(one) for one in imported]]))
            waiting += imported
    return sha256_text(canonical_json(sorted(seen.values())))


def _content(path: Path) -> str:
    """Hash of a module's code without docstrings, comments and places of imports."""
    return _hashed(path, *_stamp(path))


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@functools.lru_cache(maxsize=512)
def _hashed(path: Path, *_: int) -> str:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").split(".")[0] == PACKAGE.name):
            node.module, node.level = None, 0
    return sha256_text(ast.dump(tree))


def _own_imports(path: Path) -> list[tuple[str, str | None, str]]:
    """Module, name and place in the file of everything that a module imports of this package."""
    return _listed(path, PACKAGE, *_stamp(path))


@functools.lru_cache(maxsize=512)
def _listed(importer: Path, package: Path, *_: int) -> list[tuple[str, str | None, str]]:
    found = []
    for node in ast.walk(ast.parse(importer.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = importer.relative_to(package.parent).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            targets = [(module, alias.name) for alias in node.names]
        else:
            continue
        where = f"{importer.name}, line {node.lineno}"
        found += [(*target, where) for target in targets if target[0].split(".")[0] == package.name]
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
