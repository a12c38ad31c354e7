"""A layer in groups of its experts, where memory holds no whole one.

The routed output of a layer is a sum over experts. What stands before them (attention) and beside
them (a shared expert) is small and is computed once; each group adds its part of the sum, in
float32 and in the order of the experts. All batches of a text go through a group while it is held,
so that every weight is still read once:

    middle = layer_attend(rest, x)                     [B, T, D]
    routed = 0, and for each group group_forward       float32 [B, T, D]
    out = layer_end(rest, middle, routed)              [B, T, D], middle + routed + shared expert

On a CPU the sums have the bits of a whole layer's, but for output biases of experts, whose sum a
whole layer takes by itself.
"""

import dataclasses
from collections.abc import Callable, Iterator, MutableSequence, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.moe import MoE, MoETrace
from moe_jax.experts.run import RunExperts, run_experts
from moe_jax.norm import rms_norm
from moe_jax.stream import Batches, LayerSource, group_of, groups_of, layer_attend
from moe_jax.transformer import DecoderLayer

# What a group does to a batch: (the group, states behind the attention [b, T, D], where the tokens
# stand, the batch's rows, float32 [b, T, D] of the groups before it) -> that of one group more.
GroupStep = Callable[[DecoderLayer, Array, Context, slice, Array], Array]
Texts = Sequence[tuple[Batches, MutableSequence[np.ndarray], GroupStep]]


def own_experts(layer: DecoderLayer) -> slice:
    """Which experts of its layer a layer or group of one has; not under a trace."""
    assert isinstance(layer.mlp, MoE)
    return layer.mlp.own


def each_group(source: LayerSource, index: int) -> Iterator[DecoderLayer]:
    """The groups of a layer; whoever takes them lets go of one before the next is read."""
    for number in range(groups_of(source, index)):
        yield group_of(source, index, number)


def through_groups(
    source: LayerSource,
    index: int,
    texts: Texts,
    beside: Callable[[Batches], MutableSequence[np.ndarray]] = lambda text: (
        [np.empty(0)] * len(text.rows)
    ),
) -> None:
    """Take texts through a layer.

    Args:
      source: the model.
      index: of a layer in groups.
      texts: each a text, its states before the layer by batch, which become those behind it, and
        what a group does, as a rule `add_group`.
      beside: where float32 arrays [b, T, D] of a text's batches lie meanwhile; default in memory.
    """
    sums, rest = [beside(text) for text, _, _ in texts], None
    for group in each_group(source, index):
        if rest is None:
            rest = rest_of(group)
            for (text, x, _), routed in zip(texts, sums, strict=True):
                _begin(rest, text, x, routed)
        for (text, x, step), routed in zip(texts, sums, strict=True):
            for i, (rows, place) in enumerate(zip(text.rows, text.places, strict=True)):
                given = jnp.asarray(x[i]), place, rows, jnp.asarray(routed[i])
                routed[i] = np.asarray(step(group, *given))
        del group  # before the next one is read
    assert rest is not None
    for (_, x, _), routed in zip(texts, sums, strict=True):
        for i, whole in enumerate(routed):
            x[i] = np.asarray(layer_end(rest, jnp.asarray(x[i]), jnp.asarray(whole)))


def _begin(
    rest: DecoderLayer,
    text: Batches,
    x: MutableSequence[np.ndarray],
    routed: MutableSequence[np.ndarray],
) -> None:
    text.each(x, lambda part, place, rows: layer_attend(rest, part, place))
    for i in range(len(text.rows)):
        routed[i] = np.zeros(x[i].shape, np.float32)


def rest_of(group: DecoderLayer) -> DecoderLayer:
    """The first group of a layer without its experts, to be held while others are read."""
    none: Any = None
    return dataclasses.replace(group, mlp=dataclasses.replace(group.mlp, experts=none))


def routed_inputs(layer: DecoderLayer, middle: Array) -> Array:  # [B, T, D] -> [N, D]
    """What the router and the experts of a layer are given."""
    return rms_norm(middle, layer.mlp_norm, layer.norm_eps).reshape(-1, middle.shape[-1])


def group_trace(group: DecoderLayer, middle: Array, context: Context, run: RunExperts) -> MoETrace:
    """What a group does on a batch; `routed` of it is what `run` gives.

    Args:
      group: of a layer.
      middle: [B, T, D], of `layer_attend`.
      context: where the tokens stand.
      run: how its experts are run.
    """
    assert isinstance(group.mlp, MoE)
    return group.mlp(routed_inputs(group, middle), context.valid.reshape(-1), run)[1]


@jax.jit
def group_forward(group: DecoderLayer, middle: Array, context: Context, routed: Array) -> Array:
    """Add a group's experts to what those before them gave; float32 [B, T, D]."""
    onto = routed.reshape(-1, routed.shape[-1])

    def run(experts, x, row_weight, dispatch):
        return run_experts(experts, x, row_weight, dispatch, onto=onto)

    return group_trace(group, middle, context, run).routed.reshape(routed.shape)


def add_group(
    group: DecoderLayer, middle: Array, context: Context, rows: slice, routed: Array
) -> Array:
    """`group_forward` as a `GroupStep`."""
    return group_forward(group, middle, context, routed)


@jax.jit
def layer_end(rest: DecoderLayer, middle: Array, routed: Array) -> Array:
    """The output of a layer once all groups have added their experts.

    Args:
      rest: of the layer, as of `rest_of`.
      middle: [B, T, D], of `layer_attend`.
      routed: float32 [B, T, D].

    Returns:
      [B, T, D] in the dtype of `middle`.
    """
    assert isinstance(rest.mlp, MoE)
    out = routed.astype(middle.dtype)
    if rest.mlp.shared is not None:
        out += rest.mlp.shared(routed_inputs(rest, middle)).reshape(middle.shape)
    return middle + out
