"""How the channels of an expert go together: Grams of its hidden rows, on a sample of the text.

What single channels do, the sweep over the whole text knows: its sums stand on the diagonal, and a
sample says how far two channels are alike. So little text is enough.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import gather_rows
from moe_jax.experts.grouped_matmul import add_slice, dot, walk_tiles
from moe_jax.experts.moe import MoE, MoETrace
from moe_jax.groups import (
    Between,
    Halfway,
    group_trace,
    in_memory,
    layer_begin_apart,
    own_experts,
    taken,
    through_groups,
)
from moe_jax.stream import Batches, LayerSource, in_batches, layer_attend, layer_forward
from moe_jax.transformer import DecoderLayer
from pruning.scores.expert_sums import observe_experts
from pruning.scores.grouped import observed_group
from pruning.scores.layer import EPS
from pruning.scores.statistics import ChannelStatistics

PIECE = 256  # tokens of a longer window: more texts say more than longer ones
COLUMNS = (((0,), (0,)), ((), ()))  # x.T @ x


def sample_size(windows: int, length: int, share: float) -> tuple[int, int]:
    """How many of so many windows of a length in tokens are a sample, and how many tokens of each.

    Args:
      windows: at least 1.
      length: of each.
      share: of the tokens, about.
    """
    size = min(length, PIECE)
    return max(1, round(windows * min(1.0, share * length / size))), size


def sampled(
    tokens: np.ndarray, valid: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:  # [N, S] each
    """The beginnings of some windows [B, T], evenly spread over a text: a share of its tokens."""
    count, size = sample_size(len(tokens), tokens.shape[1], share)
    rows = np.arange(count) * len(tokens) // count
    return tokens[rows, :size], valid[rows, :size]


@dataclass(frozen=True)
class Seen:
    """What a sample shows of a layer's experts.

    Attributes:
      grams: float32 [E, F, F], sums over the sample's tokens of h h^T, with h an expert's hidden
        row times the routing weight and relative to the norm of the block's output.
      squares: float64 [E, F], the sums of h^2 over the whole text.
      tokens: int [E], of the sample.
    """

    grams: np.ndarray
    squares: np.ndarray
    tokens: np.ndarray

    def gram(self, expert: int) -> np.ndarray:
        """Of one expert as of the whole text, float64 [F, F]: the squares on its diagonal, and all
        else as much larger. A channel that the sample has not seen is like no other."""
        found, squares = self.grams[expert].astype(np.float64), self.squares[expert]
        own = np.diagonal(found)
        factor = np.sqrt(np.divide(squares, own, out=np.zeros_like(own), where=own > 0))
        found *= factor[:, None] * factor
        np.fill_diagonal(found, squares)
        return found


class Sample:
    """A text, as a rule a sample of a longer one, on its way through a model, layer by layer."""

    def __init__(
        self,
        source: LayerSource,
        tokens: np.ndarray,
        valid: np.ndarray,
        statistics: ChannelStatistics,
        *,
        batch: int,
        dtype,
    ) -> None:
        """Begin below the first layer.

        Args:
          source: the dense model.
          tokens: int32 [B, T].
          valid: bool [B, T].
          statistics: of the longer text, for what each channel does by itself.
          batch: windows per step, at most.
          dtype: of the activations.
        """
        self._text = in_batches(source, tokens, valid, batch)
        self._x = self._text.embedded(source, dtype)
        norms = np.square(statistics.down_norm)
        self._squares = np.divide(
            statistics.energy, norms, out=np.zeros_like(norms), where=norms > 0
        )
        self._layers = source.config.moe_layers

    def in_groups(self, source: LayerSource, index: int) -> "SeenInGroups":
        """Take the sample through a layer in groups, all of which are read for it.

        Returns:
          What says of each group, read once more, what the sample shows of its experts.
        """
        between = in_memory(self._text)
        step = lambda group: lambda x, place, rows: observed_group(group, x, place)  # noqa: E731
        through_groups(
            source, index, [(self._text, self._x, step)], lambda _: between, layer_begin_apart
        )
        squares = self._squares[self._layers.index(index)]
        return SeenInGroups(self._text, between, self._x, squares)

    def through(self, index: int, layer: DecoderLayer) -> Seen | None:
        """Take the sample through a layer.

        Returns:
          What it shows of the experts; None of a layer without any.
        """
        if not isinstance(layer.mlp, MoE):
            self._text.each(self._x, lambda x, place, rows: layer_forward(layer, x, place))
            return None
        sums = _no_sums(layer)

        def run(x: Array, place: Context, rows: slice) -> Array:
            nonlocal sums
            out, sums = _observed(layer, layer_attend(layer, x, place), place, sums)
            return out

        self._text.each(self._x, run)
        grams, tokens = (np.asarray(one) for one in sums)
        return Seen(grams, self._squares[self._layers.index(index)], tokens)


class SeenInGroups:
    """What a sample shows of the experts of a layer, by groups of these.

    Args:
      text: the sample.
      between: its batches, where all groups have added their experts.
      behind: per batch [b, T, D], what stands behind the layer.
      squares: of the layer, as of `Seen`.
    """

    def __init__(
        self, text: Batches, between: Between, behind: list[np.ndarray], squares: np.ndarray
    ):
        self._text, self._between, self._behind, self._squares = text, between, behind, squares
        self._last: tuple[slice, Seen] | None = None

    def of(self, group: DecoderLayer) -> Seen:
        """Of a group; while the same is asked for, it is reckoned once."""
        own = own_experts(group)
        if self._last is None or self._last[0] != own:
            self._last = None  # before there is another
            sums = _no_sums(group)
            for number, place in enumerate(self._text.places):
                behind = jnp.asarray(self._behind[number])
                halfway = taken(self._between, number, behind.dtype)
                sums = _observed_group(group, halfway, place, behind, sums)
            grams, tokens = (np.asarray(one) for one in sums)
            self._last = own, Seen(grams, self._squares[own], tokens)
        return self._last[1]


Sums = tuple[Array, Array]  # Grams [E, F, F], and tokens [E]


def _no_sums(layer: DecoderLayer) -> Sums:
    assert isinstance(layer.mlp, MoE)
    experts, width = len(layer.mlp.experts.count), layer.mlp.config.d_expert
    return jnp.zeros((experts, width, width)), jnp.zeros(experts, jnp.int32)


@partial(jax.jit, donate_argnums=3)
def _observed(
    layer: DecoderLayer, middle: Array, context: Context, sums: Sums
) -> tuple[Array, Sums]:
    """The second half of a layer, and the sums with those of its batch."""
    out, trace = layer.feed_forward(middle, context, observe_experts)
    assert trace is not None
    return out, _added(layer, trace, out, sums)


@partial(jax.jit, donate_argnums=4)
def _observed_group(
    group: DecoderLayer, halfway: Halfway, context: Context, behind: Array, sums: Sums
) -> Sums:
    """The sums of a group with those of a batch that stands `behind` the layer."""
    return _added(group, group_trace(group, halfway, context, observe_experts), behind, sums)


def _added(layer: DecoderLayer, trace: MoETrace, out: Array, sums: Sums) -> Sums:
    assert isinstance(layer.mlp, MoE)
    d, hidden = trace.dispatch, trace.kept.hidden
    norm = jnp.sum(jnp.square(out.reshape(-1, out.shape[-1]).astype(jnp.float32)), axis=-1)
    weight = trace.row_weight * gather_rows(jax.lax.rsqrt(norm + EPS), d, d.copies)

    def step(grams: Array, row: Array, expert: Array, start: int) -> Array:
        del start
        h = jax.lax.dynamic_slice_in_dim(hidden, row, d.tile).astype(jnp.float32)
        h *= jax.lax.dynamic_slice_in_dim(weight, row, d.tile)[:, None]
        return add_slice(grams, dot(h, h, COLUMNS)[None], (expert, 0, 0))

    grams = walk_tiles(d, layer.mlp.experts.pool, step, sums[0])
    return grams, sums[1] + d.tokens
