"""Logits of a model, and where another program must have the same ones.

Programs differ by rounding. Where two experts are nearly tied in a router, rounding alone may send
the token to the other one: its logits, and through attention those of all later tokens of its
sequence, are then another model's without anything being wrong.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.moe import MoE, MoETrace
from moe_jax.experts.router import is_settled
from moe_jax.groups import GroupStep, Halfway, added_group, through_groups
from moe_jax.programs import free_programs
from moe_jax.source import groups_of
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource, in_batches, sweep
from moe_jax.transformer import DecoderLayer

# Of router logits after many layers in float32, as a share of the largest. Measured against
# transformers over 30 layers: 5e-6.
ROUNDING = 2e-5

States = list[list[np.ndarray]]  # of each text, an array per batch


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
    spread: Spread = ALONE,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Logits at the ends of a few sequences, and which of them rounding cannot have changed.

    Args:
      source: the model, streamed once, one sequence at a time in float32.
      windows: each int32 [B, T].
      last: of how many last positions P of each sequence, or of all if it is shorter.
      rounding: how far the router logits of two programs may be apart, as a share of the largest
        logit of the token.
      strides: of each of `windows`, positions from a token to the next in rotations; default 1.
      spread: processes that take turns, each reading a layer while the others read theirs.

    Returns:
      For each of `windows` (float32 [B, P, V], bool [B, P]: no router is near a tie at this
      position or an earlier one).
    """
    texts = [
        in_batches(source, some, np.ones(some.shape, bool), 1, stride=stride)
        for some, stride in zip(windows, strides or [1] * len(windows), strict=True)
    ]
    settled = [np.ones(some.shape, bool) for some in windows]

    def step(index: int, layer: DecoderLayer, states: States) -> States:
        for text, stays, x in zip(texts, settled, states, strict=True):

            def run(x: Array, place: Context, rows: slice, stays=stays) -> Array:
                out, settled_here = _layer(layer, x, place, rounding)
                stays[rows] &= np.asarray(settled_here)
                return out

            text.each(x, run)
        return states

    def in_groups(index: int, states: States) -> States:
        def step_of(stays: np.ndarray) -> GroupStep:
            def of(group: DecoderLayer) -> Callable[[Halfway, Context, slice], Array]:
                def add(x: Halfway, place: Context, rows: slice) -> Array:
                    out, settled_here = _group(group, x, place, rounding)
                    stays[rows] &= np.asarray(settled_here)
                    return out

                return add

            return of

        parts = zip(texts, states, map(step_of, settled), strict=True)
        through_groups(source, index, [*parts])
        return states

    embedded = [text.embedded(source, jnp.float32) for text in texts]
    if spread.processes == 1:
        states = sweep(source, embedded, step, in_groups=in_groups)
    else:
        states = _in_turns(source, embedded, settled, step, in_groups, spread)
    head = source.head
    return [
        (
            np.stack([np.asarray(head(row[0, -last:])) for row in x]),
            np.logical_and.accumulate(stays, axis=1)[:, -last:],
        )
        for x, stays in zip(states, settled, strict=True)
    ]


def _in_turns(
    source: LayerSource,
    states: States,
    settled: list[np.ndarray],
    step: Callable[[int, DecoderLayer, States], States],
    in_groups: Callable[[int, States], States],
    spread: Spread,
) -> States:
    """`sweep` of processes: each reads every so many-th layer, all at once, and what comes out of
    one is handed to whoever has the next. Of a layer in groups only one reads at a time."""
    free_programs()
    for first in range(0, len(source), spread.processes):
        turns = range(first, min(first + spread.processes, len(source)))
        own = first + spread.process
        layer = source.layer(own) if own in turns and groups_of(source, own) == 1 else None
        for process, index in enumerate(turns):
            if index == own and layer is None:
                states = in_groups(index, states)
            elif index == own:
                assert layer is not None
                states = step(index, layer, states)
                layer = None
            _hand_on(states, settled, process, spread)
    return states


def _hand_on(states: States, settled: list[np.ndarray], process: int, spread: Spread) -> None:
    """Put what a process has into the place of what the others have."""
    gives, texts = spread.process == process, [*states, settled]
    given = b"".join(part.tobytes() for text in texts for part in text) if gives else b""
    data, start = bytearray(spread.sent(given, process)), 0
    for text in texts if not gives else ():
        for i, old in enumerate(text):
            text[i] = np.frombuffer(data, old.dtype, old.size, start).reshape(old.shape)
            start += old.nbytes
