"""Statistics of a user's own: sums over the experts' hidden rows that the sweep then collects.

An entry of `STATISTICS` is collected with the rest, saved, loaded and merged; a criterion reads it
as `statistics[name]`.
"""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from flax import struct
from jax import Array

from moe_jax.errors import InputError
from moe_jax.experts.dispatch import Dispatch, sum_by_expert

PREFIX = "extra."  # of its name among the arrays of a sweep and of a file


@struct.dataclass
class HiddenRows:
    """One batch's tokens as the experts of a layer see them, a row for each expert of a token.

    Attributes:
      hidden: float32 [P, F], the intermediate activation h.
      weight: float32 [P], routing weight.
      output_square: float32 [P], squared norm of the expert's output before the routing weight.
    """

    hidden: Array
    weight: Array
    output_square: Array


@dataclasses.dataclass(frozen=True)
class Statistic:
    """A sum over the tokens of each expert.

    Attributes:
      of: rows -> what each adds, [P, F] for axes "LEF" and [P] for "LE"; jitted. Rows that belong
        to no token count nothing, whatever it returns for them.
      axes: "LEF" for a value per channel, "LE" for one per expert.
      about: one line on what it is.
    """

    of: Callable[[HiddenRows], Array]
    axes: str = "LEF"
    about: str = ""

    def __post_init__(self) -> None:
        if self.axes not in ("LEF", "LE"):
            raise InputError(f"axes={self.axes!r} of a statistic must be 'LEF' or 'LE'")


STATISTICS: dict[str, Statistic] = {}

Own = tuple[tuple[str, Statistic], ...]  # what was registered when a sweep began


def own_sums(own: Own, rows: HiddenRows, dispatch: Dispatch, copies: int) -> dict[str, Array]:
    """Every registered sum over one batch, float32 [E, F] or [E], under its prefixed name.

    Args:
      own: items of `STATISTICS`.
      rows: in dispatch order.
      dispatch: the row layout.
      copies: tokens times experts per token; rows beyond them are padding.

    Raises:
      InputError: a statistic returns another shape than its axes say.
    """
    found = {}
    for name, statistic in own:
        value = statistic.of(rows)
        expected = rows.hidden.shape if statistic.axes == "LEF" else rows.weight.shape
        if value.shape != expected:
            raise InputError(
                f"statistic {name!r} returns {list(value.shape)}, expected {list(expected)} for "
                f"axes {statistic.axes!r}"
            )
        real = (dispatch.row_copy < copies).reshape(-1, *[1] * (value.ndim - 1))
        found[PREFIX + name] = sum_by_expert(jnp.where(real, value, 0.0), dispatch)
    return found
