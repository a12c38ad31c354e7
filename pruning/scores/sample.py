"""A sample of a text on its way through the dense model, and the Grams that each layer shows."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
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
from pruning.scores.expert_sums import observe_experts, observed_group
from pruning.scores.grams import GramRows, GramSums, Seen, gram_rows, hidden_squares
from pruning.scores.layer import token_weights
from pruning.scores.statistics import ChannelStatistics


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
        self._squares = hidden_squares(statistics.energy, statistics.down_norm)
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
        sums = GramSums(layer)

        def run(x: Array, place: Context, rows: slice) -> Array:
            out, found = _observed(layer, layer_attend(layer, x, place), place)
            sums.add(found, *_whole(place))
            return out

        self._text.each(self._x, run)
        return sums.seen(self._squares[self._layers.index(index)])


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
            sums = GramSums(group)
            for number, place in enumerate(self._text.places):
                behind = jnp.asarray(self._behind[number])
                halfway = taken(self._between, number, behind.dtype)
                sums.add(_observed_group(group, halfway, place, behind), *_whole(place))
            self._last = own, sums.seen(self._squares[own])
        return self._last[1]


def _whole(place: Context) -> tuple[np.ndarray, int]:
    """Of a batch that is all of a sample, what `GramSums.add` is told."""
    windows, length = place.valid.shape
    return np.full(windows, length, np.int32), length


@jax.jit
def _observed(layer: DecoderLayer, middle: Array, context: Context) -> tuple[Array, GramRows]:
    """The second half of a layer, and what its batch adds to Grams."""
    out, trace = layer.feed_forward(middle, context, observe_experts)
    assert trace is not None
    return out, _rows(trace, out)


@jax.jit
def _observed_group(
    group: DecoderLayer, halfway: Halfway, context: Context, behind: Array
) -> GramRows:
    """What a batch that stands `behind` the layer adds to the Grams of a group."""
    return _rows(group_trace(group, halfway, context, observe_experts), behind)


def _rows(trace: MoETrace, out: Array) -> GramRows:
    return gram_rows(trace, token_weights(out.reshape(-1, out.shape[-1]), trace.valid))
