"""The tokens at each expert of a layer, and sums over them of what its channels make of them."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.activation import gated
from moe_jax.experts.moe import MoE
from moe_jax.experts.weights import ExpertWeights
from moe_jax.norm import rms_norm
from moe_jax.transformer import DecoderLayer

HIGHEST = jax.lax.Precision.HIGHEST
ROWS = 512  # tokens at a time
Carry = TypeVar("Carry")


@struct.dataclass
class Routed:
    """The tokens of a text at the experts of a layer.

    A copy of a token is its way to one expert. Copies are sorted by expert, those of the first half
    of the text before those of the second; behind them stand those of padding, and `ROWS` more.

    Attributes:
      x: float32 [N, D], what the experts are given.
      token: int32 [M], whose copy it is.
      weight: float32 [M], its routing weight.
      edges: int32 [E, 3], where an expert's copies begin, where those of the second half do, and
        where they end.
    """

    x: Array
    token: Array
    weight: Array
    edges: np.ndarray = struct.field(pytree_node=False)

    def at(self, own: slice) -> "Routed":
        """Those at some of the experts, numbered from the first of these."""
        return dataclasses.replace(self, edges=self.edges[own])


@jax.jit
def _choices(layer: DecoderLayer, middle: Array, context: Context) -> tuple[Array, Array, Array]:
    """What the experts are given, float32 [N, D], and each token's experts and weights [N, k]."""
    assert isinstance(layer.mlp, MoE)
    flat = rms_norm(middle, layer.mlp_norm, layer.norm_eps).reshape(-1, middle.shape[-1])
    nothing = lambda experts, x, weight, dispatch: (jnp.zeros_like(x), None)  # noqa: E731
    trace = layer.mlp(flat, context.valid.reshape(-1), nothing)[1]
    gone = layer.mlp.config.num_experts
    expert = jnp.where(trace.valid[:, None], trace.expert, gone)
    return flat.astype(jnp.float32), expert, trace.weight.astype(jnp.float32)


def routed(
    layer: DecoderLayer, middle: Sequence[np.ndarray], places: Sequence[Context], first: np.ndarray
) -> Routed:
    """Where the tokens go.

    Args:
      layer: one with experts, or a group of it.
      middle: per batch [b, T, D], behind the layer's attention.
      places: per batch.
      first: bool [B], windows of the first half.
    """
    assert isinstance(layer.mlp, MoE)
    tokens = sum(part.shape[0] * part.shape[1] for part in middle)
    x = np.empty((tokens, middle[0].shape[-1]), np.float32)
    expert = np.empty((tokens, layer.mlp.config.experts_per_token), np.int32)
    weight, done = np.empty(expert.shape, np.float32), 0
    for part, place in zip(middle, places, strict=True):
        rows = slice(done, done := done + part.shape[0] * part.shape[1])
        x[rows], expert[rows], weight[rows] = _choices(layer, jnp.asarray(part), place)
    second = ~np.repeat(first, middle[0].shape[1])
    part = (2 * expert + second[:, None]).reshape(-1)
    order = np.argsort(part, kind="stable")
    starts = np.searchsorted(part[order], np.arange(2 * layer.mlp.config.num_experts + 1))
    token = np.pad(order // expert.shape[1], (0, ROWS))
    return Routed(
        x=jnp.asarray(x),
        token=jnp.asarray(token, jnp.int32),
        weight=jnp.asarray(np.pad(weight.reshape(-1)[order], (0, ROWS))),
        edges=np.stack([starts[:-1:2], starts[1::2], starts[2::2]], axis=1).astype(np.int32),
    )


@struct.dataclass
class Part:
    """Some channels of an expert and its tokens, as the programs below take them.

    Attributes:
      pools: of the layer.
      x, token, weight: of `Routed`.
      edges: int32 [3], of the expert.
      channels: int32 [W], rows of the pools; what lies beyond them is no channel.
      bias: 1 if the routing weight itself is one more hidden value, behind the channels; 0 if not.
    """

    pools: ExpertWeights
    x: Array
    token: Array
    weight: Array
    edges: Array | np.ndarray
    channels: Array | np.ndarray
    bias: Array | np.float32

    def walk(
        self,
        start: Array,
        stop: Array,
        step: Callable[[Array, Array, Carry], Carry],
        carry: Carry,
    ) -> Carry:
        """Go through copies, `ROWS` at a time: step(their tokens [R], hidden rows times routing
        weights [R, W + 1], carry) -> carry. Those beyond the last have no token and are zero."""

        def run(i: Array, carry: Carry) -> Carry:
            at = start + i * ROWS
            inside = at + jnp.arange(ROWS) < stop
            token, weight = (
                jax.lax.dynamic_slice_in_dim(one, at, ROWS) for one in (self.token, self.weight)
            )
            token = jnp.where(inside, token, len(self.x))
            return step(token, self._hidden(token, jnp.where(inside, weight, 0)), carry)

        return jax.lax.fori_loop(0, -((start - stop) // ROWS), run, carry)

    def halves(
        self, step: Callable[[Array, Array, Carry], Carry], carry: Carry
    ) -> tuple[Carry, Carry]:
        """`walk` through each half of the expert's copies."""
        edges = jnp.asarray(self.edges)
        a, b = (self.walk(edges[i], edges[i + 1], step, carry) for i in (0, 1))
        return a, b

    def _hidden(self, token: Array, weight: Array) -> Array:  # float32 [R, W + 1]
        rows, channels = self.x.at[token].get(mode="fill", fill_value=0), jnp.asarray(self.channels)

        def taken(pool: Array) -> Array:
            return pool.at[channels].get(mode="fill", fill_value=0).astype(jnp.float32)

        def project(pool: Array, shift: Array | None) -> Array:
            out = jnp.einsum("nd,wd->nw", rows, taken(pool), precision=HIGHEST)
            return out if shift is None else out + taken(shift)[:, 0][None]

        pools = self.pools
        gate, up = project(pools.gate, pools.gate_bias), project(pools.up, pools.up_bias)
        hidden = jnp.where(channels < len(pools.gate), gated(pools.activation, gate, up), 0)
        one = jnp.broadcast_to(self.bias, (ROWS, 1))
        return jnp.concatenate([hidden, one], axis=1) * weight[:, None]


@jax.jit
def grams(part: Part) -> Array:  # [2, W + 1, W + 1]
    """Sums of h h^T over each half of the tokens."""

    def step(token: Array, hidden: Array, gram: Array) -> Array:
        return gram + jnp.einsum("nk,nj->kj", hidden, hidden, precision=HIGHEST)

    size = len(part.channels) + 1
    return jnp.stack(part.halves(step, jnp.zeros((size, size))))
