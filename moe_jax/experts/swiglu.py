"""All gated experts of a layer as one function of its tokens, with a gradient of its own.

On a CPU the function and its gradient are one loop over tiles each: a tile's intermediate rows
live in the cache and never in memory. Elsewhere they are the compositions of `expert_rows`, which
are also the specification of the loops.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moe_jax.experts.activation import gated, gated_gradient
from moe_jax.experts.dispatch import Dispatch, Pool
from moe_jax.experts.expert_rows import ChannelScore, combine, expert_rows, routed_experts_by_rows
from moe_jax.experts.grouped_matmul import (
    add_slice,
    channel_block,
    dot,
    live_channels,
    on_cpu,
    walk_tiles,
    weight_bits,
)
from moe_jax.experts.weights import (
    COLUMNS,
    ROWS,
    ExpertWeights,
    project,
    real_rows,
    routing_matrix,
    tile_tokens,
)
from moe_jax.linear import outer

# Gate and up rows before the activation, each [P, width].
Projections = tuple[Array, Array]


def routed_experts(
    score: ChannelScore,
    x: Array,
    row_weight: Array,
    weights: ExpertWeights,
    probe: Array,
    dispatch: Dispatch,
    pool: Pool,
    projections: Projections | None = None,
) -> Array:
    """Weighted sum of each token's experts.

    Args:
      score: what to measure in the backward pass.
      x: [N, D] tokens.
      row_weight: float32 [P], routing weight of each dispatched row, 0 for padding.
      weights: the pools.
      probe: float32 [J, E, width], any values; its cotangent is the J sums of `score`.
      dispatch: the row layout.
      pool: the channel layout.
      projections: gate and up rows as these arguments give them, if they are known already: the
        backward pass of a CPU then need not compute them again.

    Returns:
      [N, D] in the dtype of `x`. Gradients that nobody asks for cost nothing under `jit`.

    Source: SwiGLU, arXiv:2002.05202.
    """
    bias, weights = weights.down_bias, weights.replace(down_bias=None)  # type: ignore[attr-defined]
    args = (x, row_weight, weights, probe, dispatch, pool, projections)
    out = _routed_experts(score, *args)
    return out if bias is None else out + _biases(bias, x, row_weight, dispatch).astype(out.dtype)


def added_experts(
    onto: Array, x: Array, row_weight: Array, weights: ExpertWeights, dispatch: Dispatch, pool: Pool
) -> Array:
    """Add some experts of a layer to what others gave, without a gradient.

    On a CPU rows are added in the order of `routed_experts` over all of them, so that the sums of
    groups of experts one after the other have the bits of that one, but for biases.

    Args:
      onto: float32 [N, D].
      x, row_weight, weights, dispatch, pool: as of `routed_experts`.

    Returns:
      float32 [N, D].
    """
    bias, weights = weights.down_bias, weights.replace(down_bias=None)  # type: ignore[attr-defined]
    if on_cpu():
        out = _sum_tiles(onto, x, row_weight, weights, dispatch, pool)
    else:
        rows = expert_rows(x, weights, dispatch, pool)
        out = combine(rows.out, row_weight, onto, dispatch)
    return out if bias is None else out + _biases(bias, x, row_weight, dispatch)


def added_gradients(
    score: ChannelScore,
    onto: Array,
    d_out: Array,
    x: Array,
    row_weight: Array,
    weights: ExpertWeights,
    probe: Array,
    dispatch: Dispatch,
    pool: Pool,
) -> tuple[Array, Array, Array]:
    """Add what some experts of a layer pull back to what others did.

    On a CPU rows are added in the order of the gradient of `routed_experts` over all of them, so
    that the sums of groups of experts one after the other have the bits of that one.

    Args:
      score: as of `routed_experts`.
      onto: float32 [N, D], gradient at `x` as far as others gave it.
      d_out: [N, D], gradient at the output of the layer.
      x, row_weight, weights, probe, dispatch, pool: as of `routed_experts`.

    Returns:
      (float32 [N, D] `onto` with the part of these, float32 [P] gradient at `row_weight`, float32
      [J, E, width] the sums of `score`).
    """
    bias, weights = weights.down_bias, weights.replace(down_bias=None)  # type: ignore[attr-defined]
    saved = (x, row_weight, weights, probe, dispatch, pool, None)
    if on_cpu():
        sums = _backward_tiles(score, onto, d_out, *saved)
        d_x, d_weight, d_probe = sums.x, sums.row_weight, sums.probe
    else:
        part, d_weight, _, d_probe = _backward_by_rows(score, d_out, *saved)
        d_x = onto + part.astype(jnp.float32)
    if bias is not None:
        biases = jax.vjp(lambda weight: _biases(bias, x, weight, dispatch), row_weight)[1]
        d_weight += biases(d_out.astype(jnp.float32))[0]
    return d_x, d_weight, d_probe


def _biases(bias: Array, x: Array, row_weight: Array, dispatch: Dispatch) -> Array:
    """Weighted sum of the biases of each token's experts, float32 [N, D]; outside the loop over
    channels, since an expert without any still has its own."""
    with jax.named_scope("down_bias"):
        routing = routing_matrix(row_weight, dispatch, x.shape[0])
        return jnp.dot(routing, bias.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


def _forward(score, x, row_weight, weights, probe, dispatch, pool, projections) -> Array:
    if on_cpu():
        zeros = jnp.zeros(x.shape, jnp.float32)
        return _sum_tiles(zeros, x, row_weight, weights, dispatch, pool).astype(x.dtype)
    return routed_experts_by_rows(score, x, row_weight, weights, probe, dispatch, pool)


def _backward(score, saved, d_out):
    x, row_weight, weights, probe, *_ = saved
    if on_cpu():
        sums = _backward_tiles(score, jnp.zeros(x.shape, jnp.float32), d_out, *saved)
        found = (sums.x, sums.row_weight, sums.weights, sums.probe)
        inputs = (x, row_weight, weights, probe)
        gradients = jax.tree.map(lambda one, value: one.astype(value.dtype), found, inputs)
    else:
        gradients = _backward_by_rows(score, d_out, *saved)
    return (*gradients, None, None, None)


def _backward_by_rows(score, d_out, x, row_weight, weights, probe, dispatch, pool, _):
    def by_rows(x, row_weight, weights, probe):
        return routed_experts_by_rows(score, x, row_weight, weights, probe, dispatch, pool)

    return jax.vjp(by_rows, x, row_weight, weights, probe)[1](d_out)


_routed_experts: Any = jax.custom_vjp(_forward, nondiff_argnums=(0,))
_routed_experts.defvjp(lambda score, *args: (_forward(score, *args), args), _backward)


def _sum_tiles(onto, x, row_weight, weights, dispatch, pool):
    bits = jax.tree.map(weight_bits, weights)

    def step(out, row, expert, start):
        first = pool.offset[expert] + start
        index, tokens = tile_tokens(x, dispatch, row)
        weight = jax.lax.dynamic_slice_in_dim(row_weight, row, dispatch.tile)[:, None]
        with jax.named_scope("gate_up"):
            gate, up = project(bits, first, pool.block, tokens, real_rows(index, x))
            hidden = gated(weights.activation, gate, up) * weight
            hidden = jnp.where(live_channels(pool, expert, start), hidden, 0)
        with jax.named_scope("down"):
            down = channel_block(bits.down, first, pool.block, x.dtype)
            part = dot(hidden.astype(x.dtype), down, COLUMNS)
        with jax.named_scope("combine"):
            return out.at[index].add(part, mode="drop")

    return walk_tiles(dispatch, pool, step, onto)


@struct.dataclass
class _Gradients:
    x: Array  # float32 [N, D]
    row_weight: Array  # float32 [P]
    weights: ExpertWeights  # float32
    probe: Array  # float32 [J, E, width]


def _backward_tiles(score, onto, d_out, x, row_weight, weights, probe, dispatch, pool, projections):
    bits, tile = jax.tree.map(weight_bits, weights), dispatch.tile

    def step(sums: _Gradients, row, expert, start):
        first = pool.offset[expert] + start

        def block(pool_bits: Array) -> Array:
            return channel_block(pool_bits, first, pool.block, x.dtype)

        index, tokens = tile_tokens(x, dispatch, row)
        _, d_tokens = tile_tokens(d_out, dispatch, row)
        weight = jax.lax.dynamic_slice_in_dim(row_weight, row, tile)[:, None]
        real = real_rows(index, x)
        if projections is None:
            gate, up = project(bits, first, pool.block, tokens, real)
        else:
            size = (tile, pool.block)
            gate, up = (jax.lax.dynamic_slice(rows, (row, start), size) for rows in projections)
        live = live_channels(pool, expert, start)
        hidden = jnp.where(live, gated(weights.activation, gate, up), 0)
        pulled = dot(d_tokens, block(bits.down), ROWS)
        d_hidden = jnp.where(live, pulled * weight, 0)
        d_gate, d_up = gated_gradient(weights.activation, gate, up, d_hidden)
        d_row = jnp.sum(hidden * pulled, axis=1)
        narrow = [part.astype(x.dtype) for part in (d_gate, d_up)]
        d_x = dot(narrow[0], block(bits.gate), COLUMNS) + dot(narrow[1], block(bits.up), COLUMNS)

        def pulled_weight(rows: Array, columns: Array) -> Array:
            return outer(rows.astype(x.dtype), columns)

        biased = weights.gate_bias is not None
        d_weights = ExpertWeights(
            gate=pulled_weight(d_gate, tokens),
            up=pulled_weight(d_up, tokens),
            down=pulled_weight(hidden * weight, d_tokens),
            gate_bias=pulled_weight(d_gate, real) if biased else None,
            up_bias=pulled_weight(d_up, real) if biased else None,
            activation=weights.activation,
        )
        scores = [jnp.sum(part, axis=0) for part in score(hidden, d_hidden, gate, d_gate)]
        d_probe = jnp.stack(scores)[:, None] if scores else sums.probe[:, :1, : pool.block]
        return _Gradients(
            x=sums.x.at[index].add(d_x, mode="drop"),
            row_weight=add_slice(sums.row_weight, d_row, (row,)),
            weights=jax.tree.map(
                lambda whole, part: add_slice(whole, part, (first, 0)), sums.weights, d_weights
            ),
            probe=add_slice(sums.probe, d_probe, (0, expert, start)),
        )

    inputs = (row_weight, weights, probe)
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), inputs)
    return walk_tiles(dispatch, pool, step, _Gradients(onto, *zeros))
