"""All gated experts of a layer as compositions of grouped products, stage by stage.

What runs where there is no loop over tiles, and what those who look into an expert call; the
specification of `swiglu`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moe_jax.experts.activation import gated, gated_gradient
from moe_jax.experts.dispatch import Dispatch, Pool, gather_rows, sum_by_expert
from moe_jax.experts.grouped_matmul import contract, expand
from moe_jax.experts.weights import ExpertWeights, real_rows, row_expert

# (hidden, d hidden, gate, d gate), each [rows, channels] -> scores per row and channel, summed over
# the rows of each expert; d is the gradient of the loss.
ChannelScore = Callable[[Array, Array, Array, Array], tuple[Array, ...]]


def no_score(hidden, d_hidden, gate, d_gate) -> tuple[Array, ...]:
    """Score nothing."""
    return ()


@struct.dataclass
class ExpertRows:
    """What the experts computed, in dispatch order.

    Attributes:
      x: [P, D], the token of each row.
      gate: [P, width], before the nonlinearity.
      up: [P, width].
      hidden: [P, width], what the activation makes of the two.
      out: [P, D], before the routing weight.
    """

    x: Array
    gate: Array
    up: Array
    hidden: Array
    out: Array


def expert_rows(
    x: Array,
    weights: ExpertWeights,
    dispatch: Dispatch,
    pool: Pool,
    channel_gate: Callable[[Array, Array, Array], Array] = lambda hidden, gate, up: hidden,
) -> ExpertRows:
    """Run each expert on its own rows and keep every stage.

    Args:
      x: [N, D] tokens.
      weights: the pools.
      dispatch: the row layout.
      pool: the channel layout.
      channel_gate: (hidden, gate, up), each [P, width] -> the hidden rows that w_down sees.

    Returns:
      The rows; under `jit`, stages that nobody uses cost nothing.
    """
    with jax.named_scope("gather"):
        rows = gather_rows(x, dispatch, dispatch.copies)
        real = real_rows(dispatch.token, x)

    def projected(weight: Array, bias: Array | None) -> Array:
        out = expand(rows, weight, dispatch, pool)
        # Padding has no bias: its rows stay zero.
        return out if bias is None else out + expand(real, bias, dispatch, pool)

    with jax.named_scope("gate_up"):
        gate = projected(weights.gate, weights.gate_bias)
        up = projected(weights.up, weights.up_bias)
        hidden = gated(weights.activation, gate, up)
    with jax.named_scope("down"):
        out = contract(channel_gate(hidden, gate, up), weights.down, dispatch, pool)
        if weights.down_bias is not None:
            out += real * weights.down_bias.astype(out.dtype)[row_expert(dispatch)]
    return ExpertRows(x=rows, gate=gate, up=up, hidden=hidden, out=out)


def combine(out: Array, row_weight: Array, onto: Array, dispatch: Dispatch) -> Array:
    """Add weighted expert outputs [P, D] to `onto` [N, D], in the dtype of that."""
    with jax.named_scope("combine"):
        weighted = out * row_weight[:, None].astype(out.dtype)
        return onto.at[dispatch.token].add(weighted.astype(onto.dtype), mode="drop")


def routed_experts_by_rows(score, x, row_weight, weights, probe, dispatch, pool) -> Array:
    """`routed_experts` as grouped products; same arguments and result."""

    def tap(hidden: Array, gate: Array, up: Array) -> Array:
        return _tap(score, weights.activation, hidden, gate, up, probe, dispatch)

    rows = expert_rows(x, weights, dispatch, pool, tap)
    return combine(rows.out, row_weight, jnp.zeros_like(x), dispatch)


def _pass_hidden(score, activation, hidden, gate, up, probe, dispatch):
    return hidden


def _tap_backward(score, activation, saved, d_hidden):
    hidden, gate, up, probe, dispatch = saved
    wide = [value.astype(jnp.float32) for value in (hidden, d_hidden, gate, up)]
    d_gate, _ = gated_gradient(activation, wide[2], wide[3], wide[1])
    sums = [sum_by_expert(part, dispatch) for part in score(*wide[:3], d_gate)]
    d_probe = jnp.stack(sums) if sums else jnp.zeros_like(probe)
    return d_hidden, jnp.zeros_like(gate), jnp.zeros_like(up), d_probe, None


_tap: Any = jax.custom_vjp(_pass_hidden, nondiff_argnums=(0, 1))
_tap.defvjp(lambda score, activation, *args: (args[0], args), _tap_backward)
