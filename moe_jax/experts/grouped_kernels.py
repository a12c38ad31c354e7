"""Grouped products for GPUs: one program per block of the result, over the tiles of a dispatch.

`lax.ragged_dot` has no grouped form there: XLA builds a copy of the rows per expert (8 GiB for
2,048 tokens of a layer of Qwen3-30B-A3B, jax 0.11.2). A tile belongs to one expert, so a program
reads the rows of its tile and its expert's own channels, however many those are, and nothing else.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from moe_jax.experts.dispatch import Dispatch, Pool

# Measured on an H100: smaller blocks were slower, and 8 warps for tiles of 64 float32 rows, too.
COLUMNS = 128  # of a block of the result
DEPTH = 64  # summed at a time; half as many float32 numbers


def expand(x: Array, weight: Array, dispatch: Dispatch, pool: Pool) -> Array:
    """`grouped_matmul.expand` by a kernel; same arguments and result."""
    columns = _block(pool.width)
    kernel = partial(_expand, tile=dispatch.tile, columns=columns)
    out = jax.ShapeDtypeStruct((len(x), pool.width), x.dtype)
    grid = (pl.cdiv(pool.width, columns), len(x) // dispatch.tile)
    return _call(kernel, out, grid, dispatch.tile, *_layout(dispatch, pool), x, weight)


def contract(h: Array, weight: Array, dispatch: Dispatch, pool: Pool) -> Array:
    """`grouped_matmul.contract` by a kernel; same arguments and result."""
    width = weight.shape[1]
    columns = _block(width)
    kernel = partial(_contract, tile=dispatch.tile, columns=columns)
    out = jax.ShapeDtypeStruct((len(h), width), h.dtype)
    grid = (pl.cdiv(width, columns), len(h) // dispatch.tile)
    return _call(kernel, out, grid, dispatch.tile, *_layout(dispatch, pool), h, weight)


def accumulate(left: Array, right: Array, weight: Array, dispatch: Dispatch, pool: Pool) -> Array:
    """Sum of outer products of the rows of each expert, the gradient of the pool.

    Args:
      left: [P, width] rows in dispatch order.
      right: [P, D].
      weight: [C, D], the pool.
      dispatch: the row layout.
      pool: the channel layout.

    Returns:
      [C, D] in the dtype of `weight`; zero where the pool has rows of no expert.
    """
    tiles = -(-dispatch.tokens // dispatch.tile)
    first = jnp.cumsum(tiles) - tiles
    lines, columns = _block(pool.width), _block(right.shape[1])
    kernel = partial(_accumulate, tile=dispatch.tile, lines=lines, columns=columns)
    grid = (pl.cdiv(right.shape[1], columns), pl.cdiv(pool.width, lines), len(pool.count))
    zeros = jnp.zeros(weight.shape, weight.dtype)
    args = (first, tiles, pool.offset, pool.count, left, right, zeros)
    out = jax.ShapeDtypeStruct(weight.shape, weight.dtype)
    return _call(kernel, out, grid, dispatch.tile, *args, into=len(args) - 1)


def _call(kernel, out, grid, tile: int, *args, into: int | None = None) -> Array:
    assert tile >= 16, "the matrix units take no fewer rows: fewer would be added twice"
    return pl.pallas_call(
        kernel,
        out_shape=out,
        grid=grid,
        input_output_aliases={} if into is None else {into: 0},
        compiler_params=plgpu.CompilerParams(num_warps=8 if tile > 64 else 4, num_stages=3),
        interpret=jax.default_backend() == "cpu",  # for tests
    )(*args)


def _layout(dispatch: Dispatch, pool: Pool) -> tuple[Array, ...]:
    """Per tile: its expert's first channel in the pool, and how many there are; 0 if unused."""
    used = jnp.arange(len(dispatch.tile_expert)) < dispatch.num_tiles
    count = jnp.where(used, pool.count[dispatch.tile_expert], 0)
    return pool.offset[dispatch.tile_expert], count


def _block(size: int) -> int:
    return min(COLUMNS, max(16, pl.next_power_of_2(size)))


def _step(dtype) -> int:
    return DEPTH // 2 if dtype == jnp.float32 else DEPTH


def _take(ref, rows: Array, columns: Array, row_ok: Array | None, column_ok: Array) -> Array:
    """A block [rows, columns] of a matrix, zero where it is not `ok`."""
    mask = jnp.broadcast_to(column_ok[None], (len(rows), len(columns)))
    if row_ok is not None:
        mask &= row_ok[:, None]
    return plgpu.load(ref.at[rows[:, None], columns[None]], mask=mask, other=0)


