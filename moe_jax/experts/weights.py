"""The parameters of a layer's experts, and what a tile of rows takes from them."""

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moe_jax.config import SWIGLU, Activation
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.grouped_matmul import channel_block, dot

ROWS, COLUMNS = (((1,), (1,)), ((), ())), (((1,), (0,)), ((), ()))  # x @ w.T and x @ w


@struct.dataclass
class ExpertWeights:
    """Parameters of a layer's experts.

    Attributes:
      gate, up, down: pools [C, D], one row per channel.
      gate_bias, up_bias: [C, 1], both or neither.
      down_bias: [E, D]; it is no channel's, so that cutting channels leaves it in place.
      activation: what a channel makes of its gate and up projection.
    """

    gate: Array
    up: Array
    down: Array
    gate_bias: Array | None = None
    up_bias: Array | None = None
    down_bias: Array | None = None
    activation: Activation = struct.field(pytree_node=False, default=SWIGLU)


def tile_tokens(x: Array, dispatch: Dispatch, row: Array) -> tuple[Array, Array]:
    """Token index [tile] of the rows of a tile, and those tokens' rows of `x` [N, ...]."""
    index = jax.lax.dynamic_slice_in_dim(dispatch.token, row, dispatch.tile)
    return index, x.at[index].get(mode="fill", fill_value=0)


def project(
    bits: ExpertWeights, first: Array, block: int, tokens: Array, real: Array
) -> tuple[Array, Array]:
    """Gate and up rows of a tile before the activation.

    Args:
      bits: the weights, of `weight_bits`.
      first: first channel of the block in the pool.
      block: channels.
      tokens: [tile, D].
      real: [tile, 1], 1 for a token and 0 for padding, which has no bias: its rows stay zero.

    Returns:
      float32 [tile, block] twice.
    """

    def take(pool_bits) -> Array:
        return channel_block(pool_bits, first, block, tokens.dtype)

    gate, up = dot(tokens, take(bits.gate), ROWS), dot(tokens, take(bits.up), ROWS)
    if bits.gate_bias is None:
        return gate, up
    return gate + dot(real, take(bits.gate_bias), ROWS), up + dot(real, take(bits.up_bias), ROWS)


def real_rows(index: Array, x: Array) -> Array:
    """1 where a row's token [rows] is one of `x` [N, D], 0 for padding; [rows, 1], its dtype."""
    return (index < x.shape[0]).astype(x.dtype)[:, None]


def routing_matrix(row_weight: Array, dispatch: Dispatch, tokens: int) -> Array:
    """Routing weights of the rows [P] as float32 [tokens, E]."""
    # Rows of padding have a token beyond the last one, and are dropped.
    weight = jnp.zeros((tokens, dispatch.tokens.shape[0]), jnp.float32)
    at = weight.at[dispatch.token, row_expert(dispatch)]
    return at.add(row_weight.astype(jnp.float32), mode="drop")


def row_expert(dispatch: Dispatch) -> Array:
    """Expert of each row, int32 [P]; a padding row has that of its tile."""
    return jnp.repeat(dispatch.tile_expert, dispatch.tile)
