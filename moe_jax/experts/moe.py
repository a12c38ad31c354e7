"""The Mixture-of-Experts layer: route, dispatch, run the experts, combine.

Of one token: the *router* scores the experts and picks k of them (`router`). *Dispatch* sorts the
copies of all tokens by their expert into tiles of rows (`dispatch`). The *experts*, a pool of
channels (`pool`), make of each row hidden = act(gate, up) and project it down (`swiglu`, on the
products of `grouped_matmul`), and *combine* adds each token's rows up by their routing weights. A
shared expert (`dense`) sees every token beside them. What else can be done to the experts on the
way, `run` says.
"""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from moe_jax.config import MoEConfig, Score
from moe_jax.experts.dense import SharedExpert, init_dense
from moe_jax.experts.dispatch import Dispatch, gather_rows, make_dispatch, tile_height
from moe_jax.experts.pool import Experts, dense_experts
from moe_jax.experts.router import route, router_probability
from moe_jax.experts.run import RunExperts, run_experts
from moe_jax.linear import linear
from moe_jax.mesh import added_up, device_index, shared
from moe_jax.module import module


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

    If `experts` are fewer than the config's, they are a part: without `first` those of one device,
    and the call must be inside of a `shard_map` over experts, where every device routes all tokens
    and the one reduction adds the outputs up; with it a group of consecutive ones, to be added up
    by whoever takes a layer in groups (`moe_jax.groups`). What the trace has of experts is then of
    this part's.

    Where `alive` is False, the router's logit is -inf before anything is made of it: the layer
    computes what it would had that expert and its row of the router been cut out.
    """

    config: MoEConfig = nnx.static()
    router: Array = nnx.data()  # [E, D]
    experts: Experts = nnx.data()
    router_bias: Array | None = nnx.data(default=None)  # float32 [E], for the selection alone
    logit_bias: Array | None = nnx.data(default=None)  # [E]
    shared: SharedExpert | None = nnx.data(default=None)
    alive: Array | None = nnx.data(default=None)  # bool [E]; None for all
    first: Array | None = nnx.data(default=None)  # int32 scalar, number of a group's first expert

    @property
    def own(self) -> slice:
        """Which of the layer's experts these are; not under a trace, nor on several devices."""
        first = 0 if self.first is None else int(self.first)
        return slice(first, first + self.experts.count.shape[0])

    def __call__(
        self,
        x: Array,
        valid: Array,
        run: RunExperts = run_experts,
        expert: Array | None = None,
    ) -> tuple[Array, MoETrace]:
        """Route, dispatch, run the experts, combine.

        Args:
          x: [N, D], already normalised.
          valid: bool [N]; other tokens are routed nowhere.
          run: how the experts are run.
          expert: int32 [N, k], a choice made before; None to let the router choose.

        Returns:
          ([N, D] routed plus shared output, the trace).
        """
        c = self.config
        chex.assert_shape(x, (None, self.router.shape[1]))
        chex.assert_shape(valid, x.shape[:1])
        with jax.named_scope("router"):
            logits, weight, expert = self.routing(x, expert)
        with jax.named_scope("dispatch"):
            # All experts, or those of this device, whose gradients then are parts of sums.
            count = self.experts.count.shape[0]
            is_part = count < c.num_experts
            on_device = is_part and self.first is None
            seen = shared(x) if on_device else x
            given = shared(weight) if on_device else weight
            first = device_index() * count if on_device else self.first
            owner = expert if first is None else expert - first
            here = valid[:, None] & (owner >= 0) & (owner < count) if is_part else valid[:, None]
            owner = jnp.where(here, owner, count).reshape(-1)
            tile = tile_height(expert.size, c.num_experts)
            dispatch = make_dispatch(owner, count, tile, c.experts_per_token)
            row_weight = gather_rows(given.reshape(-1), dispatch, 1)
        with jax.named_scope("experts"):  # and combine
            routed, kept = run(self.experts, seen, row_weight, dispatch)
            routed = added_up(routed) if on_device else routed
        out = routed
        if self.shared is not None:
            with jax.named_scope("shared_expert"):
                out = routed + self.shared(x)
        return out, MoETrace(
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

    def routing(self, x: Array, expert: Array | None = None) -> tuple[Array, Array, Array]:
        """What the router makes of tokens [N, D], which needs no expert.

        Returns:
          (logits float32 [N, E], weights float32 [N, k], experts int32 [N, k]); see `route`.
        """
        logits = self._logits(x)
        return logits, *route(logits, self.config, self.router_bias, expert)

    def _logits(self, x: Array) -> Array:  # [N, D] -> float32 [N, E]
        precise = x.astype(jnp.float32) if self.config.float32_router else x
        logits = linear(precise, self.router, self.logit_bias).astype(jnp.float32)
        return logits if self.alive is None else jnp.where(self.alive[None], logits, -jnp.inf)


def init_moe(
    config: MoEConfig, d_model: int, normal: Callable[..., Array], out_scale: float
) -> MoE:
    """A random layer: weights from `normal(*shape, scale=...)`, biases zero."""
    c, shared = config, None
    if c.d_shared:
        gate = normal(1, d_model) if c.shared_gate else None
        shared = SharedExpert(mlp=init_dense(c.d_shared, d_model, normal, out_scale), gate=gate)
    router, rows = normal(c.num_experts, d_model), c.num_experts * c.d_expert
    return MoE(
        router=router,
        experts=dense_experts(
            normal(rows, d_model),
            normal(rows, d_model),
            normal(rows, d_model, scale=out_scale),
            c.num_experts,
            biased=c.expert_bias,
            activation=c.activation,
        ),
        logit_bias=jnp.zeros(c.num_experts, router.dtype) if c.logit_bias else None,
        shared=shared,
        router_bias=jnp.zeros(c.num_experts) if c.correction_bias else None,
        config=c,
    )
