"""Check what people write: tables, names, sizes and shapes. Every error is one line that says what is allowed."""

import dataclasses
import functools
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from pydantic import model_validator as validator

from bkd_utils.common.files import DATA

T = TypeVar("T")
STRICT = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class Table(BaseModel):
    """A table whose keys are fields of a subclass. Types are strict: "100" is no number, and True is none either."""

    model_config = STRICT

    @validator(mode="before")
    @classmethod
    def _known(cls, given: Any) -> Any:
        if isinstance(given, dict) and (unknown := [key for key in given if key not in cls.model_fields]):
            raise ValueError(f"unknown keys: {', '.join(map(str, unknown))}; known: {', '.join(cls.model_fields)}")
        return given


def _name(text: str) -> str:
    if not (text.isascii() and text.replace("-", "").replace("_", "").replace(".", "").isalnum()):
        raise ValueError("a name has letters, digits, '-', '_' and '.', nothing else")
    if text[0] in ".-" or len(text) > 80:
        raise ValueError("a name does not begin with '.' or '-' and has at most 80 characters")
    return text


def _text(text: str) -> str:
    if not text or text != text.strip():
        raise ValueError("a text is not empty and has no white space at its ends")
    return text


Name = Annotated[str, AfterValidator(_name)]
Text = Annotated[str, AfterValidator(_text)]
Texts = Annotated[list[Text], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Count = Annotated[int, Field(ge=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


def check(kind: Any, value: Any, where: str) -> Any:
    """Raise ValueError unless the value is of a kind: a type with its limits, a Table, or a dataclass by its fields.
    Returns the value; where the kind is a Table, the Table that is made of it."""
    try:
        return _adapter(kind).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{where}: {'; '.join(map(_told, error.errors()[:3]))}") from None


def check_known(what: str, name: Any, known: Iterable[str]) -> None:
    """Raise ValueError, which lists the known names, for a name of something that is not among them."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r}; known: {', '.join(known)}")


@functools.cache
def _adapter(kind: Any) -> TypeAdapter:
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind, include_extras=True)
        needed = {one.name: ... if one.default is dataclasses.MISSING else one.default for one in fields(kind)}
        kind = create_model(kind.__name__, __base__=Table, **{name: (hints[name], needed[name]) for name in needed})
    return TypeAdapter(kind, config=None if hasattr(kind, "model_config") else STRICT)


def _told(error: dict[str, Any]) -> str:
    """The place, the value, and what is allowed there."""
    place, value = ".".join(map(str, error["loc"])), repr(error["input"])
    if error["type"] == "missing":
        return f"{place} is missing"
    told = error["msg"].removeprefix("Value error, ")
    shown = [] if isinstance(error["input"], dict) else [value if len(value) <= 60 else f"{value[:57]}..."]
    lead = " = ".join([*filter(None, [place]), *shown])
    return f"{lead}: {told[0].lower()}{told[1:]}" if lead else told


def build(kind: type[T], table: dict[str, Any], path: Path, name: str) -> T:
    """A dataclass of a table and its name. Raises ValueError that names file, table, key and what is allowed."""
    where = f"{path.name}, [{name}]"
    if "name" in table:
        raise ValueError(f"{where}: name = {table['name']!r}: the name of a table is its heading")
    check(kind, {"name": name, **table}, where)
    try:
        return kind(name=name, **table)
    except ValueError as error:
        raise ValueError(f"{where}: {str(error).removeprefix(f'{name}: ')}") from None


def read_text(path: Path) -> str:
    """A text file in UTF-8, with or without a byte order mark. Raises ValueError that names it and what is wrong."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        why = f"{error.reason} at byte {error.start}"
        raise ValueError(f"{path} is not UTF-8 text ({why}); save it as UTF-8") from error


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file, read by `read_text`. Raises ValueError that names the file and what is wrong."""
    try:
        return tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: {error}") from error


def read_tables(path: Path) -> dict[str, dict[str, Any]]:
    """The tables of a TOML file by name. Raises ValueError for a name that is none, and for a value outside of them."""
    return check(dict[Name, dict[str, Any]], read_toml(path), path.name)


def while_unchanged(*tables: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Keep the results of a function until one of these tables of `data/` is edited, as people do in a notebook."""

    def keeping(function: Callable[..., T]) -> Callable[..., T]:
        kept = functools.lru_cache(maxsize=64)(lambda _stamps, *args, **options: function(*args, **options))
        return functools.wraps(function)(lambda *args, **options: kept(_stamps(tables), *args, **options))

    return keeping


def _stamps(tables: Sequence[str]) -> tuple:
    paths = [DATA / name for name in tables]
    found = [path.stat() if path.is_file() else None for path in paths]
    return (str(DATA), *(one and (one.st_mtime_ns, one.st_size, one.st_ino) for one in found))


def check_shape(what: str, tensor: Any, **sizes: int | None) -> None:
    """Raise ValueError unless a tensor or array has these axes (None: of any size but 0), and finite values."""
    shape, wanted = tuple(tensor.shape), tuple(sizes.values())
    fits = len(shape) == len(wanted) and all(size in (None, own) for own, size in zip(shape, wanted, strict=True))
    if not fits or 0 in shape:
        axes = ", ".join(axis if size is None else f"{size} {axis}" for axis, size in sizes.items())
        raise ValueError(f"{what} must have the shape [{axes}], not {list(shape)}")
    if not bool((abs(tensor) < float("inf")).all()):
        raise ValueError(f"{what} has values that are not finite")
