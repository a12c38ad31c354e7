"""Routed experts as a pool of channels, and the shared expert."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from moe_jax.attention import linear
from moe_jax.config import MoEConfig, Score
from moe_jax.grouped_matmul import (
    Dispatch,
    Pool,
    contract,
    expand,
    gather_rows,
    make_dispatch,
    tile_height,
)
from moe_jax.module import module
from moe_jax.quant import Weight, dequantize
from moe_jax.router import route, router_probability

# Rows of the intermediate [P, width] and their layout -> gated rows. Masks and attribution enter
# the model here, so neither needs a copy of it.
ChannelGate = Callable[[Array, Dispatch], Array]


@module
class DenseMLP(nnx.Module):
    """SwiGLU feed-forward network; weights as [out, in]."""

    w_gate: Weight = nnx.data()  # [F, D]
    w_up: Weight = nnx.data()  # [F, D]
    w_down: Weight = nnx.data()  # [D, F]

    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        """Source: SwiGLU, arXiv:2002.05202."""
        return linear(jax.nn.silu(linear(x, self.w_gate)) * linear(x, self.w_up), self.w_down)


@module
class SharedExpert(nnx.Module):
    """The expert every token visits, optionally weighted by a sigmoid gate."""

    mlp: DenseMLP = nnx.data()
    gate: Array | None = nnx.data(default=None)  # [1, D]

    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        """Add nothing but the expert: the caller adds the result to the routed output."""
        out = self.mlp(x)
        return out if self.gate is None else jax.nn.sigmoid(linear(x, self.gate)) * out


@module
class Experts(nnx.Module):
    """Routed SwiGLU experts of one layer as a pool of channels, one row per channel.

    Expert e owns `count[e]` consecutive rows; rows after the last expert's are zero. In the dense
    model every count is F; pruning selects rows; an emptied expert owns none and adds zero.
    """

    w_gate: Weight = nnx.data()  # [C, D]
    w_up: Weight = nnx.data()  # [C, D]
    w_down: Weight = nnx.data()  # [C, D], transposed against Hugging Face
    count: Array = nnx.data()  # int32 [E]
    width: int = nnx.static()  # columns of the intermediate rows, at least every count
    block: int = nnx.static()  # channels per step of the matmul loop

    @property
    def pool(self) -> Pool:
        """Where each expert's channels lie."""
        return Pool(
            offset=jnp.cumsum(self.count) - self.count,
            count=self.count,
            width=self.width,
            block=self.block,
        )


@struct.dataclass
class ExpertRows:
    """What the experts computed, in dispatch order.

    Attributes:
      gate: [P, width], before the nonlinearity.
      up: [P, width].
      hidden: [P, width], silu(gate) * up, before any channel gate.
      out: [P, D], before the routing weight.
    """

    gate: Array
    up: Array
    hidden: Array
    out: Array


def apply_experts(
    experts: Experts,
    x: Array,  # [P, D]
    dispatch: Dispatch,
    channel_gate: ChannelGate | None = None,
) -> ExpertRows:
    """Run each expert on its own rows.

    Args:
      experts: the pool; weights may be `QTensor`.
      x: token copies in dispatch order.
      dispatch: the row layout.
      channel_gate: applied to the intermediate rows [P, width].

    Returns:
      The rows of every stage; those nobody uses cost nothing under `jit`.

    Source: SwiGLU, arXiv:2002.05202.
    """
    pool = experts.pool
    gate = expand(x, dequantize(experts.w_gate), dispatch, pool)
    up = expand(x, dequantize(experts.w_up), dispatch, pool)
    hidden = jax.nn.silu(gate) * up
    gated = hidden if channel_gate is None else channel_gate(hidden, dispatch)
    out = contract(gated, dequantize(experts.w_down), dispatch, pool)
    return ExpertRows(gate=gate, up=up, hidden=hidden, out=out)


@struct.dataclass
class MoETrace:
    """Everything a Mixture-of-Experts layer computed on its way.

    Attributes:
      logits: float32 [N, E] router logits of N tokens.
      weight: float32 [N, k] routing weights as used.
      expert: int32 [N, k].
      valid: bool [N].
      dispatch: row layout of the N * k token copies.
      row_weight: float32 [P], routing weight of each row, 0 for padding.
      rows: the experts' computations.
      routed: [N, D], weighted sum of the routed experts.
      score: how the router makes scores of logits.
    """

    logits: Array
    weight: Array
    expert: Array
    valid: Array
    dispatch: Dispatch
    row_weight: Array
    rows: ExpertRows
    routed: Array
    score: Score = struct.field(pytree_node=False, default="softmax")

    @property
    def probability(self) -> Array:
        """float32 [N, E], the router's scores divided by their sum over experts."""
        return router_probability(self.logits, self.score)


@module
class MoE(nnx.Module):
    """Mixture-of-Experts feed-forward layer."""

    router: Array = nnx.data()  # [E, D]
    experts: Experts = nnx.data()
    config: MoEConfig = nnx.static()
    router_bias: Array | None = nnx.data(default=None)  # float32 [E], for the selection alone
    shared: SharedExpert | None = nnx.data(default=None)

    def __call__(
        self, x: Array, valid: Array, channel_gate: ChannelGate | None = None
    ) -> tuple[Array, MoETrace]:
        """Route, run the experts, combine.

        Args:
          x: [N, D], already normalised.
          valid: bool [N]; other tokens are routed nowhere.
          channel_gate: see `apply_experts`.

        Returns:
          ([N, D] routed plus shared output, the trace).
        """
        c = self.config
        precise = x.astype(jnp.float32) if c.float32_router else x
        logits = linear(precise, self.router).astype(jnp.float32)
        weight, expert = route(logits, c, self.router_bias)
        copies = expert.size
        owner = jnp.where(valid[:, None], expert, c.num_experts).reshape(-1)
        dispatch = make_dispatch(owner, c.num_experts, tile_height(copies, c.num_experts))
        rows = apply_experts(
            self.experts, gather_rows(x, dispatch, c.experts_per_token), dispatch, channel_gate
        )
        row_weight = gather_rows(weight.reshape(-1), dispatch, 1)
        weighted = rows.out * row_weight[:, None].astype(x.dtype)
        token = dispatch.row_copy // c.experts_per_token
        routed = jnp.zeros_like(x).at[token].add(weighted, mode="drop")
        out = routed if self.shared is None else routed + self.shared(x)
        trace = MoETrace(
            logits=logits,
            weight=weight,
            expert=expert,
            valid=valid,
            dispatch=dispatch,
            row_weight=row_weight,
            rows=rows,
            routed=routed,
            score=c.score,
        )
        return out, trace
