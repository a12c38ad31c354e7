"""Sums over the tokens of each expert, taken while the experts run.

The hidden rows are needed twice: for sums of their squares, and, once the block's output is known,
for sums weighted by it. On a CPU both are loops over tiles; elsewhere they are products of whole
arrays, which are also the specification of the loops.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.activation import gated
from moe_jax.experts.dispatch import Dispatch, gather_rows
from moe_jax.experts.expert_rows import combine, expert_rows
from moe_jax.experts.grouped_matmul import (
    add_slice,
    channel_block,
    dot,
    expand,
    on_cpu,
    walk_tiles,
    weight_bits,
)
from moe_jax.experts.pool import Experts
from moe_jax.experts.swiglu import Projections
from moe_jax.experts.weights import COLUMNS, ROWS, project, real_rows, tile_tokens
from moe_jax.groups import Halfway, added_group
from moe_jax.transformer import DecoderLayer


@struct.dataclass
class Observed:
    """What a forward pass keeps of a layer's experts.

    Attributes:
      hidden: [P, F] hidden rows in dispatch order.
      out_square: float32 [P], squared norm of each row's expert output, before routing weights.
      squares: float32 [4, E, F], sums over each expert's tokens of hidden^2, up^2, gate^2 and
        (routing weight x hidden)^2.
      projections: gate and up rows [P, F], if they are to be kept.
    """

    hidden: Array
    out_square: Array
    squares: Array
    projections: Projections | None = None


def observe_experts(
    experts: Experts,
    x: Array,
    row_weight: Array,
    dispatch: Dispatch,
    keep: bool = False,
    onto: Array | None = None,
) -> tuple[Array, Observed]:
    """Run dense experts and keep what the statistics need; a `RunExperts`.

    `keep` keeps the projections as well, as precise as a backward pass would compute them; on a
    CPU alone, whose backward pass can use them. `onto` float32 [N, D] is what other experts of the
    layer gave: these are added to it, in float32.
    """
    assert experts.block == experts.width, "statistics are taken of experts of one width"
    if on_cpu():
        return _observe_tiles(experts, x, row_weight, dispatch, keep, onto)
    return observe_by_rows(experts, x, row_weight, dispatch, onto)


@jax.jit
def observed_group(group: DecoderLayer, halfway: Halfway, context: Context) -> Array:
    """Add a group's experts by the program that is also to sum, whose last bits may differ from
    those of `group_forward`; float32 [B, T, D]."""
    trace = added_group(group, halfway, context, observe_experts)
    return trace.routed.reshape(halfway.routed.shape)


def output_sums(
    experts: Experts, hidden: Array, row_weight: Array, dispatch: Dispatch, q: Array, y: Array
) -> Array:
    """Sums that weigh tokens by the block's output.

    Args:
      experts: the dense experts.
      hidden: [P, F], kept by `observe_experts`.
      row_weight: float32 [P].
      dispatch: the row layout.
      q: float32 [N], weight of each token.
      y: [N, D] routed output, float32.

    Returns:
      float32 [2, E, F]: q w^2 h^2, and q w h <v, y> with v the channel's row of w_down.
    """
    run = _output_tiles if on_cpu() else output_sums_by_rows
    return run(experts, hidden, row_weight, dispatch, q, y)


# --- CPU ---


def _observe_tiles(experts, x, row_weight, dispatch, keep, onto):
    pool, tile = experts.pool, dispatch.tile
    bits = jax.tree.map(weight_bits, experts.weights)

    def step(carry, row, expert, start):
        out, seen = carry
        first = pool.offset[expert]
        index, tokens = tile_tokens(x, dispatch, row)
        weight = jax.lax.dynamic_slice_in_dim(row_weight, row, tile)
        real = real_rows(index, x)
        gate, up = project(bits, first, pool.block, tokens, real)
        hidden = gated(experts.activation, gate, up)
        down = channel_block(bits.down, first, pool.block, x.dtype)
        part = dot(hidden.astype(x.dtype), down, COLUMNS)
        if experts.b_down is not None:
            part += real.astype(jnp.float32) * experts.b_down[expert][None].astype(jnp.float32)
        column = weight[:, None]
        squares = (hidden**2, up**2, gate**2, (column * hidden) ** 2)
        sums = jnp.stack([jnp.sum(square, axis=0) for square in squares])[:, None]
        put = jax.lax.dynamic_update_slice
        seen = Observed(
            hidden=put(seen.hidden, hidden.astype(x.dtype), (row, 0)),
            out_square=put(seen.out_square, jnp.sum(part**2, axis=1), (row,)),
            squares=add_slice(seen.squares, sums, (0, expert, 0)),
            projections=jax.tree.map(
                lambda whole, part: put(whole, part, (row, 0)),
                seen.projections,
                (gate, up) if keep else None,
            ),
        )
        return out.at[index].add(part * column, mode="drop"), seen

    rows, num_experts = row_weight.shape[0], pool.count.shape[0]
    blank = jnp.zeros((rows, pool.width))
    seen = Observed(
        hidden=jnp.zeros((rows, pool.width), x.dtype),
        out_square=jnp.zeros(rows),
        squares=jnp.zeros((4, num_experts, pool.width)),
        projections=(blank, blank) if keep else None,
    )
    start = jnp.zeros(x.shape, jnp.float32) if onto is None else onto
    out, seen = walk_tiles(dispatch, pool, step, (start, seen))
    return out.astype(x.dtype) if onto is None else out, seen


def _output_tiles(experts, hidden, row_weight, dispatch, q, y):
    pool, tile = experts.pool, dispatch.tile
    bits = weight_bits(experts.weights.down)
    narrow = y.astype(hidden.dtype)

    def step(sums, row, expert, start):
        channels = channel_block(bits, pool.offset[expert], pool.block, hidden.dtype)
        index, output = tile_tokens(narrow, dispatch, row)
        weight = jax.lax.dynamic_slice_in_dim(row_weight, row, tile)
        q_row = q.at[index].get(mode="fill", fill_value=0)
        h = jax.lax.dynamic_slice_in_dim(hidden, row, tile).astype(jnp.float32)
        pulled = dot(output, channels, ROWS)  # <v, y>
        # The sums over rows as products: reducing `pulled` after its product is slower in XLA.
        share = q_row * weight
        energy = dot((share * weight)[None], h**2, COLUMNS)
        shapley = dot(share[None], h * pulled, COLUMNS)
        return add_slice(sums, jnp.stack([energy, shapley]), (0, expert, 0))

    return walk_tiles(dispatch, pool, step, jnp.zeros((2, pool.count.shape[0], pool.width)))


# --- everywhere ---


def observe_by_rows(
    experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch, onto: Array | None = None
) -> tuple[Array, Observed]:
    """`observe_experts` as products of whole arrays; same arguments and result."""
    rows = expert_rows(x, experts.weights, dispatch, experts.pool)
    hidden, up, gate = (
        jnp.square(r.astype(jnp.float32)) for r in (rows.hidden, rows.up, rows.gate)
    )
    one = jnp.ones_like(row_weight)  # padding rows of the experts are zero themselves
    both = _weighted_sums([one, jnp.square(row_weight)], hidden, dispatch)
    up, gate = (_weighted_sums([one], square, dispatch)[0] for square in (up, gate))
    kept = Observed(
        hidden=rows.hidden,
        out_square=jnp.sum(jnp.square(rows.out.astype(jnp.float32)), axis=-1),
        squares=jnp.stack([both[0], up, gate, both[1]]),
    )
    start = jnp.zeros_like(x) if onto is None else onto
    return combine(rows.out, row_weight, start, dispatch), kept


def output_sums_by_rows(
    experts: Experts, hidden: Array, row_weight: Array, dispatch: Dispatch, q: Array, y: Array
) -> Array:
    """`output_sums` as products of whole arrays; same arguments and result."""
    copies = dispatch.copies
    q_row = gather_rows(q, dispatch, copies)
    y_row = gather_rows(y.astype(hidden.dtype), dispatch, copies)
    pulled = expand(y_row, experts.weights.down, dispatch, experts.pool).astype(jnp.float32)
    h = hidden.astype(jnp.float32)
    energy = _weighted_sums([q_row * jnp.square(row_weight)], jnp.square(h), dispatch)
    return jnp.concatenate([energy, _weighted_sums([q_row * row_weight], h * pulled, dispatch)])


def _weighted_sums(weights: list[Array], rows: Array, dispatch: Dispatch) -> Array:
    """Sum `rows` [P, F] over each expert's tokens under several row weights [P] at once.

    As a product per tile, one pass over `rows` serves all weights. Returns [len(weights), E, F].
    """
    weight = jnp.stack(weights, axis=-1).reshape(-1, dispatch.tile, len(weights))
    tiles = jnp.einsum(
        "mtj,mtf->mjf",
        weight,
        rows.reshape(-1, dispatch.tile, rows.shape[1]),
        precision=jax.lax.Precision.HIGHEST,  # accelerators would round the statistics
    )
    sums = jax.ops.segment_sum(tiles, dispatch.tile_expert, dispatch.tokens.shape[0])
    return jnp.swapaxes(sums, 0, 1)
