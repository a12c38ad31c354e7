"""The optimal brain surgeon: what an expert loses with each channel when the others make up for it.

Channels go one after the other, always the one that costs least once those that are left have
taken over what they can of it. The order is one for every width.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from moe_jax.experts.moe import MoE
from moe_jax.groups import each_group
from moe_jax.quant import dequantize
from moe_jax.spread import ALONE, Spread
from moe_jax.stream import LayerSource, sweep
from moe_jax.transformer import DecoderLayer
from pruning.scores.grams import GramRows, GramSums, Seen, hidden_squares
from pruning.scores.parts import Parts
from pruning.scores.sample import Sample
from pruning.scores.statistics import ChannelStatistics

PULL = 1e-2  # toward the weights as they are, of the mean diagonal of an expert's Gram
BLOCKS = 16  # so many at least of an expert's channels go at a time: one matrix product each


def elimination_costs(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    statistics: ChannelStatistics,
    *,
    batch: int = 8,
    dtype=jnp.float32,
    on_step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """What each channel costs its expert's output when its turn comes, see `eliminate`.

    One forward sweep; of a layer in groups each is read twice, for what they give together weighs
    what each does.

    Args:
      source: the dense model; one of its layers, or groups of one, is held.
      tokens: int32 [B, T], the text or a sample of it, see `pruning.scores.grams`.
      valid: bool [B, T].
      statistics: of the whole text.
      batch: windows per step.
      dtype: of the activations.
      on_step: receives (layers done, layers in all).

    Returns:
      float64 [L, E, F], squared output relative to the squared norm of the block's output, summed
      over the text; `energy` is the same without what others take over.
    """
    sample = Sample(source, tokens, valid, statistics, batch=batch, dtype=dtype)
    found: list[np.ndarray] = []

    def step(index: int, layer: DecoderLayer, sample: Sample) -> Sample:
        seen = sample.through(index, layer)
        if seen is not None:
            found.append(layer_costs(layer, seen))
        return sample

    def in_groups(index: int, sample: Sample) -> Sample:
        seen, costs = sample.in_groups(source, index), []
        for group in each_group(source, index):
            costs.append(layer_costs(group, seen.of(group)))
            del group  # before the next one is read
        found.append(np.concatenate(costs))
        return sample

    def visited(index: int) -> None:
        if on_step:
            on_step(index + 1, len(source))

    sweep(source, sample, step, on_layer=visited, in_groups=in_groups)
    return np.stack(found)


class SampledCosts:
    """What the channels of a layer, or of a group of one, cost by the sample of a text in parts.

    Args:
      layer: with dense experts.
      text: what goes through it.
      spread: devices and processes that share the text.
    """

    def __init__(self, layer: DecoderLayer, text: Parts, spread: Spread):
        self._layer, self._text, self._spread = layer, text, spread
        self._grams = GramSums(layer)

    def add(self, rows: slice, seen: GramRows | None) -> None:
        """Add what was seen of the windows of a step, a batch of each device."""
        lengths = self._text.sampled[rows]
        if lengths.any():
            each = self._spread.apart(seen), np.split(lengths, self._spread.devices)
            for batch, own in zip(*each, strict=True):
                self._grams.add(batch, own, self._text.batches.tokens.shape[1])

    def found(self, energy: np.ndarray, down_norm: np.ndarray) -> np.ndarray:
        """What each channel costs, float64 [1, E, F].

        Args:
          energy: [parts, E, F], as of statistics, of all processes.
          down_norm: [E, F], as of statistics.
        """
        seen = self._grams.seen(hidden_squares(energy.sum(axis=0), down_norm), self._spread)
        return layer_costs(self._layer, seen, self._spread)[None]


def layer_costs(layer: DecoderLayer, seen: Seen, spread: Spread = ALONE) -> np.ndarray:
    """What the channels of a layer, or of a group of one, cost; see `eliminate`.

    Args:
      layer: with dense experts.
      seen: of these.
      spread: processes, all of which have the same and share the work out.

    Returns:
      float64 [E, F].
    """
    assert isinstance(layer.mlp, MoE)
    down, costs = np.asarray(dequantize(layer.mlp.experts.w_down)), np.zeros(seen.squares.shape)
    down = down.reshape(*costs.shape, -1)
    for expert in spread.in_a_row(len(costs)):
        costs[expert] = eliminate(seen.gram(expert), down[expert].astype(float))
    return spread.total({"costs": costs})["costs"]


def eliminate(gram: np.ndarray, down: np.ndarray, most: int | None = None) -> np.ndarray:
    """Remove all channels of an expert, always those that cost least.

    With H the Gram and a pull, W what is left of the down-projection after those that are left have
    taken over the rest: channel j costs |W_j|^2 / (H^-1)_jj.

    Args:
      gram: float64 [F, F], sum of h h^T.
      down: float64 [F, D], a row per channel.
      most: channels that are chosen at a time, whose order is by what they cost before any of them
        is gone; default a sixteenth of F.

    Returns:
      float64 [F], what each channel adds to the squared error of the output, pull included. It
      never falls along the order, so that the cheapest channels are those that go first: where a
      later one costs less, it is raised to the one before. All 0 if no token came.
    """
    size = len(gram)
    most, mean = most or max(1, size // BLOCKS), np.diagonal(gram).mean()
    if not mean > 0:
        return np.zeros(size)
    inverse, square = np.linalg.inv(gram + PULL * mean * np.eye(size)), down @ down.T
    left, cost, order = np.ones(size, bool), np.zeros(size), []
    while left.any():
        diagonal = np.where(left, np.diagonal(inverse), 1.0)
        price = np.where(left, np.diagonal(square) / diagonal, np.inf)
        gone = np.argsort(price, kind="stable")[: min(most, left.sum())]
        cost[gone] = _in_turn(inverse[np.ix_(gone, gone)], square[np.ix_(gone, gone)])
        order.extend(gone)
        left[gone] = False
        taken = np.linalg.solve(inverse[np.ix_(gone, gone)], inverse[gone]).T  # [F, b]
        inverse -= taken @ inverse[gone]
        moved = taken @ square[gone]
        square += taken @ square[np.ix_(gone, gone)] @ taken.T - moved - moved.T
    raised = np.maximum.accumulate(np.maximum(cost[order], 0.0))
    # Later ones above those of the same cost: equal scores would be cut in another order.
    cost[order] = raised * (1 + 1e-12 * np.arange(size))
    return cost


def _in_turn(inverse: np.ndarray, square: np.ndarray) -> np.ndarray:  # [b]
    """What each of some channels costs when they go one after the other."""
    inverse, square, cost = inverse.copy(), square.copy(), np.zeros(len(inverse))
    for j in range(len(inverse)):
        cost[j] = square[j, j] / inverse[j, j]
        taken, row = inverse[:, j] / inverse[j, j], square[j].copy()
        inverse -= np.outer(taken, inverse[j])
        square += (
            square[j, j] * np.outer(taken, taken) - np.outer(taken, row) - np.outer(row, taken)
        )
    return cost
