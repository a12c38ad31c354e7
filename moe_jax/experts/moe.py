"""Routed experts as a pool of channels, and the shared expert."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from moe_jax.config import SWIGLU, Activation, MoEConfig, Score
from moe_jax.experts.dispatch import Dispatch, Pool, gather_rows, make_dispatch, tile_height
from moe_jax.experts.router import route, router_probability
from moe_jax.experts.swiglu import combine, expert_rows, no_score, routed_experts
from moe_jax.experts.weights import Weights
from moe_jax.linear import linear
from moe_jax.module import module
from moe_jax.quant import Weight, dequantize

# Hidden rows [P, width] of the experts and their layout -> the rows that w_down sees.
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
    """Routed gated experts of one layer as a pool of channels, one row per channel.

    Expert e owns `count[e]` consecutive rows; rows after the last expert's are zero. In the dense
    model every count is F; pruning selects rows; an emptied expert owns none and adds zero, or
    `b_down[e]` if there are biases.
    """

    w_gate: Weight = nnx.data()  # [C, D]
    w_up: Weight = nnx.data()  # [C, D]
    w_down: Weight = nnx.data()  # [C, D], transposed against Hugging Face
    count: Array = nnx.data()  # int32 [E]
    width: int = nnx.static()  # columns of the intermediate rows, at least every count
    block: int = nnx.static()  # channels per step of the matmul loop
    b_gate: Array | None = nnx.data(default=None)  # [C]
    b_up: Array | None = nnx.data(default=None)  # [C]
    b_down: Array | None = nnx.data(default=None)  # [E, D]
    activation: Activation = nnx.static(default=SWIGLU)

    @property
    def weights(self) -> Weights:
        """The pools as plain arrays."""
        pools = (self.w_gate, self.w_up, self.w_down)
        return Weights(
            *(dequantize(pool) for pool in pools),
            gate_bias=None if self.b_gate is None else self.b_gate[:, None],
            up_bias=None if self.b_up is None else self.b_up[:, None],
            down_bias=self.b_down,
            activation=self.activation,
        )

    @property
    def pool(self) -> Pool:
        """Where each expert's channels lie."""
        return Pool(
            offset=jnp.cumsum(self.count) - self.count,
            count=self.count,
            width=self.width,
            block=self.block,
        )


# How the experts of a layer are run: (experts, tokens [N, D], routing weights of the rows [P],
# dispatch) -> (routed output [N, D], whatever else is to be kept). Masks and attribution enter the
# model here, so neither needs a copy of it.
RunExperts = Callable[[Experts, Array, Array, Dispatch], tuple[Array, Any]]


def run_experts(
    experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch
) -> tuple[Array, None]:
    """The fastest way that keeps nothing.

    Args:
      experts: the pool; weights may be `QTensor`.
      x: [N, D] tokens.
      row_weight: float32 [P], routing weight of each dispatched row, 0 for padding.
      dispatch: the row layout.

    Returns:
      ([N, D] weighted sum of each token's experts, None).
    """
    pool = experts.pool
    probe = jnp.zeros((0, pool.count.shape[0], pool.width))
    args = (x, row_weight, experts.weights, probe, dispatch, pool)
    return routed_experts(no_score, *args), None


def gated_experts(channel_gate: ChannelGate) -> RunExperts:
    """Run the experts with something done to their hidden rows, and keep every stage.

    Args:
      channel_gate: ([P, width] hidden rows, dispatch) -> the hidden rows that w_down sees.

    Returns:
      What `MoE` takes as `run`; the trace then keeps the `ExpertRows`.
    """

    def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
        gate = lambda hidden, *_: channel_gate(hidden, dispatch)  # noqa: E731
        rows = expert_rows(x, experts.weights, dispatch, experts.pool, gate)
        return combine(rows.out, row_weight, x.shape[0], dispatch), rows

    return run


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
      kept: what `run` kept; None for the plain forward.
      routed: [N, D], weighted sum of the routed experts.
      score: how the router makes scores of logits.
    """

    logits: Array
    weight: Array
    expert: Array
    valid: Array
    dispatch: Dispatch
    row_weight: Array
    kept: Any
    routed: Array
    score: Score = struct.field(pytree_node=False, default="softmax")

    @property
    def probability(self) -> Array:
        """float32 [N, E], the router's scores divided by their sum over experts."""
        return router_probability(self.logits, self.score)


@module
class MoE(nnx.Module):
    """Mixture-of-Experts feed-forward layer.

    Where `alive` is False, the router's logit is -inf before anything is made of it: the layer
    computes what it would had that expert and its row of the router been cut out.
    """

    router: Array = nnx.data()  # [E, D]
    experts: Experts = nnx.data()
    config: MoEConfig = nnx.static()
    router_bias: Array | None = nnx.data(default=None)  # float32 [E], for the selection alone
    logit_bias: Array | None = nnx.data(default=None)  # [E]
    shared: SharedExpert | None = nnx.data(default=None)
    alive: Array | None = nnx.data(default=None)  # bool [E]; None for all

    def __call__(
        self,
        x: Array,
        valid: Array,
        run: RunExperts = run_experts,
        expert: Array | None = None,
    ) -> tuple[Array, MoETrace]:
        """Route, run the experts, combine.

        Args:
          x: [N, D], already normalised.
          valid: bool [N]; other tokens are routed nowhere.
          run: how the experts are run.
          expert: int32 [N, k], a choice made before; None to let the router choose.

        Returns:
          ([N, D] routed plus shared output, the trace).
        """
        c = self.config
        precise = x.astype(jnp.float32) if c.float32_router else x
        logits = linear(precise, self.router, self.logit_bias).astype(jnp.float32)
        if self.alive is not None:
            logits = jnp.where(self.alive[None], logits, -jnp.inf)
        weight, expert = route(logits, c, self.router_bias, expert)
        owner = jnp.where(valid[:, None], expert, c.num_experts).reshape(-1)
        tile = tile_height(expert.size, c.num_experts)
        dispatch = make_dispatch(owner, c.num_experts, tile, c.experts_per_token)
        row_weight = gather_rows(weight.reshape(-1), dispatch, 1)
        routed, kept = run(self.experts, x, row_weight, dispatch)
        out = routed if self.shared is None else routed + self.shared(x)
        trace = MoETrace(
            logits=logits,
            weight=weight,
            expert=expert,
            valid=valid,
            dispatch=dispatch,
            row_weight=row_weight,
            kept=kept,
            routed=routed,
            score=c.score,
        )
        return out, trace
