"""Whether values read from JSON are of the types that a dataclass declares."""

import types
import typing
from collections.abc import Mapping
from typing import Any


def misfits(declared: type, values: Mapping[str, Any]) -> list[str]:
    """Names of the values that are not of the type of the field of their name."""
    hints = typing.get_type_hints(declared)
    return [name for name, value in values.items() if not fits(value, hints[name])]


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type, whole numbers counting as floats and lists as tuples."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(one, inner[1]) for one in value.values())
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind
