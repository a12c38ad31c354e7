"""Matrix products of many token rows with the experts they are routed to.

`expand` and `contract` are each other's adjoint; with `accumulate`, the gradient of the weights,
that is all that training and attribution need. On a CPU they are loops over tiles, which can be
differentiated again; on a GPU kernels, elsewhere `lax.ragged_dot`.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.experts.dispatch import Dispatch, Pool
from moe_jax.linear import outer


@jax.custom_vjp
def expand(x: Array, weight: Array, dispatch: Dispatch, pool: Pool) -> Array:
    """Multiply each row with every channel of its expert.

    Args:
      x: [P, D] rows in dispatch order.
      weight: [C, D] pool of channels, any float dtype; products are accumulated in float32.
      dispatch: the row layout.
      pool: the channel layout.

    Returns:
      [P, width] in the dtype of `x`; columns beyond an expert's count are zero.
    """
    chex.assert_shape(x, (*dispatch.row_copy.shape, weight.shape[1]))
    return form().expand(x, weight, dispatch, pool)


@jax.custom_vjp
def contract(h: Array, weight: Array, dispatch: Dispatch, pool: Pool) -> Array:
    """Sum each row's channels weighted by the channel vectors of its expert.

    Args:
      h: [P, width] rows in dispatch order.
      weight: [C, D] pool of channels.
      dispatch: the row layout.
      pool: the channel layout.

    Returns:
      [P, D] in the dtype of `h`.
    """
    chex.assert_shape(h, (*dispatch.row_copy.shape, pool.width))
    return form().contract(h, weight, dispatch, pool)


def _expand_bwd(saved, d_out):
    x, weight, dispatch, pool = saved
    d_weight = form().accumulate(d_out, x, weight, dispatch, pool)
    return form().contract(d_out, weight, dispatch, pool), d_weight, None, None


def _contract_bwd(saved, d_out):
    h, weight, dispatch, pool = saved
    d_weight = form().accumulate(h, d_out, weight, dispatch, pool)
    return form().expand(d_out, weight, dispatch, pool), d_weight, None, None


expand.defvjp(lambda *args: (form().expand(*args), args), _expand_bwd)
contract.defvjp(lambda *args: (form().contract(*args), args), _contract_bwd)


# --- CPU: a loop over tiles; XLA lowers ragged_dot to a dense masked product there ---


# XLA:CPU of jax 0.10 widens a pool of bfloat16 before a loop takes slices of it. Bits are not
# widened, but copied.
COPIES_POOLS = jax.__version_info__ < (0, 11)


def weight_bits(weight: Array) -> Array:
    """A pool as a loop on a CPU takes slices of it, see `float_bits`."""
    if not COPIES_POOLS or weight.dtype != jnp.bfloat16:
        return weight
    return jax.lax.bitcast_convert_type(weight, jnp.uint16)


def float_bits(bits: Array) -> Array:
    """The numbers of `weight_bits`."""
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16) if bits.dtype == jnp.uint16 else bits


def channel_block(bits: Array, start: Array, size: int, dtype) -> Array:
    """Rows start : start + size of a pool in the dtype of the activations."""
    return float_bits(jax.lax.dynamic_slice_in_dim(bits, start, size)).astype(dtype)


def walk_tiles(dispatch: Dispatch, pool: Pool, step, carry):
    """Run `carry = step(carry, row, expert, start)` over every (tile, channel block) in use.

    `row` is the tile's first padded row, `start` the block's first channel inside the expert.
    """

    def tile_step(i, carry):
        expert = dispatch.tile_expert[i]
        row = i * dispatch.tile
        if pool.block == pool.width:
            return step(carry, row, expert, 0)
        blocks = -(-pool.count[expert] // pool.block)

        def inner(j, carry):
            return step(carry, row, expert, j * pool.block)

        return jax.lax.fori_loop(0, blocks, inner, carry)

    return jax.lax.fori_loop(0, dispatch.num_tiles, tile_step, carry)


def add_slice(whole: Array, part: Array, start: tuple) -> Array:
    """`whole` with `part` added to the slice of its shape at `start`."""
    old = jax.lax.dynamic_slice(whole, start, part.shape)
    return jax.lax.dynamic_update_slice(whole, old + part, start)


def live_channels(pool: Pool, expert, start) -> Array:  # bool [1, block]
    """Which channels of a block the expert owns; the others belong to the next expert."""
    return start + jnp.arange(pool.block)[None] < pool.count[expert]


dot = partial(
    jax.lax.dot_general, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def _expand_tiles(x, weight, dispatch, pool):
    bits, tile = weight_bits(weight), dispatch.tile

    def step(out, row, expert, start):
        rows = jax.lax.dynamic_slice_in_dim(x, row, tile)
        channels = channel_block(bits, pool.offset[expert] + start, pool.block, x.dtype)
        product = dot(rows, channels, (((1,), (1,)), ((), ())))
        product = jnp.where(live_channels(pool, expert, start), product, 0).astype(x.dtype)
        return jax.lax.dynamic_update_slice(out, product, (row, start))

    return walk_tiles(dispatch, pool, step, jnp.zeros((x.shape[0], pool.width), x.dtype))


def _contract_tiles(h, weight, dispatch, pool):
    bits, tile = weight_bits(weight), dispatch.tile

    def step(out, row, expert, start):
        rows = jax.lax.dynamic_slice(h, (row, start), (tile, pool.block))
        rows = jnp.where(live_channels(pool, expert, start), rows, 0)
        channels = channel_block(bits, pool.offset[expert] + start, pool.block, h.dtype)
        product = dot(rows, channels, (((1,), (0,)), ((), ())))
        if pool.block != pool.width:
            product += jax.lax.dynamic_slice_in_dim(out, row, tile)
        return jax.lax.dynamic_update_slice_in_dim(out, product, row, 0)

    out = jnp.zeros((h.shape[0], weight.shape[1]), jnp.float32)
    return walk_tiles(dispatch, pool, step, out).astype(h.dtype)


def _accumulate_tiles(left, right, weight, dispatch, pool):
    tile = dispatch.tile

    def step(out, row, expert, start):
        channels = jax.lax.dynamic_slice(left, (row, start), (tile, pool.block))
        channels = jnp.where(live_channels(pool, expert, start), channels, 0)
        rows = jax.lax.dynamic_slice_in_dim(right, row, tile)
        first = pool.offset[expert] + start
        return add_slice(out, outer(channels, rows), (first, 0))

    return walk_tiles(dispatch, pool, step, jnp.zeros(weight.shape, jnp.float32)).astype(
        weight.dtype
    )


# --- elsewhere: lax.ragged_dot over experts padded to one width ---


_ragged_dot = partial(jax.lax.ragged_dot, precision=jax.lax.Precision.HIGHEST)


def _padded_experts(weight: Array, pool: Pool) -> Array:  # [C, D] -> [E, width, D]
    channel = jnp.arange(pool.width)
    index = pool.offset[:, None] + jnp.minimum(
        channel[None], jnp.maximum(pool.count[:, None] - 1, 0)
    )
    live = channel[None] < pool.count[:, None]
    return jnp.where(live[:, :, None], weight.at[index].get(mode="clip"), 0)


def _tile_rows(dispatch: Dispatch) -> Array:  # rows of each expert, padding included
    return -(-dispatch.tokens // dispatch.tile) * dispatch.tile


def _expand_ragged_dot(x, weight, dispatch, pool):
    experts = jnp.swapaxes(_padded_experts(weight, pool), 1, 2).astype(x.dtype)
    return _ragged_dot(x, experts, _tile_rows(dispatch)).astype(x.dtype)


def _contract_ragged_dot(h, weight, dispatch, pool):
    experts = _padded_experts(weight, pool).astype(h.dtype)
    return _ragged_dot(h, experts, _tile_rows(dispatch)).astype(h.dtype)


class Products(NamedTuple):
    """One way to compute the products: `expand`, `contract` and the gradient of the pool."""

    expand: Callable[..., Array]
    contract: Callable[..., Array]
    accumulate: Callable[..., Array]  # ([P, width], [P, D], weight, dispatch, pool) -> [C, D]


def _kernels() -> Products:
    from moe_jax.experts import grouped_kernels as kernels

    return Products(kernels.expand, kernels.contract, kernels.accumulate)


FORMS: dict[str, Callable[[], Products]] = {
    "tiles": lambda: Products(_expand_tiles, _contract_tiles, _accumulate_tiles),
    "kernels": _kernels,
    "ragged_dot": lambda: Products(_expand_ragged_dot, _contract_ragged_dot, _accumulate_tiles),
}


def on_cpu() -> bool:
    """Whether experts are run as loops over tiles."""
    return jax.default_backend() == "cpu"


def form() -> Products:
    """The products of the machine that JAX computes on."""
    names = {"cpu": "tiles", "gpu": "kernels"}
    return FORMS[names.get(jax.default_backend(), "ragged_dot")]()
