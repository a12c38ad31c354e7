"""The linear layer that every other one is made of, and the product of its gradient."""

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.quant import Weight, dequantize

OUTER_ROWS = 32  # rows of an axis of their own, see `outer`


def linear(x: Array, weight: Weight, bias: Array | None = None) -> Array:
    """`x [..., in] @ weight.T + bias` for a weight stored [out, in], in the dtype of `x`."""
    wide = dequantize(weight).astype(x.dtype)
    out = jnp.einsum("...i,oi->...o", x, wide, precision=jax.lax.Precision.HIGHEST)
    if bias is None:
        return out
    return out + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))


def outer(left: Array, right: Array) -> Array:
    """Sum of the outer products of rows, [R, A] and [R, B] of one dtype -> float32 [A, B]."""
    if jax.default_backend() != "cpu":
        return _contracted(left, right, (0,))
    if left.dtype == jnp.bfloat16 and left.shape[0] % OUTER_ROWS == 0:
        # XLA:CPU gives a product whose left side is transposed to loops of scalars in bfloat16. Of
        # rows in two axes it makes a transposed copy, and multiplies by the processor's tiles.
        left, right = (rows.reshape(-1, OUTER_ROWS, rows.shape[1]) for rows in (left, right))
        return _contracted(left, right, (0, 1))
    if left.dtype == jnp.float32 and left.shape[1] > right.shape[1]:
        return _contracted(right, left, (0,)).T  # the left side is what it transposes
    return _contracted(left, right, (0,))


def _contracted(left: Array, right: Array, axes: tuple[int, ...]) -> Array:
    return jax.lax.dot_general(
        left,
        right,
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
