"""Notebook files: list them, read and check their parameters, mark them for a run, and publish their outputs."""

import ast
import copy
import math
import re
from pathlib import Path
from typing import Annotated, Any

import nbformat
from nbformat import NotebookNode
from pydantic import Field

from bkd_utils.common.files import DATA, NOTEBOOKS, ON_REQUEST, atomic_path
from bkd_utils.common.validation import check, read_tables

SENTINEL = "bkd-sentinel"
Minutes = Annotated[float, Field(gt=0, le=100_000)]
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}


class NotebookError(ValueError):
    """A notebook or parameter that must not be run; the message names the notebook and the fault."""


def all_notebooks(*, folder: Path = NOTEBOOKS) -> list[Path]:
    """The numbered notebooks in order."""
    return sorted(folder.glob("[0-9][0-9]_*.ipynb"))


def select(only: str | None, *, folder: Path = NOTEBOOKS) -> list[Path]:
    """Notebooks by comma-separated numbers (`01,03`) or names; by default all but those `ON_REQUEST`. Raises
    NotebookError for one that does not exist."""
    known = all_notebooks(folder=folder)
    if not known:
        raise NotebookError(f"there are no notebooks in {folder}; they come with a checkout, not with the package")
    if only is None:
        return [path for path in known if path.stem not in ON_REQUEST]
    words = {word.strip() for word in only.split(",") if word.strip()} or {only}
    names = {name for path in known for name in (path.stem, path.stem[:2])}
    if unknown := ", ".join(map(repr, sorted(words - names))):
        raise NotebookError(f"no notebook {unknown}; there are: {', '.join(path.stem for path in known)}")
    return [path for path in known if words & {path.stem, path.stem[:2]}]


def read(path: Path) -> NotebookNode:
    """Parse a notebook. Raises NotebookError if it is not one."""
    try:
        return nbformat.read(path, as_version=4)
    except Exception as error:  # nbformat raises a different type for every way a file can be broken
        raise NotebookError(f"{path.name} is not a notebook: {error}") from error


