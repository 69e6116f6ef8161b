"""Where things live, and how they are written: completely or not at all.

Installed from a wheel, the package has its tables and the base model's answers in `bkd_utils/data`, and the current
folder takes the place of the checkout: fetched and computed things go to `work/` there. In both cases the environment
variables BKD_WORK and BKD_ASSETS name other folders."""

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).resolve().parents[1]
# The two marks together, because other packages leave folders called `data` beside installed ones.
CHECKOUT = (PACKAGE.parent / "pyproject.toml").is_file() and (PACKAGE.parent / "data" / "attacks.toml").is_file()
ROOT = PACKAGE.parent if CHECKOUT else Path.cwd()
DATA = (ROOT if CHECKOUT else PACKAGE) / "data"
FIGURES = ROOT / "figures"
NOTEBOOKS = ROOT / "notebooks"
# About a model of the reader's own, which is trained and measured; runs when asked for, and nothing of it ships.
ON_REQUEST = frozenset({"08_your_own_model"})
# Fetched and computed things are ignored by git; both folders can be shared between clones.
WORK = Path(os.environ.get("BKD_WORK") or ROOT / "work").expanduser().absolute()
ASSETS = Path(os.environ.get("BKD_ASSETS") or (DATA if CHECKOUT else WORK) / "assets").expanduser().absolute()
for _name, _path in (("BKD_WORK", WORK), ("BKD_ASSETS", ASSETS)):
    if os.environ.get(_name):  # absolute, because kernels run in another folder
        os.environ[_name] = str(_path)
ADAPTERS = (DATA if CHECKOUT else WORK) / "adapters"  # organisms do not come with a wheel


class UserError(RuntimeError):
    """Something the user can mend; shown as one line, without a traceback."""


def check_writable(*folders: Path) -> None:
    """Make folders and write a file in each. Raises UserError that names the one where this is not possible."""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as handle:
                handle.write(b"x" * 4096)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from error


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target` to write a file or folder to. On success it replaces `target`; on any
    error, Ctrl-C included, it is removed and `target` stays as it was."""
    target.parent.mkdir(parents=True, exist_ok=True)
    # A name of its own for every writer: two of them may write the same target at once, and one whole file remains.
    own = f"{secrets.token_hex(4)}.{os.getpid()}.part"
    temporary, aside = (target.with_name(f".{target.name}.{kind}{own}") for kind in ("", "old."))
    try:
        yield temporary
        if temporary.is_dir() and target.exists():
            # os.replace cannot replace a folder that has content, so the old one steps aside first.
            os.replace(target, aside)
        os.replace(temporary, target)
    finally:
        if aside.exists() and not target.exists():
            os.replace(aside, target)
        _remove(temporary)
        _remove(aside)


def sweep(paths: Iterable[Path]) -> None:
    """Remove what killed processes left half-written; such names end in the number of the process, as in
    `atomic_path`."""
    from psutil import pid_exists  # only here: `doctor` imports this module where packages are missing

    for path in paths:
        number = path.name.removesuffix(".part").rsplit(".", 1)[-1]
        if not (number.isdecimal() and pid_exists(int(number))):
            with suppress(OSError):  # another process removes it too, or it is another user's; it is in nobody's way
                _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def canonical_json(value: Any) -> str:
    """One text per value: sorted keys, no spaces, NaN refused. The basis of every content key."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, ensure_ascii=False)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically. Raises ValueError for NaN and infinities."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def keep_json(path: Path, value: Any) -> None:
    """`write_json` of something that can be computed again: where it cannot be written, a warning says so."""
    try:
        write_json(path, value)
    except OSError as error:
        logging.getLogger(__name__).warning("%s could not be kept: %s", path, error.strerror or error)


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises ValueError that names the file when it does not parse."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def sha256_text(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
