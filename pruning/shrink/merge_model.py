"""The experts of a whole model merged, several ways in one reading, and run as they are then."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.moe import MoE
from moe_jax.stream import (
    LayerSource,
    in_batches,
    layer_attend,
    layer_feed_forward,
    layer_forward,
    sweep,
)
from moe_jax.transformer import DecoderLayer
from pruning.budget.merging import MergeRule
from pruning.scores.likeness import likeness
from pruning.shrink.merge import MergedLayer, Merging, merge_of, merged_layer
from pruning.shrink.rounding import rounded_layer

DENSE = -1  # the stream behind dense layers; others behind those merged by the rule of their number
Streams = dict[int, list[np.ndarray]]  # an array per batch each


def plan_merges(
    source: LayerSource,
    asked: Sequence[tuple[MergeRule, np.ndarray]],
    usage: np.ndarray,
    tokens: np.ndarray,
    valid: np.ndarray,
    *,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
) -> list[Merging]:
    """How rules merge the experts of a model; every layer is read once, whole.

    Args:
      source: the dense model.
      asked: rules and the groups [L] that they leave in each layer with experts.
      usage: [L, E], tokens of the calibration text that go to each expert.
      tokens: int32 [B, T], of that text or a sample of it.
      valid: bool [B, T].
      batch: rows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      One for each rule asked for.
    """
    text, slots = in_batches(source, tokens, valid, batch), source.config.moe_layers
    found: list[dict[int, MergedLayer]] = [{} for _ in asked]
    behind = [number if rule.behind_merged else DENSE for number, (rule, _) in enumerate(asked)]
    first = text.embedded(source, dtype)

    def step(index: int, layer: DecoderLayer, streams: Streams) -> Streams:
        for stream, x in streams.items():
            text.each(x, lambda x, place, rows: layer_attend(layer, x, place))
            passed = layer
            if isinstance(layer.mlp, MoE):
                slot = slots.index(index)
                seen = likeness(layer, x, text.places)
                for number in (n for n, own in enumerate(behind) if own == stream):
                    rule, counts = asked[number]
                    merge = merge_of(layer, rule, seen, usage[slot], int(counts[slot]))
                    found[number][index] = merge
                    passed = layer if stream == DENSE else merged_layer(layer, merge)
            text.each(x, lambda x, place, rows, own=passed: layer_feed_forward(own, x, place))
        return streams

    sweep(source, {stream: list(first) for stream in set(behind)}, step, on_layer=on_layer)
    return [Merging(layers) for layers in found]


@jax.jit
def merged_forward(
    layer: DecoderLayer,
    x: Array,  # [B, T, D]
    context: Context,
    leaders: Array,  # int32 [E]
) -> tuple[Array, Array]:  # [B, T, D]
    """A merged layer, and to how many different merged experts its tokens go in all, int32."""
    out, trace = layer.feed_forward(layer.attend(x, context)[0], context)
    assert trace is not None
    met = jnp.sort(leaders[trace.expert], axis=1)
    different = 1 + (met[:, 1:] != met[:, :-1]).sum(axis=1)
    return out, jnp.where(trace.valid, different, 0).sum(dtype=jnp.int32)


def merged_hidden(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    mergings: Sequence[Merging],
    *,
    storages: Sequence[str],
    met: np.ndarray,
    group_size: int = 32,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Hidden states before the head of several merged models.

    Args:
      source: the dense model; every layer is read once, whole.
      tokens: int32 [B, T].
      valid: bool [B, T].
      mergings: V of this model.
      storages: how each one's weights are stored, "bf16" or as of `rounded_layer`.
      met: float64 [V], to which is added how many merged experts the tokens of the text go to in
        all layers, a group that a token goes to several times counted once.
      group_size: weights per scale of integers.
      batch: rows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      [V, B, T, D] on the host.
    """
    text = in_batches(source, tokens, valid, batch)

    def step(index: int, layer: DecoderLayer, variants: Streams) -> Streams:
        for number, (merging, how) in enumerate(zip(mergings, storages, strict=True)):
            merge = merging.layers.get(index)
            own = layer if merge is None else merged_layer(layer, merge)
            own = own if how == "bf16" else rounded_layer(own, group_size, how)

            def run(x: Array, place: Context, rows: slice, own=own, merge=merge, number=number):
                if merge is None:
                    return layer_forward(own, x, place)
                leaders = jnp.asarray(merge.leaders, jnp.int32)
                out, different = merged_forward(own, x, place, leaders)
                met[number] += int(different)
                return out

            text.each(variants[number], run)
        return variants

    first = text.embedded(source, dtype)
    last = sweep(
        source, {number: list(first) for number in range(len(mergings))}, step, on_layer=on_layer
    )
    hidden = np.empty((len(mergings), *tokens.shape, source.config.d_model), dtype)
    for number, out in enumerate(hidden):
        text.joined(last[number], out)
    return hidden