def parameters(path: Path) -> dict[str, Any]:
    """Names and default values of the parameters cell. Raises NotebookError unless exactly one cell is tagged
    `parameters` and it assigns literals only: papermill injects given parameters after this cell, so a derived value
    would keep its default."""
    tagged = [cell for cell in read(path).cells if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        raise NotebookError(f"{path.name} has {len(tagged)} cells tagged 'parameters', must have exactly 1, with code")
    try:
        lines = ast.parse(tagged[0].source).body
    except SyntaxError as error:
        raise NotebookError(f"{path.name}, parameters line {error.lineno}: {error.msg}") from error
    values: dict[str, Any] = {}
    for node in lines:
        line = f"{path.name}, parameters line {node.lineno}"
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        target = node.target if isinstance(node, ast.AnnAssign) else target
        if not isinstance(target, ast.Name) or node.value is None:
            raise NotebookError(f"{line}: only NAME = LITERAL is allowed there")
        try:
            values[target.id] = ast.literal_eval(node.value)
        except (ValueError, TypeError) as error:
            raise NotebookError(f"{line}: {target.id} is derived, not a literal") from error
    return values


def check_parameters(path: Path, given: dict[str, Any]) -> None:
    """Raise NotebookError for a parameter that the notebook does not declare or whose default is of another type."""
    known = parameters(path)
    if unknown := ", ".join(map(repr, sorted(given.keys() - known))):
        raise NotebookError(f"{path.name} has no parameter {unknown}; it has: {', '.join(known) or 'none'}")
    for name, value in given.items():
        if not _alike(value, known[name]):
            raise NotebookError(f"{path.name}: {name} = {value!r} is of another type than its default, {known[name]!r}")


def profile_parameters(profile: str, paths: list[Path]) -> tuple[dict[str, dict[str, Any]], int]:
    """Parameters per notebook, and their limit in seconds. Raises ValueError for any that does not fit."""
    tables = read_tables(DATA / "profiles.toml")
    if profile not in tables:
        raise NotebookError(f"unknown profile {profile!r}; known: {', '.join(tables)}")
    chosen, where = dict(tables[profile]), f"profiles.toml, [{profile}]"
    check(Minutes, chosen.pop("minutes_per_notebook", None), f"{where}: minutes_per_notebook")
    known = {path.stem: path for path in all_notebooks()}
    for name, given in chosen.items():
        if name not in known:
            raise NotebookError(f"{where}: no notebook {name!r}; there are: {', '.join(known)}")
        check(dict[str, Any], given, f"{where}: {name}")
        check_parameters(known[name], given)
    limit = tables[profile]["minutes_per_notebook"] * 60
    return {path.stem: chosen.get(path.stem, {}) for path in paths}, limit


def _alike(value: Any, default: Any) -> bool:
    """Is a value of its default's type, down to the items of lists? A whole number may stand for a decimal one."""
    if isinstance(value, float) and not math.isfinite(value):
        return False
    if isinstance(default, list | tuple) and isinstance(value, list | tuple):
        return not default or all(any(_alike(item, one) for one in default) for item in value)
    return default is None or type(value) is type(default) or (type(value), type(default)) == (int, float)


def with_sentinel(notebook: NotebookNode, token: str) -> NotebookNode:
    """A copy with a further cell, which prints the token, the interpreter's prefix and the peak of memory."""
    marked = copy.deepcopy(notebook)
    told = f"'token': {token!r}, 'prefix': sys.prefix, 'peak': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss"
    source = f"import json, resource, sys\nprint(json.dumps({{{told}}}))"
    marked.cells.append(nbformat.v4.new_code_cell(source, metadata={"tags": [SENTINEL]}))
    return marked


def published(executed: NotebookNode, original: NotebookNode) -> NotebookNode:
    """The original with an executed copy's outputs, the same after every run. Raises NotebookError if it is no copy."""
    added = {"injected-parameters", SENTINEL}
    own = [cell for cell in executed.cells if not added & set(cell.metadata.get("tags", []))]
    if [cell.source for cell in own] != [cell.source for cell in original.cells]:
        raise NotebookError("the executed copy is not of this notebook; run it again before publishing")
    clean = copy.deepcopy(original)
    code = [pair for pair in zip(clean.cells, own, strict=True) if pair[0].cell_type == "code"]
    for count, (cell, run) in enumerate(code, start=1):
        cell.execution_count = count
        cell.outputs = _clean_outputs(run.outputs, count)
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
    clean.metadata = {"kernelspec": KERNELSPEC, "language_info": {"name": "python"}}
    return clean


def _clean_outputs(outputs: list[NotebookNode], count: int) -> list[NotebookNode]:
    """Drop stderr (progress bars, warnings) and widgets, join consecutive printed outputs, normalise the rest."""
    kept: list[NotebookNode] = []
    for output in copy.deepcopy(outputs):
        data = output.get("data", {})
        if output.get("name") == "stderr" or any("widget" in mime for mime in data):
            continue
        # In every run a styled table gets another random id, and the text of an object shows another address.
        for mime in {"text/html", "text/plain"} & data.keys():
            data[mime] = re.sub(r" at 0x[0-9a-f]{6,}", "", re.sub(r"T_[0-9a-f]{5}", "T_bkd00", data[mime]))
        if output.output_type == "execute_result":
            output.execution_count = count
        # The kernel cuts printed text into outputs by time, so the cuts differ between runs.
        if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":  # of a line that is overwritten by carriage returns, the last text stays
            output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
    return [output for output in kept if output.output_type != "stream" or output.text.strip()]


def publish(executed: Path, original: Path) -> None:
    """Write the outputs of an executed copy into the original."""
    with atomic_path(original) as temporary:
        nbformat.write(published(read(executed), read(original)), temporary)
