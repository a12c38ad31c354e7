"""Fewer experts for each token, with all weights as they are: what is read and computed shrinks."""

from dataclasses import dataclass

import jax.numpy as jnp
from jax import Array

from moe_jax.errors import InputError
from moe_jax.experts.dispatch import Dispatch, gather_rows
from moe_jax.experts.router import TINY


@dataclass(frozen=True)
class Fewer:
    """Which of the experts that the router picks a token still goes to.

    Attributes:
      top_k: the best so many of them, as if the model's number of experts per token were that.
      skip_below: those whose routing weight is at least this share of the token's largest; 0 skips
        none. Source: arXiv 2402.14800, which does so for the second of two experts.

    Raises:
      InputError: a value is out of range.
    """

    top_k: int
    skip_below: float = 0.0

    def __post_init__(self) -> None:
        if self.top_k < 1:
            raise InputError(f"top_k={self.top_k} must be at least 1, the token's best expert")
        if not 0.0 <= self.skip_below <= 1.0:
            raise InputError(
                f"skip_below={self.skip_below} must lie in (0, 1], a share of the routing weight "
                "of the token's best expert; choose e.g. 0.1"
            )


def fewer_rows(
    row_weight: Array,  # float32 [P]
    dispatch: Dispatch,
    tokens: int,
    fewer: tuple[Array, Array],
    *,
    renormalize: bool,
) -> tuple[Array, Array]:
    """Routing weights when tokens go to fewer of the experts that they were dispatched to.

    Args:
      row_weight: of the rows of `dispatch`.
      dispatch: copies of each token, its best expert first.
      tokens: N.
      fewer: `Fewer`'s numbers, so that one compilation serves all of them.
      renormalize: as of the router: what is left of a token's weights adds up to what they did.

    Returns:
      (float32 [P], 0 where an expert is left out; int32, how many rows are left).
    """
    top_k, skip_below = fewer
    copies = jnp.zeros(tokens * dispatch.copies, row_weight.dtype)
    weight = copies.at[dispatch.row_copy].set(row_weight, mode="drop").reshape(tokens, -1)
    stays = (jnp.arange(dispatch.copies) < top_k)[None]
    stays &= weight >= skip_below * weight.max(axis=1, keepdims=True)
    left = jnp.where(stays, weight, 0.0)
    if renormalize:
        left *= weight.sum(axis=1, keepdims=True) / (left.sum(axis=1, keepdims=True) + TINY)
    real = gather_rows(stays.reshape(-1), dispatch, 1)
    return gather_rows(left.reshape(-1), dispatch, 1), real.sum(dtype=jnp.int32)