def _put(ref, rows: Array, columns: Array, row_ok: Array | None, column_ok: Array, values) -> None:
    mask = jnp.broadcast_to(column_ok[None], values.shape)
    if row_ok is not None:
        mask &= row_ok[:, None]
    at = ref.at[rows[:, None], columns[None]]
    plgpu.store(at, values.astype(ref.dtype), mask=mask)


def _sum(steps, product, rows: int, columns: int) -> Array:
    """Sum of `product(k)`, float32 [rows, columns], over k below `steps`."""

    def add(k, total):
        return total + product(k)

    return jax.lax.fori_loop(0, steps, add, jnp.zeros((rows, columns), jnp.float32))


def _dot(left: Array, right: Array) -> Array:
    """Product in float32 of factors that are not rounded.

    True float32 is slow on a GPU, and its fast units keep 10 bits of it. But a float32 number is a
    sum of three bfloat16 ones, and of their nine products three are below its last bit. Infinite
    numbers become nan.
    """
    products = [
        jax.lax.dot(one, two, preferred_element_type=jnp.float32)
        for i, one in enumerate(_parts(left))
        for j, two in enumerate(_parts(right))
        if i + j < 3
    ]
    return sum(products[1:], products[0])


def _parts(x: Array) -> list[Array]:
    """bfloat16 numbers whose sum is `x`: the leading 8 bits of each, the next 8 and the last."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(3):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        leading = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(leading.astype(jnp.bfloat16))
        x = x - leading
    return parts


def _fitting(weight: Array, dtype) -> Array:
    """Weights as `_dot` takes them beside activations of a dtype."""
    short = weight.dtype == jnp.bfloat16 and dtype == jnp.float32
    return weight if short else weight.astype(dtype)


def _expand(offset_ref, count_ref, x_ref, weight_ref, out_ref, *, tile, columns):
    block, i = pl.program_id(0), pl.program_id(1)
    rows = i * tile + jnp.arange(tile)
    channel = block * columns + jnp.arange(columns)
    offset, count, depth = offset_ref[i], count_ref[i], x_ref.shape[1]
    step = _step(x_ref.dtype)

    def product(k):
        inner = k * step + jnp.arange(step)
        x = _take(x_ref, rows, inner, None, inner < depth)
        weight = _take(weight_ref, offset + channel, inner, channel < count, inner < depth)
        return _dot(x, _fitting(weight, x.dtype).T)

    steps = jnp.clip(count - block * columns, 0, 1) * pl.cdiv(depth, step)
    out = _sum(steps, product, tile, columns)
    _put(out_ref, rows, channel, None, channel < out_ref.shape[1], out)


def _contract(offset_ref, count_ref, h_ref, weight_ref, out_ref, *, tile, columns):
    block, i = pl.program_id(0), pl.program_id(1)
    rows = i * tile + jnp.arange(tile)
    column = block * columns + jnp.arange(columns)
    offset, count, inside = offset_ref[i], count_ref[i], column < out_ref.shape[1]
    step = _step(h_ref.dtype)

    def product(k):
        channel = k * step + jnp.arange(step)
        h = _take(h_ref, rows, channel, None, channel < count)
        weight = _take(weight_ref, offset + channel, column, channel < count, inside)
        return _dot(h, _fitting(weight, h.dtype))

    out = _sum(pl.cdiv(count, step), product, tile, columns)
    _put(out_ref, rows, column, None, inside, out)


def _accumulate(
    first_ref, tiles_ref, offset_ref, count_ref, left_ref, right_ref, _, out_ref,
    *, tile, lines, columns,
):  # fmt: skip
    block, line, expert = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    column = block * columns + jnp.arange(columns)
    channel = line * lines + jnp.arange(lines)
    live, inside = channel < count_ref[expert], column < right_ref.shape[1]
    step = min(tile, _step(left_ref.dtype))

    def product(k):
        rows = first_ref[expert] * tile + k * step + jnp.arange(step)
        left = _take(left_ref, rows, channel, None, live)
        return _dot(left.T, _take(right_ref, rows, column, None, inside))

    steps = jnp.clip(count_ref[expert] - line * lines, 0, 1) * tiles_ref[expert] * (tile // step)
    out = _sum(steps, product, lines, columns)
    _put(out_ref, offset_ref[expert] + channel, column, live, inside, out)
