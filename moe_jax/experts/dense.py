"""Gated networks that every token visits: a dense layer's, and a shared expert."""

from collections.abc import Callable

import jax
from flax import nnx
from jax import Array

from moe_jax.linear import linear
from moe_jax.module import module
from moe_jax.quant import Weight


@module
class DenseMLP(nnx.Module):
    """SwiGLU feed-forward network; weights as [out, in]."""

    w_gate: Weight = nnx.data()  # [F, D]
    w_up: Weight = nnx.data()  # [F, D]
    w_down: Weight = nnx.data()  # [D, F]

    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        """Source: SwiGLU, arXiv:2002.05202."""
        with jax.named_scope("gate_up"):
            hidden = jax.nn.silu(linear(x, self.w_gate)) * linear(x, self.w_up)
        with jax.named_scope("down"):
            return linear(hidden, self.w_down)


@module
class SharedExpert(nnx.Module):
    """The expert every token visits, optionally weighted by a sigmoid gate."""

    mlp: DenseMLP = nnx.data()
    gate: Array | None = nnx.data(default=None)  # [1, D]

    def __call__(self, x: Array) -> Array:  # [..., D] -> [..., D]
        """Add nothing but the expert: the caller adds the result to the routed output."""
        out = self.mlp(x)
        return out if self.gate is None else jax.nn.sigmoid(linear(x, self.gate)) * out


def init_dense(
    width: int, d_model: int, normal: Callable[..., Array], out_scale: float
) -> DenseMLP:
    """A random network: weights from `normal(*shape, scale=...)`."""
    return DenseMLP(
        w_gate=normal(width, d_model),
        w_up=normal(width, d_model),
        w_down=normal(d_model, width, scale=out_scale),
    )
