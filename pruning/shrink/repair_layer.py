"""Repair of one decoder layer from the inputs that its experts see behind the repaired layers."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.activation import gated
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.experts.weights import ExpertWeights
from moe_jax.norm import rms_norm
from moe_jax.transformer import DecoderLayer
from pruning.shrink.repair import HalvedRidge, Missing

PASSES = 3  # over the experts of a layer, each time for what the others leave
HIGHEST = jax.lax.Precision.HIGHEST
LEAST_ROWS = 64  # an expert's tokens are padded to a power of two, at least this: few compilations
Changes = dict[int, np.ndarray]  # by expert, float64 [K, D], of a bias in the last row


@dataclass(frozen=True, eq=False)
class Routed:
    """The tokens of a text at the experts of a layer.

    Attributes:
      x: float32 [N, D], what they are given.
      tokens: per expert int32 [n], which of them come to it.
      weight: per expert float32 [n], their routing weights.
      first: bool [N], whose half is the first.
    """

    x: Array
    tokens: Sequence[np.ndarray]
    weight: Sequence[np.ndarray]
    first: np.ndarray


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
      layer: one with experts.
      middle: per batch [b, T, D], behind the layer's attention.
      places: per batch.
      first: bool [B], windows of the first half.
    """
    assert isinstance(layer.mlp, MoE)
    found = [
        _choices(layer, jnp.asarray(x), place) for x, place in zip(middle, places, strict=True)
    ]
    expert, weight = (np.concatenate([np.asarray(one[i]) for one in found]) for i in (1, 2))
    order = np.argsort(expert.reshape(-1), kind="stable")
    stops = np.searchsorted(expert.reshape(-1)[order], np.arange(layer.mlp.config.num_experts + 1))
    copies = [order[start:stop] for start, stop in itertools.pairwise(stops)]
    return Routed(
        x=jnp.concatenate([one[0] for one in found]),
        tokens=[(mine // expert.shape[1]).astype(np.int32) for mine in copies],
        weight=[weight.reshape(-1)[mine] for mine in copies],
        first=np.repeat(first, middle[0].shape[1]),
    )


@jax.jit
def _hidden(
    pools: ExpertWeights, x: Array, tokens: Array, weight: Array, channels: Array, bias: Array
) -> Array:  # float32 [n, W + 1]
    """Hidden rows times routing weights; behind them those weights alone if `bias` is one, or zero.

    Rows of tokens and columns of channels that do not exist are zero.
    """
    rows = x.at[tokens].get(mode="fill", fill_value=0)

    def taken(pool: Array) -> Array:
        return pool.at[channels].get(mode="fill", fill_value=0).astype(jnp.float32)

    def project(pool: Array, shift: Array | None) -> Array:
        out = jnp.einsum("nd,wd->nw", rows, taken(pool), precision=HIGHEST)
        return out if shift is None else out + taken(shift)[:, 0][None]

    gate, up = project(pools.gate, pools.gate_bias), project(pools.up, pools.up_bias)
    hidden = jnp.where(channels < len(pools.gate), gated(pools.activation, gate, up), 0)
    one = jnp.broadcast_to(bias, (len(rows), 1))
    return jnp.concatenate([hidden, one], axis=1) * weight[:, None]


@jax.jit
def _gram(hidden: Array, inside: Array) -> Array:  # [W + 1, W + 1]
    return jnp.einsum("nk,nj->kj", hidden * inside[:, None], hidden, precision=HIGHEST)


@jax.jit
def _missing(hidden: Array, lacks: Array, inside: Array) -> tuple[Array, Array]:
    lacks = lacks * inside[:, None]
    return jnp.einsum("nk,nd->kd", hidden, lacks, precision=HIGHEST), jnp.sum(lacks**2)


@jax.jit
def _made(hidden: Array, weights: Array) -> Array:  # [n, D]
    return jnp.einsum("nk,kd->nd", hidden, weights, precision=HIGHEST)


@partial(jax.jit, donate_argnums=0)
def _less(residual: Array, tokens: Array, part: Array) -> Array:  # [N, D]
    return residual.at[tokens].add(-part, mode="drop")


def _padded(values: np.ndarray, size: int, fill) -> np.ndarray:
    return np.concatenate([values, np.full(size - len(values), fill, values.dtype)])


class LayerRepair:
    """The experts of one layer and the tokens that reach them.

    Args:
      dense, pruned: the layer before and after pruning.
      keep: bool [E, F].
      text: where the tokens go.

    Attributes:
      mendable: bool [E], experts that keep something that repair can change.
      starved: how many of them fewer tokens reach than they keep channels.
    """

    def __init__(self, dense: DecoderLayer, pruned: DecoderLayer, keep: np.ndarray, text: Routed):
        assert isinstance(dense.mlp, MoE) and isinstance(pruned.mlp, MoE)
        self._text, self._keep, self._pruned = text, keep, pruned
        self._pools = dense.mlp.experts.weights
        self._bias = dense.mlp.experts.b_down is not None
        self._gone = _gone_bias(dense.mlp.experts, pruned.mlp.experts)
        self._ridges: dict[int, HalvedRidge] = {}
        self.mendable = keep.any(axis=1) | self._bias
        tokens = np.array([len(mine) for mine in text.tokens])
        self.starved = int((self.mendable & (tokens < keep.sum(axis=1))).sum())

    def alone(self) -> Changes:
        """What brings each expert nearest to what it gave before, whatever the others do."""
        changes: Changes = {}
        for expert in self._experts():
            if self._keep[expert].all():
                continue
            gone = self._hidden(expert, ~self._keep[expert])
            rows = np.flatnonzero(~self._keep[expert]) + expert * self._keep.shape[1]
            weights = np.asarray(self._pools.down[rows], np.float32)
            lacks = _made(gone, self._wide(weights, self._gone[expert], gone.shape[1]))
            self._fit(expert, self._hidden(expert, self._keep[expert]), lacks, changes)
        return changes

    def together(self, residual: Array, changes: Changes) -> Changes:
        """What brings the layer nearest to a target, one expert after the other.

        Args:
          residual: float32 [N, D], what the layer as it was pruned lacks of it; used up.
          changes: where to begin.
        """
        changes = dict(changes)
        for expert, change in changes.items():
            hidden = self._hidden(expert, self._keep[expert])
            residual = _less(residual, self._rows(expert)[0], self._made(hidden, change))
        for expert in (expert for _ in range(PASSES) for expert in self._experts()):
            hidden, tokens = self._hidden(expert, self._keep[expert]), self._rows(expert)[0]
            lacks = residual.at[tokens].get(mode="fill", fill_value=0)
            before = changes.pop(expert, None)
            if before is not None:
                lacks = lacks + self._made(hidden, before)
            self._fit(expert, hidden, lacks, changes)
            after = changes.get(expert)
            moved = (0 if after is None else after) - (0 if before is None else before)
            if isinstance(moved, np.ndarray):
                residual = _less(residual, tokens, self._made(hidden, moved))
        return changes

    def repaired(self, changes: Changes) -> DecoderLayer:
        """The pruned layer with its down-projections, and biases, changed."""
        assert isinstance(self._pruned.mlp, MoE)
        experts = self._pruned.mlp.experts
        down, start = np.array(experts.w_down), np.asarray(experts.pool.offset)
        bias = None if experts.b_down is None else np.array(experts.b_down)
        for expert, change in changes.items():
            count = int(self._keep[expert].sum())
            rows = slice(start[expert], start[expert] + count)
            down[rows] = (down[rows].astype(np.float64) + change[:count]).astype(down.dtype)
            if self._bias and bias is not None:
                moved = bias[expert].astype(np.float64) + change[count]
                bias[expert] = moved.astype(bias.dtype)
        bias = None if bias is None else jnp.asarray(bias)
        experts = dataclasses.replace(experts, w_down=jnp.asarray(down), b_down=bias)
        return dataclasses.replace(
            self._pruned, mlp=dataclasses.replace(self._pruned.mlp, experts=experts)
        )

    def _experts(self) -> Iterator[int]:
        for expert in np.flatnonzero(self.mendable).tolist():
            if len(self._text.tokens[expert]):
                yield expert

    def _fit(self, expert: int, hidden: Array, lacks: Array, changes: Changes) -> None:
        """Put into `changes` what makes up for what an expert's tokens lack [n, D], if it helps."""
        count = int(self._keep[expert].sum())
        own = np.r_[np.arange(count), [hidden.shape[1] - 1] * self._bias].astype(int)
        first = np.append(self._text.first, False)[self._rows(expert)[0]]
        halves = [jnp.asarray(half, jnp.float32) for half in (first, ~first)]
        if expert not in self._ridges:
            grams = [np.asarray(_gram(hidden, half), np.float64) for half in halves]
            a, b = (gram[np.ix_(own, own)] for gram in grams)
            self._ridges[expert] = HalvedRidge((a, b), count)
        sums = [_missing(hidden, lacks, half) for half in halves]
        a, b = (Missing(np.asarray(cross, np.float64)[own], float(sq)) for cross, sq in sums)
        change, _ = self._ridges[expert].fit((a, b))
        if change is not None:
            changes[expert] = change

    def _rows(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """An expert's tokens and their weights; where there is none, one beyond the last."""
        tokens, weight = self._text.tokens[expert], self._text.weight[expert]
        size = max(LEAST_ROWS, 1 << (len(tokens) - 1).bit_length())
        return _padded(tokens, size, len(self._text.first)), _padded(weight, size, 0)

    def _hidden(self, expert: int, which: np.ndarray) -> Array:
        """Hidden rows of some of an expert's channels, filled up to quarters of its width."""
        step = -(-len(which) // 4)
        channels = (np.flatnonzero(which) + expert * len(which)).astype(np.int32)
        channels = _padded(channels, -(-len(channels) // step) * step, which.size * len(self._keep))
        bias = np.float32(self._bias)
        return _hidden(self._pools, self._text.x, *self._rows(expert), channels, bias)

    def _made(self, hidden: Array, change: np.ndarray) -> Array:
        count = len(change) - self._bias
        last = change[-1] if self._bias else np.zeros(change.shape[1])
        return _made(hidden, self._wide(change[:count], last, hidden.shape[1]))

    def _wide(self, weights: np.ndarray, last: np.ndarray, width: int) -> np.ndarray:
        """Weights [K, D] of channels and of the constant, as of padded hidden rows."""
        wide = np.zeros((width, weights.shape[1]), np.float32)
        wide[: len(weights)], wide[-1] = weights, last
        return wide


def _gone_bias(dense: Experts, pruned: Experts) -> np.ndarray:
    """What the outputs' biases have lost, float32 [E, D]; zero without biases."""
    if dense.b_down is None or pruned.b_down is None:
        return np.zeros((len(dense.count), dense.w_down.shape[1]), np.float32)
    return np.asarray(dense.b_down, np.float32) - np.asarray(pruned.b_down, np.float32)
