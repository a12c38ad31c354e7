"""A layer in groups of its experts, where memory holds no whole one.

The routed output of a layer is a sum over experts. What stands before them (attention) and beside
them (a shared expert) is small and is computed once; each group adds its part of the sum, in
float32 and in the order of the experts. All batches of a text go through a group while it is held,
so that every weight is still read once:

    halfway = layer_begin(rest, x)                    after attention, nothing routed
    for each group: halfway.routed = group_forward(group, halfway)
    x = layer_end(rest, halfway)                      + routed + shared expert

On a CPU the sums have the bits of a whole layer's, but for output biases of experts, whose sum a
whole layer takes by itself.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.moe import MoE, MoETrace
from moe_jax.experts.run import RunExperts, run_experts
from moe_jax.norm import rms_norm
from moe_jax.source import LayerSource, group_of, groups_of
from moe_jax.stream import Batches, PerBatch, layer_attend
from moe_jax.transformer import DecoderLayer


@struct.dataclass
class Halfway:
    """A batch between the attention and the end of a layer.

    In float32 whatever the dtype of the states: of these a program for a whole layer rounds what
    goes to its end, and not what goes to the norm before the experts.

    Attributes:
      middle: float32 [B, T, D], behind the attention.
      routed: float32 [B, T, D], what the experts have given so far.
      dtype: of the states.
    """

    middle: Array
    routed: Array
    dtype: Any = struct.field(pytree_node=False)


# What a group does to batches: the group -> (a batch, where its tokens stand, its rows) -> float32
# [B, T, D], what the experts have given with those of the group.
GroupStep = Callable[[DecoderLayer], Callable[[Halfway, Context, slice], Array]]
Texts = Sequence[tuple[Batches, PerBatch, GroupStep]]
Between = tuple[PerBatch, PerBatch]  # of a text, `Halfway.middle` and `Halfway.routed`


def in_memory(text: Batches) -> Between:
    """Where the batches of a text may lie between groups."""
    return [np.empty(0)] * len(text.rows), [np.empty(0)] * len(text.rows)


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
    between: Callable[[Batches], Between] = in_memory,
    begin: Callable[[DecoderLayer, Array, Context], Halfway] | None = None,
) -> None:
    """Take texts through a layer.

    Args:
      source: the model.
      index: of a layer in groups.
      texts: each a text, its states before the layer by batch, which become those behind it, and
        what a group does, as a rule `add_group`.
      between: where the batches of a text lie between groups.
      begin: what is done with a batch before the experts; default `layer_begin`.
    """
    held, rest = [between(text) for text, _, _ in texts], None
    begin = begin or layer_begin
    for group in each_group(source, index):
        if rest is None:
            rest = rest_of(group)
            for (text, x, _), own in zip(texts, held, strict=True):
                for i, place in enumerate(text.places):
                    keep(own, i, begin(rest, jnp.asarray(x[i]), place))
        for (text, x, step), own in zip(texts, held, strict=True):
            run = step(group)
            for i, (rows, place) in enumerate(zip(text.rows, text.places, strict=True)):
                own[1][i] = np.asarray(run(taken(own, i, x[i].dtype), place, rows))
            del run
        del group  # before the next one is read
    assert rest is not None
    for (text, x, _), own in zip(texts, held, strict=True):
        for i in range(len(text.rows)):
            x[i] = np.asarray(layer_end(rest, taken(own, i, x[i].dtype)))


def keep(between: Between, batch: int, halfway: Halfway) -> None:
    """Put a batch where it lies between groups."""
    for part, value in zip(between, (halfway.middle, halfway.routed), strict=True):
        part[batch] = np.asarray(value)


def taken(between: Between, batch: int, dtype: Any) -> Halfway:
    """What `keep` put there; states are of `dtype`."""
    middle, routed = (jnp.asarray(part[batch]) for part in between)
    return Halfway(middle, routed, dtype)


def rest_of(group: DecoderLayer) -> DecoderLayer:
    """The first group of a layer without its experts, to be held while others are read."""
    none: Any = None
    return dataclasses.replace(group, mlp=dataclasses.replace(group.mlp, experts=none))


def expert_inputs(layer: DecoderLayer, halfway: Halfway) -> Array:  # [N, D]
    """What the router and the experts of a layer are given."""
    normed = rms_norm(halfway.middle, layer.mlp_norm, layer.norm_eps, halfway.dtype)
    return normed.reshape(-1, normed.shape[-1])


def group_trace(
    group: DecoderLayer,
    halfway: Halfway,
    context: Context,
    run: RunExperts,
    expert: Array | None = None,
) -> MoETrace:
    """What a group does on a batch; `routed` of it is what `run` gives.

    Args:
      group: of a layer.
      halfway: of the batch.
      context: where the tokens stand.
      run: how its experts are run.
      expert: int32 [N, k], a choice made before; None to let the router choose.
    """
    assert isinstance(group.mlp, MoE)
    routed = dataclasses.replace(group.mlp, shared=None)  # which `layer_end` adds
    return routed(expert_inputs(group, halfway), context.valid.reshape(-1), run, expert)[1]


def added_group(
    group: DecoderLayer, halfway: Halfway, context: Context, run: Any = run_experts
) -> MoETrace:
    """The same, whose `routed` float32 [N, D] are those of the groups before it and its own; `run`
    takes the former as `onto`."""
    onto = halfway.routed.reshape(-1, halfway.routed.shape[-1])
    return group_trace(group, halfway, context, partial(run, onto=onto))


@jax.jit
def layer_begin(rest: DecoderLayer, x: Array, context: Context) -> Halfway:
    """What a layer does with a batch [B, T, D] before its experts."""
    middle = rest.attend(x, context)[0].astype(jnp.float32)
    return Halfway(middle, jnp.zeros_like(middle), x.dtype)


def layer_begin_apart(rest: DecoderLayer, x: Array, context: Context) -> Halfway:
    """The same where a whole layer is taken by two programs, whose middle has the dtype of `x`."""
    return halfway_of(layer_attend(rest, x, context))


def halfway_of(middle: Array, routed: Array | None = None) -> Halfway:
    """A batch whose middle [B, T, D] has the dtype of its states; nothing is given as default."""
    wide = middle.astype(jnp.float32)
    return Halfway(wide, jnp.zeros_like(wide) if routed is None else routed, middle.dtype)


@jax.jit
def group_forward(group: DecoderLayer, halfway: Halfway, context: Context) -> Array:
    """`Halfway.routed` with a group's experts added."""
    return added_group(group, halfway, context).routed.reshape(halfway.routed.shape)


def add_group(group: DecoderLayer) -> Callable[[Halfway, Context, slice], Array]:
    """`group_forward` as a `GroupStep`."""
    return lambda halfway, context, rows: group_forward(group, halfway, context)


@jax.jit
def layer_end(rest: DecoderLayer, halfway: Halfway) -> Array:  # [B, T, D]
    """The output of a layer once all groups have added their experts."""
    assert isinstance(rest.mlp, MoE)
    out = halfway.routed.astype(halfway.dtype)
    if rest.mlp.shared is not None:
        out += rest.mlp.shared(expert_inputs(rest, halfway)).reshape(out.shape)
    return halfway.middle.astype(halfway.dtype) + out
