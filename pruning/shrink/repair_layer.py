"""Repair of one decoder layer, or of a group of its experts, from the inputs that its experts see
behind the repaired layers."""

import dataclasses
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.groups import own_experts
from moe_jax.spread import ALONE, Spread
from moe_jax.transformer import DecoderLayer
from pruning.scores.routed import HIGHEST, Part, Routed, grams
from pruning.shrink.repair import HalvedRidge, Missing

PASSES = 3  # over the experts of a layer, each time for what the others leave
Changes = dict[int, np.ndarray]  # by expert, float32 [K, D], of a bias in the last row


@jax.jit
def _missing(part: Part, residual: Array, own: Array) -> tuple[Array, Array]:
    """Of each half, the sums of h y^T [2, W + 1, D] and of |y|^2 [2], where y is what the residual
    [N, D] would be without the expert's `own` weights [W + 1, D]."""

    def step(token: Array, hidden: Array, sums: tuple[Array, Array]) -> tuple[Array, Array]:
        lacks = residual.at[token].get(mode="fill", fill_value=0) + _made(hidden, own)
        cross = jnp.einsum("nk,nd->kd", hidden, lacks, precision=HIGHEST)
        return sums[0] + cross, sums[1] + jnp.sum(lacks**2)

    a, b = part.halves(step, (jnp.zeros(own.shape), jnp.zeros(())))
    return jnp.stack([a[0], b[0]]), jnp.stack([a[1], b[1]])


@partial(jax.jit, donate_argnums=1)
def _less(part: Part, residual: Array, own: Array) -> Array:  # [N, D]
    """What is left of a residual when an expert's weights are changed by `own` [W + 1, D]."""

    def step(token: Array, hidden: Array, residual: Array) -> Array:
        return residual.at[token].add(-_made(hidden, own), mode="drop")

    edges = jnp.asarray(part.edges)
    return part.walk(edges[0], edges[2], step, residual)


def _made(hidden: Array, weights: Array) -> Array:  # [R, D]
    return jnp.einsum("nk,kd->nd", hidden, weights, precision=HIGHEST)


class Ridges:
    """What was found of the Grams of a layer's experts; what has no room is found again if it is
    wanted.

    Args:
      room: bytes.
    """

    def __init__(self, room: int):
        self._left = room
        self._kept: dict[int, HalvedRidge] = {}

    def get(self, expert: int) -> HalvedRidge | None:
        """Of an expert of the layer, if it is kept."""
        return self._kept.get(expert)

    def keep(self, expert: int, ridge: HalvedRidge) -> None:
        """Keep it if there is room."""
        if ridge.nbytes <= self._left:
            self._left -= ridge.nbytes
            self._kept[expert] = ridge


def reached(text: Routed, spread: Spread = ALONE) -> np.ndarray:
    """Tokens at each expert of a layer, of all processes, float64 [E]."""
    own = (text.edges[:, 2] - text.edges[:, 0]).astype(np.float64)
    return spread.total({"tokens": own})["tokens"]


