"""Results of stages as frozen dataclasses that can be written as JSON and read again."""

from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, Self, Union, get_args, get_origin, get_type_hints


class Result:
    """Base of frozen dataclasses whose fields are JSON values, other Results, or lists and dictionaries of both."""

    def to_json(self) -> dict[str, Any]:
        """The fields by name, as plain JSON values."""
        return {field.name: plain(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """The result that `to_json` was made of. Raises ValueError that names missing or unknown fields."""
        if not isinstance(value, Mapping):
            raise ValueError(f"{cls.__name__} is made of a dictionary, not of {type(value).__name__}")
        kinds = get_type_hints(cls)
        problems = {"missing": kinds.keys() - value.keys(), "unknown": value.keys() - kinds.keys()}
        if told := "; ".join(f"{kind}: {', '.join(sorted(wrong))}" for kind, wrong in problems.items() if wrong):
            raise ValueError(f"{cls.__name__} has other fields ({told})")
        return cls(**{name: restored(kinds[name], inside) for name, inside in value.items()})


def plain(value: Any) -> Any:
    """A value with every Result in it replaced by its `to_json`, and every tuple by a list."""
    if isinstance(value, Result):
        return value.to_json()
    if isinstance(value, Mapping):
        return {name: plain(inside) for name, inside in value.items()}
    return [plain(inside) for inside in value] if isinstance(value, list | tuple) else value


def restored(kind: Any, value: Any) -> Any:
    """A JSON value with Results where the annotation `kind` names them. Raises ValueError where none can be made."""
    if isinstance(kind, type) and issubclass(kind, Result):
        return kind.from_json(value)
    inside, origin = get_args(kind), get_origin(kind)
    if origin in (Union, UnionType):
        results = [one for one in inside if one is not type(None)]
        return restored(results[0], value) if len(results) == 1 and value is not None else value
    if origin is list and isinstance(value, list):
        return [restored(inside[0], one) for one in value]
    if origin is dict and isinstance(value, Mapping):
        return {name: restored(inside[1], one) for name, one in value.items()}
    if origin in (list, dict):
        raise ValueError(f"{value!r:.80} is no {origin.__name__}")
    return value
