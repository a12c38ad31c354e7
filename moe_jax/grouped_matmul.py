"""Matrix products of many token rows with the experts they are routed to.

Rows are laid out in *tiles*: sorted by expert, each expert's rows padded with zero rows to a
multiple of the tile height. A tile therefore belongs to one expert, a product is a loop over
tiles, and a per-expert sum is a sum over tiles. The experts' weights are one pool of channels
`[C, D]`, so experts of different widths, down to zero, cost what they need.

`expand` and `contract` are each other's adjoint; with `accumulate` they are closed under
differentiation, which is all that training and attribution need.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class Dispatch:
    """Which token copy sits in which padded row, and which expert owns which tile.

    `P` padded rows in `M` tiles of `tile` rows; `R` token copies (tokens x experts per token).

    Attributes:
      row_copy: int32 [P], index of the token copy in the row, R for a padding row.
      tile_expert: int32 [M].
      num_tiles: int32 scalar, tiles in use; the others are padding.
      tokens: int32 [E], rows routed to each expert.
      tile: rows per tile.
      copies: experts per token; copy i belongs to token i // copies.
    """

    row_copy: Array
    tile_expert: Array
    num_tiles: Array
    tokens: Array
    tile: int = struct.field(pytree_node=False)
    copies: int = struct.field(pytree_node=False, default=1)

    @property
    def token(self) -> Array:
        """Token of each row, int32 [P]; beyond the last token for a padding row."""
        return self.row_copy // self.copies


@struct.dataclass
class Pool:
    """Where each expert's channels lie in a layer's pool, and how they are walked.

    Attributes:
      offset, count: int32 [E], expert e owns rows offset[e] : offset[e] + count[e].
      width: columns of the intermediate rows; at least every count.
      block: channels per step; the pool has a whole block of rows from every step's start.
    """

    offset: Array
    count: Array
    width: int = struct.field(pytree_node=False)
    block: int = struct.field(pytree_node=False)


def tile_height(rows: int, num_experts: int) -> int:
    """Rows per tile: the power of two at or below half the mean rows per expert, within [8, 128].

    Half a tile per expert is padding, so smaller tiles waste less and larger ones multiply faster.
    """
    half = max(1, rows // (2 * num_experts))
    return min(128, max(8, 1 << (half.bit_length() - 1)))


def make_dispatch(expert: Array, num_experts: int, tile: int, copies: int = 1) -> Dispatch:
    """Lay out token copies in tiles.

    Args:
      expert: int32 [R], expert of each copy; `num_experts` marks a copy that goes nowhere.
      num_experts: E.
      tile: rows per tile.
      copies: consecutive copies that belong to one token.

    Returns:
      The dispatch; copies keep their order inside an expert.
    """
    rows = expert.shape[0]
    num_tiles_max = rows // tile + num_experts
    tokens = jnp.bincount(expert, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    tiles_end = jnp.cumsum(-(-tokens // tile))  # [E]
    order = jnp.argsort(expert, stable=True)  # [R]
    owner = jnp.minimum(expert[order], num_experts - 1)
    rank = jnp.arange(rows) - (jnp.cumsum(tokens) - tokens)[owner]
    position = (tiles_end - (-(-tokens // tile)))[owner] * tile + rank
    position = jnp.where(expert[order] < num_experts, position, num_tiles_max * tile)
    row_copy = jnp.full(num_tiles_max * tile, rows, jnp.int32)
    row_copy = row_copy.at[position].set(order.astype(jnp.int32), mode="drop")
    tile_expert = jnp.searchsorted(tiles_end, jnp.arange(num_tiles_max), side="right")
    return Dispatch(
        row_copy=row_copy,
        tile_expert=jnp.minimum(tile_expert, num_experts - 1).astype(jnp.int32),
        num_tiles=tiles_end[-1].astype(jnp.int32),
        tokens=tokens,
        tile=tile,
        copies=copies,
    )


def gather_rows(values: Array, dispatch: Dispatch, copies: int) -> Array:
    """Rows of `values` [N, ...] in dispatch order [P, ...]; padding rows are zero.

    `copies` is how many consecutive copies share one row of `values`: experts per token for
    token activations, 1 for values that already exist per copy.
    """
    return values.at[dispatch.row_copy // copies].get(mode="fill", fill_value=0)


def sum_by_expert(rows: Array, dispatch: Dispatch) -> Array:  # [P, ...] -> float32 [E, ...]
    """Sum padded rows over the tokens of each expert, in float32."""
    tiles = rows.astype(jnp.float32).reshape(-1, dispatch.tile, *rows.shape[1:]).sum(axis=1)
    return jax.ops.segment_sum(tiles, dispatch.tile_expert, dispatch.tokens.shape[0])


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
    return _expand(x, weight, dispatch, pool)


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
    return _contract(h, weight, dispatch, pool)


def _expand_bwd(saved, d_out):
    x, weight, dispatch, pool = saved
    d_weight = _accumulate(d_out, x, weight, dispatch, pool)
    return _contract(d_out, weight, dispatch, pool), d_weight, None, None


def _contract_bwd(saved, d_out):
    h, weight, dispatch, pool = saved
    d_weight = _accumulate(h, d_out, weight, dispatch, pool)
    return _expand(d_out, weight, dispatch, pool), d_weight, None, None


expand.defvjp(lambda *args: (_expand(*args), args), _expand_bwd)
contract.defvjp(lambda *args: (_contract(*args), args), _contract_bwd)


def on_cpu() -> bool:
    """Whether products run as loops over tiles (CPU) or through `lax.ragged_dot`."""
    return jax.default_backend() == "cpu"


def _expand(x, weight, dispatch, pool):
    return (_expand_tiles if on_cpu() else expand_ragged_dot)(x, weight, dispatch, pool)


def _contract(h, weight, dispatch, pool):
    return (_contract_tiles if on_cpu() else contract_ragged_dot)(h, weight, dispatch, pool)


# --- CPU: a loop over tiles; XLA lowers ragged_dot to a dense masked product there ---


def weight_bits(weight: Array) -> Array:
    """Carry bfloat16 as bits: XLA:CPU would otherwise widen the whole pool before a loop."""
    return (
        jax.lax.bitcast_convert_type(weight, jnp.uint16) if weight.dtype == jnp.bfloat16 else weight
    )


def channel_block(bits: Array, start: Array, size: int, dtype) -> Array:
    """Rows start : start + size of a pool in the dtype of the activations."""
    rows = jax.lax.dynamic_slice_in_dim(bits, start, size)
    if rows.dtype == jnp.uint16:
        rows = jax.lax.bitcast_convert_type(rows, jnp.bfloat16)
    return rows.astype(dtype)


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
        inner = lambda j, carry: step(carry, row, expert, j * pool.block)  # noqa: E731
        return jax.lax.fori_loop(0, blocks, inner, carry)

    return jax.lax.fori_loop(0, dispatch.num_tiles, tile_step, carry)


def add_slice(whole: Array, part: Array, start: tuple) -> Array:
    """`whole` with `part` added to the slice of its shape at `start`."""
    old = jax.lax.dynamic_slice(whole, start, part.shape)
    return jax.lax.dynamic_update_slice(whole, old + part, start)


def live_channels(pool: Pool, expert, start) -> Array:  # bool [1, block]
    """Which channels of a block the expert owns; the others belong to the next expert."""
    return start + jnp.arange(pool.block)[None] < pool.count[expert]


dot = partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


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


def _accumulate(left, right, weight, dispatch, pool):  # [P, width], [P, D] -> [C, D]
    """Gradient of the pool: sum of outer products of the rows of each expert."""
    tile = dispatch.tile

    def step(out, row, expert, start):
        channels = jax.lax.dynamic_slice(left, (row, start), (tile, pool.block))
        channels = jnp.where(live_channels(pool, expert, start), channels, 0)
        rows = jax.lax.dynamic_slice_in_dim(right, row, tile)
        product = dot(channels, rows, (((0,), (0,)), ((), ())))
        first = pool.offset[expert] + start
        return add_slice(out, product, (first, 0))

    return walk_tiles(dispatch, pool, step, jnp.zeros(weight.shape, jnp.float32)).astype(
        weight.dtype
    )


# --- accelerators: lax.ragged_dot over experts padded to one width ---


def _padded_experts(weight: Array, pool: Pool) -> Array:  # [C, D] -> [E, width, D]
    channel = jnp.arange(pool.width)
    index = pool.offset[:, None] + jnp.minimum(
        channel[None], jnp.maximum(pool.count[:, None] - 1, 0)
    )
    live = channel[None] < pool.count[:, None]
    return jnp.where(live[:, :, None], weight.at[index].get(mode="clip"), 0)


def _tile_rows(dispatch: Dispatch) -> Array:  # rows of each expert, padding included
    return -(-dispatch.tokens // dispatch.tile) * dispatch.tile


def expand_ragged_dot(x: Array, weight: Array, dispatch: Dispatch, pool: Pool) -> Array:
    """`expand` by `jax.lax.ragged_dot`; same arguments and result."""
    experts = jnp.swapaxes(_padded_experts(weight, pool), 1, 2).astype(x.dtype)
    return jax.lax.ragged_dot(x, experts, _tile_rows(dispatch)).astype(x.dtype)


def contract_ragged_dot(h: Array, weight: Array, dispatch: Dispatch, pool: Pool) -> Array:
    """`contract` by `jax.lax.ragged_dot`; same arguments and result."""
    experts = _padded_experts(weight, pool).astype(h.dtype)
    return jax.lax.ragged_dot(h, experts, _tile_rows(dispatch)).astype(h.dtype)
