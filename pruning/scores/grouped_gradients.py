"""The way down through a layer that is taken in groups of its experts.

The gradient at what the experts are given is a sum over experts, and each token's routing weight
for an expert has its gradient from that one alone. So groups add to both, and give the scores of
their own channels; the router, the shared expert, the norm and the attention are pulled through
once, when all groups have been. A layer is read once.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.experts.run import RunExperts
from moe_jax.experts.swiglu import added_gradients
from moe_jax.groups import (
    Halfway,
    each_group,
    expert_inputs,
    group_trace,
    halfway_of,
    layer_begin,
    own_experts,
    rest_of,
)
from moe_jax.source import LayerSource
from moe_jax.transformer import DecoderLayer
from pruning.scores.layer import GRADIENT_SCORES, attention_backward, taylor_scores
from pruning.scores.layer_sums import no_gradient_sums
from pruning.scores.parts import Parts
from pruning.scores.states import InSlot, States, temporary_states
from pruning.scores.sweep_log import Sums

SLOTS = 2  # float32 states of the text that lie beside those of the sweep


@dataclass(frozen=True)
class WayDown:
    """A text on its way down through a layer.

    Attributes:
      parts: its batches.
      entered: rows of a batch -> its states before the layer, [b, T, D].
      middle: rows of a batch -> those behind the attention.
      given: rows of a batch -> the gradient at the output of the layer.
      leave: takes the rows of a batch and the gradient at `entered`; None if nobody needs it.
      as_seen: number of a batch -> whether experts are chosen, and their rows computed, from the
        middle before it was rounded to the states' dtype, as on the way up, whose rows a sweep
        through whole layers keeps of as many batches.
    """

    parts: Parts
    entered: Callable[[slice], Array]
    middle: Callable[[slice], Array]
    given: Callable[[slice], Array]
    leave: Callable[[slice, Array], None] | None
    as_seen: Callable[[int], bool]


def gradients_in_groups(
    source: LayerSource, index: int, text: WayDown, scratch: Path | None = None
) -> Sums:
    """Pull the loss gradient through a layer, and add up its scores.

    Args:
      source: the dense model.
      index: of a layer with experts.
      text: what goes through.
      scratch: folder of states that do not fit in memory; default the system's.

    Returns:
      Sums of each part, [parts, E, F], as a sweep logs them.

    Raises:
      FullDiskError: there is no room in the scratch folder.
    """
    shape = (*text.parts.batches.tokens.shape, source.config.d_model)
    with temporary_states(SLOTS, shape, jnp.float32, scratch) as states:
        visit = _Visit(text, states)
        for group in each_group(source, index):
            visit.add(group)
            del group  # before the next one is read
        visit.end()
        return visit.sums


class _Visit:
    """What is known of a layer while its groups come and go; as of `gradients_in_groups`."""

    def __init__(self, text: WayDown, states: States):
        self.sums: Sums = {}
        self._text, self._rest = text, None
        rows = text.parts.batches.rows
        self._d_inputs, self._seen = InSlot(states, 0, rows), InSlot(states, 1, rows)
        self._d_weights: list[Any] = [0.0] * len(rows)  # of each batch, float32 [N, k]

    def add(self, group: DecoderLayer) -> None:
        """Add what a group pulls back, and the sums of its channels."""
        own, parts = own_experts(group), self._text.parts
        if self._rest is None:
            self._rest, self.sums = rest_of(group), no_gradient_sums(group, len(parts.tokens))
            self._begin(self._rest)
        for number, rows, place in self._batches():
            states = self._states(number, rows)
            given = self._text.given(rows), self._d_inputs[number]
            d_inputs, d_weights, scores = group_backward(group, *states, place, *given)
            self._d_inputs[number] = np.asarray(d_inputs)
            self._d_weights[number] += np.asarray(d_weights)
            if number >= len(parts.owner):
                continue  # padding of a process that has fewer batches than others
            values = np.asarray(scores, np.float64)
            for name, value in zip(GRADIENT_SCORES, values, strict=True):
                self.sums[name][parts.owner[number], own] += value

    def end(self) -> None:
        """Pull back through all that is no expert."""
        rest, leave = self._rest, self._text.leave
        assert rest is not None
        if leave is None:
            return
        for number, rows, place in self._batches():
            given = self._text.given(rows), self._d_inputs[number], self._d_weights[number]
            d_middle = rest_backward(rest, *self._states(number, rows), *given)
            leave(rows, attention_backward(rest, self._text.entered(rows), place, d_middle))

    def _begin(self, rest: DecoderLayer) -> None:
        for number, rows, place in self._batches():
            middle = self._text.middle(rows)
            self._d_inputs[number] = np.zeros(middle.shape, np.float32)
            if self._text.as_seen(number):
                seen = layer_begin(rest, self._text.entered(rows), place).middle
                self._seen[number] = np.asarray(seen)

    def _batches(self) -> Iterator[tuple[int, slice, Context]]:
        batches = self._text.parts.batches
        return zip(itertools.count(), batches.rows, batches.places)

    def _states(self, number: int, rows: slice) -> tuple[Array, Array]:
        """The middle of a batch, and the one that its experts are chosen by, [B, T, D]."""
        middle = self._text.middle(rows)
        as_seen = self._text.as_seen(number)
        return middle, jnp.asarray(self._seen[number]) if as_seen else middle.astype(jnp.float32)


@jax.jit
def group_backward(
    group: DecoderLayer, middle: Array, seen: Array, context: Context, d_out: Array, onto: Array
) -> tuple[Array, Array, Array]:
    """What the experts of a group pull back of a batch.

    Args:
      group: of a layer.
      middle: [B, T, D], states behind the attention, by which experts are weighed.
      seen: float32 [B, T, D], those by which they are chosen and of which their rows are made.
      context: where the tokens stand.
      d_out: [B, T, D], gradient at the output of the layer.
      onto: float32 [B, T, D], gradient at what the experts are given, of the groups before.

    Returns:
      (`onto` with the part of this group; gradient at the routing weights, float32 [N, k], zero at
      other experts; channel scores [J, g, F]).
    """
    assert isinstance(group.mlp, MoE)
    x = expert_inputs(group, Halfway(seen, seen, middle.dtype))
    expert = group.mlp.routing(x)[2]
    run = _backward_as_run(x, d_out.reshape(x.shape), onto.reshape(x.shape))
    trace = group_trace(group, halfway_of(middle), context, run, expert)
    d_x, d_row, scores = trace.kept
    d_weight = jnp.zeros(trace.weight.size).at[trace.dispatch.row_copy].set(d_row, mode="drop")
    return d_x.reshape(onto.shape), d_weight.reshape(trace.weight.shape), scores


def _backward_as_run(seen: Array, d_out: Array, onto: Array) -> RunExperts:
    """In place of the experts their gradients: all that these depend on is known there."""

    def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
        probe = jnp.zeros((len(GRADIENT_SCORES), experts.count.shape[0], experts.width))
        args = (seen, row_weight, experts.weights, probe, dispatch, experts.pool)
        return x, added_gradients(taylor_scores, onto, d_out, *args)

    return run


@jax.jit
def rest_backward(
    rest: DecoderLayer, middle: Array, seen: Array, d_out: Array, d_inputs: Array, d_weights: Array
) -> Array:  # [B, T, D]
    """The gradient at the middle of a layer, once all groups have added theirs.

    Args:
      rest: the layer without its experts.
      middle, seen, d_out: as of `group_backward`.
      d_inputs: float32 [B, T, D], gradient at what the experts are given, of all of them.
      d_weights: float32 [N, k], at the routing weights.
    """
    moe = rest.mlp
    assert isinstance(moe, MoE)
    expert = moe.routing(expert_inputs(rest, Halfway(seen, seen, middle.dtype)))[2]

    def half(middle: Array) -> Array:
        x = expert_inputs(rest, Halfway(middle, middle, middle.dtype))
        weight = moe.routing(x, expert)[1]
        out = _of_gradients(x, weight, d_inputs.reshape(x.shape).astype(x.dtype), d_weights)
        out = out if moe.shared is None else out + moe.shared(x)
        return middle + out.reshape(middle.shape)

    return jax.vjp(half, middle)[1](d_out)[0]


@jax.custom_vjp
def _of_gradients(x: Array, weight: Array, d_x: Array, d_weight: Array) -> Array:  # [N, D]
    """In place of the experts something whose gradients are known, where theirs are summed."""
    return jnp.zeros_like(x)


_of_gradients.defvjp(
    lambda x, weight, *gradients: (jnp.zeros_like(x), gradients),
    lambda gradients, _: (*gradients, None, None),
)
