"""What a Flax module is in this project: a frozen dataclass that is also a pytree."""

import dataclasses
from typing import TypeVar, dataclass_transform

from flax import nnx

M = TypeVar("M", bound=type)


@dataclass_transform(
    frozen_default=True, kw_only_default=True, field_specifiers=(nnx.data, nnx.static)
)
def module(cls: M) -> M:
    """Make an `nnx.Module` class a frozen, keyword-only dataclass.

    Every field must be declared `nnx.data()` (a leaf or a subtree of the pytree) or
    `nnx.static()` (hashable, part of the tree structure). An undeclared field would be
    classified when it is assigned, and under a trace that silently becomes static.

    Args:
      cls: a subclass of `nnx.Module` with annotated fields.

    Returns:
      The same class, constructible by keyword and immutable; `dataclasses.replace` copies it.
    """
    return dataclasses.dataclass(frozen=True, eq=False, repr=False, kw_only=True)(cls)  # type: ignore[return-value]
