"""How token copies are laid out for their experts, and experts of different widths in a pool.

Rows are laid out in *tiles*: sorted by expert, each expert's rows padded with zero rows to a
multiple of the tile height. A tile therefore belongs to one expert, a product is a loop over
tiles, and a per-expert sum is a sum over tiles. The experts' weights are one pool of channels
`[C, D]`, so experts of different widths, down to zero, cost what they need.
"""

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
    The matrix units of accelerators take no fewer than 16 rows.
    """
    half = max(1, rows // (2 * num_experts))
    least = 8 if jax.default_backend() == "cpu" else 16
    return min(128, max(least, 1 << (half.bit_length() - 1)))


def padded_rows(rows: int, num_experts: int) -> int:
    """Rows P that a dispatch of so many token copies has room for, at `tile_height`."""
    tile = tile_height(rows, num_experts)
    return (rows // tile + num_experts) * tile


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
