"""How the experts of a layer are run: plainly, or with something done to their hidden rows."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array

from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.expert_rows import combine, expert_rows, no_score
from moe_jax.experts.pool import Experts
from moe_jax.experts.swiglu import added_experts, routed_experts
from moe_jax.experts.weights import ExpertWeights

# Hidden rows [P, width] of the experts and their layout -> the rows that w_down sees.
ChannelGate = Callable[[Array, Dispatch], Array]

# How the experts of a layer are run: (experts, tokens [N, D], routing weights of the rows [P],
# dispatch) -> (routed output [N, D], whatever else is to be kept). Masks and attribution enter the
# model here, so neither needs a copy of it.
RunExperts = Callable[[Experts, Array, Array, Dispatch], tuple[Array, Any]]


def run_experts(
    experts: Experts,
    x: Array,
    row_weight: Array,
    dispatch: Dispatch,
    *,
    weights: ExpertWeights | None = None,
    onto: Array | None = None,
) -> tuple[Array, None]:
    """The fastest way that keeps nothing.

    Args:
      experts: the pool; weights may be `QTensor`.
      x: [N, D] tokens.
      row_weight: float32 [P], routing weight of each dispatched row, 0 for padding.
      dispatch: the row layout.
      weights: what to compute with in place of the pool's own, as for gradients at them.
      onto: float32 [N, D], what other experts of the layer gave, to which these are added.

    Returns:
      ([N, D] weighted sum of each token's experts, in the dtype of `x`, or float32 with `onto`,
      None).
    """
    pool, weights = experts.pool, experts.weights if weights is None else weights
    if onto is not None:
        return added_experts(onto, x, row_weight, weights, dispatch, pool), None
    nothing = jnp.zeros((0, pool.count.shape[0], pool.width))
    return routed_experts(no_score, x, row_weight, weights, nothing, dispatch, pool), None


def gated_experts(channel_gate: ChannelGate) -> RunExperts:
    """Run the experts with something done to their hidden rows, and keep every stage.

    Args:
      channel_gate: ([P, width] hidden rows, dispatch) -> the hidden rows that w_down sees.

    Returns:
      What `MoE` takes as `run`; the trace then keeps the `ExpertRows`.
    """

    def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
        def gated(hidden: Array, gate: Array, up: Array) -> Array:
            return channel_gate(hidden, dispatch)

        rows = expert_rows(x, experts.weights, dispatch, experts.pool, gated)
        return combine(rows.out, row_weight, jnp.zeros_like(x), dispatch), rows

    return run
