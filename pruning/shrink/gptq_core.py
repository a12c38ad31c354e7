"""GPTQ for one matrix: 4-bit codes that keep the outputs, not the weights, close.

Rounding weight i moves the output by its error times input i. The later inputs are correlated with
input i, so their weights can make up for part of it. With H = R R^T, R upper triangular, the
squared output error of a row with weight errors e is |R^T e|^2, and R^T is *lower* triangular:
choosing inputs in order, the best target of input j is its weight plus the errors so far, weighted
by column j of R over R_jj. That is GPTQ without an inverse of H.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moe_jax.errors import InputError
from moe_jax.quant import best_scale, nearest_codes

DAMPING = 0.01  # of the mean diagonal of H, as in the paper
HIGHEST = jax.lax.Precision.HIGHEST  # accelerators would round the compensation


@struct.dataclass
class Coded:
    """A weight [out, in] in 4 bits.

    Attributes:
      codes: int8 [out, in], -8..7.
      scale: float32 [out, in / g], see `best_scale`.
      solved: bool, False if the second moments could not be factored; the codes are then void.
    """

    codes: Array
    scale: Array
    solved: Array


def feedback(moments: Array, damping: float = DAMPING) -> tuple[Array, Array]:
    """How the errors of earlier inputs move the target of a later one.

    Args:
      moments: float32 [in, in], sum of x x^T over calibration rows. An input that was never
        active has a zero row and column: it neither gives nor takes.
      damping: added to the diagonal, as a fraction of its mean over active inputs; positive.

    Returns:
      (float32 [in, in], strictly upper triangular; whether the factorisation succeeded).

    Source: arXiv:2210.17323, with the Cholesky factor of H in reverse order instead of that of
      its inverse.
    """
    diagonal = jnp.diagonal(moments)
    active = jnp.maximum(jnp.sum(diagonal > 0, dtype=jnp.float32), 1)
    ridge = damping * jnp.sum(diagonal) / active
    damped = moments + ridge * jnp.eye(len(moments), dtype=moments.dtype)
    factor = jnp.linalg.cholesky(damped[::-1, ::-1])[::-1, ::-1]  # upper triangular
    weights = jnp.triu(factor / jnp.diagonal(factor)[None, :], 1)
    return weights, jnp.all(jnp.isfinite(weights))


@partial(jax.jit, static_argnames="group_size")
def gptq(weight: Array, moments: Array, *, group_size: int, damping: float = DAMPING) -> Coded:
    """Quantise a matrix in the metric of its inputs, in their given order.

    A group is also the block in which errors are applied one input at a time; groups before it
    enter as one matrix product. Its scale is taken from the compensated targets.

    Args:
      weight: [out, in], any float dtype.
      moments: float32 [in, in], see `feedback`.
      group_size: inputs per scale; must divide in.
      damping: see `feedback`.

    Returns:
      The codes and scales; a void result is all zeros.

    Raises:
      InputError: if the group size does not divide the inputs.
    """
    outputs, inputs = weight.shape
    if inputs % group_size:
        raise InputError(f"group_size={group_size} must divide the {inputs} inputs of the weight")
    move, solved = feedback(moments, damping)
    target = weight.astype(jnp.float32).T  # [in, out]: one input is one contiguous row

    def group(errors: Array, start: Array) -> tuple[Array, tuple[Array, Array]]:
        rows = jax.lax.dynamic_slice_in_dim(target, start, group_size)  # [g, out]
        columns = jax.lax.dynamic_slice_in_dim(move, start, group_size, axis=1)  # [in, g]
        moved = rows + jnp.einsum("ig,io->go", columns, errors, precision=HIGHEST)
        inside = jax.lax.dynamic_slice_in_dim(columns, start, group_size)  # [g, g]
        scale = best_scale(_unrounded(moved, inside, rows))  # [out]
        codes = _group_codes(moved, inside, rows, scale)
        own = rows - codes * scale[None]
        return jax.lax.dynamic_update_slice_in_dim(errors, own, start, 0), (codes, scale)

    starts = jnp.arange(0, inputs, group_size)
    _, (codes, scale) = jax.lax.scan(group, jnp.zeros_like(target), starts)
    codes = jnp.where(solved, codes.reshape(inputs, outputs), 0).T.astype(jnp.int8)
    return Coded(codes=codes, scale=jnp.where(solved, scale, 0).T, solved=solved)


def _unrounded(moved: Array, inside: Array, rows: Array) -> Array:
    """Where the targets [g, out] of a group would settle if its weights were not rounded."""
    shift = jax.scipy.linalg.solve_triangular(
        inside.T, moved - rows, lower=True, unit_diagonal=True
    )
    return rows + shift


def _group_codes(moved: Array, inside: Array, rows: Array, scale: Array) -> Array:
    """Codes [g, out] of one group: `moved` are its targets before its own errors count."""

    def step(j: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        codes, errors = state
        aim = moved[j] + jnp.einsum("g,go->o", inside[:, j], errors, precision=HIGHEST)
        code = nearest_codes(aim, scale)
        return codes.at[j].set(code), errors.at[j].set(rows[j] - code * scale)

    return jax.lax.fori_loop(0, len(rows), step, (jnp.zeros_like(rows), jnp.zeros_like(rows)))[0]
