"""Logits of a model, and where another program must have the same ones.

Programs differ by rounding. Where two experts are nearly tied in a router, rounding alone may send
the token to the other one: its logits, and through attention those of all later tokens of its
sequence, are then another model's without anything being wrong.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.moe import MoE
from moe_jax.experts.router import is_settled
from moe_jax.stream import LayerSource, in_batches, sweep
from moe_jax.transformer import DecoderLayer

# Of router logits after many layers in float32, as a share of the largest. Measured against
# transformers over 30 layers: 5e-6.
ROUNDING = 2e-5


@jax.jit
def _layer(
    layer: DecoderLayer, x: Array, context: Context, rounding: float
) -> tuple[Array, Array]:  # [B, T, D] -> [B, T, D], bool [B, T]
    out, trace = layer.trace(x, context)
    if trace is None:
        return out, context.valid
    assert isinstance(layer.mlp, MoE)
    size = jnp.where(trace.logits == -jnp.inf, 0.0, jnp.abs(trace.logits)).max(axis=-1)
    settled = is_settled(trace.logits, layer.mlp.config, rounding * size, layer.mlp.router_bias)
    return out, settled.reshape(x.shape[:2])


def settled_logits(
    source: LayerSource, tokens: np.ndarray, rounding: float = ROUNDING
) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a few short sequences, and which of them rounding cannot have changed.

    Args:
      source: the model, streamed one sequence at a time in float32.
      tokens: int32 [B, T].
      rounding: how far the router logits of two programs may be apart, as a share of the largest
        logit of the token.

    Returns:
      (float32 [B, T, V], bool [B, T]: no router is near a tie at this position or an earlier one).
    """
    text = in_batches(source, tokens, np.ones(tokens.shape, bool), 1)
    settled = np.ones(tokens.shape, bool)

    def step(index: int, layer: DecoderLayer, x: list[np.ndarray]) -> list[np.ndarray]:
        def run(x: Array, place: Context, rows: slice) -> Array:
            out, stays = _layer(layer, x, place, rounding)
            settled[rows] &= np.asarray(stays)
            return out

        return text.each(x, run)

    x = sweep(source, text.embedded(source, jnp.float32), step)
    head = source.head
    logits = np.stack([np.asarray(head(row[0])) for row in x])
    return logits, np.logical_and.accumulate(settled, axis=1)
