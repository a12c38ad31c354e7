"""Whether values read from JSON are of the types that a dataclass declares."""

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any


def misfits(declared: type, values: Mapping[str, Any]) -> list[str]:
    """Names of fields that lack a value, of values of another type, and of those of no field.

    Args:
      declared: a dataclass, whose fields with a default may be missing, or a TypedDict, beside
        whose keys there may be more.
      values: by name.
    """
    hints = typing.get_type_hints(declared)
    if is_open := typing.is_typeddict(declared):
        required = declared.__required_keys__  # pyright: ignore[reportAttributeAccessIssue]
    else:
        required = {one.name for one in dataclasses.fields(declared) if _is_required(one)}
    wrong = [
        name
        for name, value in values.items()
        if (not fits(value, hints[name]) if name in hints else not is_open)
    ]
    return [*sorted(required - values.keys()), *wrong]


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is field.default_factory is dataclasses.MISSING


def fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value is of a type, whole numbers counting as floats and lists as tuples.

    Whole numbers have 64 bits, others are finite, as JSON's are.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is typing.Literal:
        return isinstance(value, str) and value in inner
    if typing.is_typeddict(kind):
        return isinstance(value, dict) and not misfits(kind, value)
    if origin in (types.UnionType, typing.Union):
        return any(fits(value, one) for one in inner)
    if origin in (list, tuple):
        return isinstance(value, list) and all(fits(one, inner[0]) for one in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(fits(one, inner[1]) for one in value.values())
    if type(value) is int and kind in (int, float):
        return abs(value) < 1 << 63
    return type(value) is kind and (kind is not float or math.isfinite(value))
