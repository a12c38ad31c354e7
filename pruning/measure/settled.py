"""Logits of a model, and where another program must have the same ones.

Programs differ by rounding. Where two experts are nearly tied in a router, rounding alone may send
the token to the other one: its logits, and through attention those of all later tokens of its
sequence, are then another model's without anything being wrong.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.moe import MoE, MoETrace
from moe_jax.experts.router import is_settled
from moe_jax.groups import GroupStep, Halfway, added_group, through_groups
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
    return out, _settled(layer, trace, rounding).reshape(x.shape[:2])


@jax.jit
def _group(
    group: DecoderLayer, halfway: Halfway, context: Context, rounding: float
) -> tuple[Array, Array]:  # -> float32 [B, T, D], bool [B, T]
    trace, shape = added_group(group, halfway, context), halfway.routed.shape
    settled = _settled(group, trace, rounding)
    return trace.routed.reshape(shape), settled.reshape(shape[:2])


def _settled(layer: DecoderLayer, trace: MoETrace, rounding: float) -> Array:  # bool [N]
    assert isinstance(layer.mlp, MoE)
    size = jnp.where(trace.logits == -jnp.inf, 0.0, jnp.abs(trace.logits)).max(axis=-1)
    return is_settled(trace.logits, layer.mlp.config, rounding * size, layer.mlp.router_bias)


def settled_logits(
    source: LayerSource,
    windows: Sequence[np.ndarray],
    last: int,
    rounding: float = ROUNDING,
    strides: Sequence[int] | None = None,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits at the ends of a few sequences, and which of them rounding cannot have changed.

    Args:
      source: the model, streamed once, one sequence at a time in float32.
      windows: each int32 [B, T].
      last: of how many last positions P of each sequence, or of all if it is shorter.
      rounding: how far the router logits of two programs may be apart, as a share of the largest
        logit of the token.
      strides: of each of `windows`, positions from a token to the next in rotations; default 1.

    Returns:
      For each of `windows` (float32 [B, P, V], bool [B, P]: no router is near a tie at this
      position or an earlier one).
    """
    texts = [
        in_batches(source, some, np.ones(some.shape, bool), 1, stride=stride)
        for some, stride in zip(windows, strides or [1] * len(windows), strict=True)
    ]
    settled = [np.ones(some.shape, bool) for some in windows]

    def step(
        index: int, layer: DecoderLayer, states: list[list[np.ndarray]]
    ) -> list[list[np.ndarray]]:
        for text, stays, x in zip(texts, settled, states, strict=True):

            def run(x: Array, place: Context, rows: slice, stays=stays) -> Array:
                out, settled_here = _layer(layer, x, place, rounding)
                stays[rows] &= np.asarray(settled_here)
                return out

            text.each(x, run)
        return states

    def in_groups(index: int, states: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
        def step_of(stays: np.ndarray) -> GroupStep:
            def add(group: DecoderLayer, x: Halfway, place: Context, rows: slice) -> Array:
                out, settled_here = _group(group, x, place, rounding)
                stays[rows] &= np.asarray(settled_here)
                return out

            return add

        parts = zip(texts, states, map(step_of, settled), strict=True)
        through_groups(source, index, [*parts])
        return states

    embedded = [text.embedded(source, jnp.float32) for text in texts]
    states = sweep(source, embedded, step, in_groups=in_groups)
    head = source.head
    return [
        (
            np.stack([np.asarray(head(row[0, -last:])) for row in x]),
            np.logical_and.accumulate(stays, axis=1)[:, -last:],
        )
        for x, stays in zip(states, settled, strict=True)
    ]
