"""All stages by name, and one measurement of any of them: the cell of which runs on several machines are made."""

import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

from bkd_utils.common import cache
from bkd_utils.common.files import PACKAGE, UserError, check_writable

for _path in sorted((PACKAGE / "experiments").glob("[a-z]*.py")):  # an import registers the stages of a module
    importlib.import_module(f"bkd_utils.experiments.{_path.stem}")


def stage(name: str) -> Any:
    """The stage of that name. Raises UserError that lists the known ones."""
    if name not in cache.STAGES:
        raise UserError(f"unknown stage {name!r}; known: {', '.join(sorted(cache.STAGES))}")
    return cache.STAGES[name]


def question(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """`cache.question` of a stage by name. Raises UserError for arguments that it does not have."""
    try:
        return cache.question(stage(name), **arguments)
    except TypeError as error:
        raise UserError(f"stage {name}: {error}") from error


def measure(name: str, arguments: Mapping[str, Any], *, folder: Path) -> Path:
    """Measure a call of a stage unless it is in the folder by the code that is here now; returns its file.

    Nothing that ships is used, neither for the call itself nor for other stages that it needs. Raises UserError for
    a folder that cannot be written to.
    """
    asked = question(name, arguments)
    with patch.dict(os.environ, BKD_KEEP=str(folder), BKD_SHIPPED=""):  # which puts back what was there before
        check_writable(folder)  # before anything is measured
        stage(name)(**arguments)
    if cache.kept(asked, folder) is None:
        raise UserError(f"its result is not in {folder}: the disk is full, or code was edited in the meantime")
    return cache.place(folder, asked)


def read_arguments(text: str) -> dict[str, Any]:
    """Arguments as people give them: a JSON object, or the path of a file with one. Raises UserError for others."""
    named = text.endswith(".json")
    try:
        found = json.loads(Path(text).expanduser().read_text(encoding="utf-8") if named else text)
    except OSError as error:
        raise UserError(f"{text} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"arguments {text!r:.200} are no JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f'arguments {text!r:.200} are no JSON object such as {{"organism": "sentiment-word"}}')
    return found