class LayerRepair:
    """Experts of one layer, all or a group of them, and the tokens that reach them.

    Args:
      dense, pruned: the layer, or the group, before and after pruning.
      keep: bool [E, F], of these experts.
      text: where the tokens of this process go, to these experts.
      tokens: float64 [E], as of `reached`.
      ridges: of the layer.
      spread: the processes that share the text; all call alike, and have the same changes.

    Attributes:
      mendable: bool [E], experts that keep something that repair can change.
      starved: how many of them fewer tokens reach than they keep channels.
    """

    def __init__(
        self,
        dense: DecoderLayer,
        pruned: DecoderLayer,
        keep: np.ndarray,
        text: Routed,
        tokens: np.ndarray,
        ridges: Ridges,
        spread: Spread = ALONE,
    ):
        assert isinstance(dense.mlp, MoE) and isinstance(pruned.mlp, MoE)
        self._text, self._keep, self._pruned, self._spread = text, keep, pruned, spread
        self._pools = dense.mlp.experts.weights
        self._bias = dense.mlp.experts.b_down is not None
        self._gone = _gone_bias(dense.mlp.experts, pruned.mlp.experts)
        self._ridges, self._first = ridges, own_experts(dense).start
        self.mendable = keep.any(axis=1) | self._bias
        self._reached = tokens
        self.starved = int((self.mendable & (tokens < keep.sum(axis=1))).sum())

    def alone(self) -> Changes:
        """What brings each expert nearest to what it gave before, whatever the others do."""
        changes: Changes = {}
        down = np.asarray(self._pools.down).reshape(*self._keep.shape, -1)
        for expert in self._experts():
            keep = self._keep[expert]
            if keep.all():
                continue
            sums = self._grams(expert)
            own, gone = self._places(expert), np.append(np.flatnonzero(~keep), -1)
            lost = np.append(down[expert][~keep], self._gone[expert][None], axis=0)
            lost = lost.astype(np.float64)
            a, b = (
                Missing(
                    gram[np.ix_(own, gone)] @ lost,
                    float((lost * (gram[np.ix_(gone, gone)] @ lost)).sum()),
                )
                for gram in sums
            )
            self._fit(expert, sums, (a, b), changes)
        return changes

    def together(self, residual: Array, changes: Changes) -> Array:
        """What brings the layer nearer to a target, one of these experts after the other, once.

        Args:
          residual: float32 [N, D], what the layer lacks of it with `changes`, at the tokens of this
            process; used up.
          changes: of these experts; replaced by the new ones.

        Returns:
          The residual with the new changes.
        """
        for expert in self._experts():
            part, before = self._part(expert, self._keep[expert]), changes.pop(expert, None)
            cross, square = _missing(part, residual, self._wide(part, before))
            own = np.r_[: int(self._keep[expert].sum()), [-1] * self._bias].astype(int)
            sums = self._spread.total(
                {"cross": np.asarray(cross, np.float64), "square": np.asarray(square, np.float64)}
            )
            a, b = (
                Missing(sums["cross"][half][own], float(sums["square"][half])) for half in (0, 1)
            )
            self._fit(expert, None, (a, b), changes)
            after = changes.get(expert)
            if after is not before:
                moved = self._wide(part, after) - self._wide(part, before)
                residual = _less(part, residual, moved)
        return residual

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
        yield from np.flatnonzero(self.mendable & (self._reached > 0)).tolist()

    def _grams(self, expert: int) -> np.ndarray:  # float64 [2, W + 1, W + 1]
        """Of all channels of an expert, in each half of the text."""
        every = np.ones(self._keep.shape[1], bool)
        own = np.asarray(grams(self._part(expert, every)), np.float64)
        return self._spread.total({"gram": own})["gram"]

    def _fit(
        self,
        expert: int,
        sums: np.ndarray | None,
        missing: tuple[Missing, Missing],
        changes: Changes,
    ) -> None:
        """Put into `changes` what makes up for what an expert's tokens lack, if it helps."""
        ridge = self._ridges.get(self._first + expert)
        if ridge is None:
            sums = self._grams(expert) if sums is None else sums
            own = self._places(expert)
            a, b = (gram[np.ix_(own, own)] for gram in sums)
            ridge = HalvedRidge((a, b), int(self._keep[expert].sum()))
            self._ridges.keep(self._first + expert, ridge)
        change, _ = ridge.fit(missing)
        if change is not None:
            changes[expert] = change.astype(np.float32)

    def _places(self, expert: int) -> np.ndarray:
        """Where in the Gram of all channels those stand that are kept, and the bias."""
        return np.r_[np.flatnonzero(self._keep[expert]), [-1] * self._bias].astype(int)

    def _part(self, expert: int, which: np.ndarray) -> Part:
        """Some of an expert's channels, filled up to halves of its width: few programs."""
        step = -(-len(which) // 2)
        channels = (np.flatnonzero(which) + expert * len(which)).astype(np.int32)
        missing = -len(channels) % step
        channels = np.pad(channels, (0, missing), constant_values=self._keep.size)
        text = self._text
        return Part(
            self._pools, text.x, text.token, text.weight, text.edges[expert], channels,
            np.float32(self._bias),
        )  # fmt: skip

    def _wide(self, part: Part, change: np.ndarray | None) -> np.ndarray:  # float32 [W + 1, D]
        """A change of the kept channels, and of the bias, as of the part's hidden rows."""
        wide = np.zeros((len(part.channels) + 1, self._text.x.shape[1]), np.float32)
        if change is not None:
            count = len(change) - self._bias
            wide[:count], wide[-1] = change[:count], change[-1] if self._bias else 0
        return wide


def _gone_bias(dense: Experts, pruned: Experts) -> np.ndarray:
    """What the outputs' biases have lost, float32 [E, D]; zero without biases."""
    if dense.b_down is None or pruned.b_down is None:
        return np.zeros((len(dense.count), dense.w_down.shape[1]), np.float32)
    return np.asarray(dense.b_down, np.float32) - np.asarray(pruned.b_down, np.float32)
