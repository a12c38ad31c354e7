"""How unevenly channels share a score, as numbers, and what these foretell."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pruning.measure.agreement import pearson, spearman

MOST = 0.9  # of the score that `fraction_holding` asks about


def gini(scores: np.ndarray) -> np.ndarray:
    """The Gini coefficient, twice the area between the diagonal and the curve of summed scores.

    Args:
      scores: [..., N], non-negative, N at least 1.

    Returns:
      float64 [...] in [0, 1): 0 where all are equal or none has any, near 1 where one has all.
    """
    rising = np.sort(np.asarray(scores, np.float64), axis=-1)
    count, total = rising.shape[-1], rising.sum(axis=-1)
    ranked = rising @ np.arange(1, count + 1)
    known = np.where(total > 0, total, 1.0)
    return np.where(total > 0, 2 * ranked / (count * known) - (count + 1) / count, 0.0)


def fraction_holding(scores: np.ndarray, share: float = MOST) -> np.ndarray:
    """The least fraction of the channels that holds a share of the score.

    Args:
      scores: [..., N], non-negative, N at least 1.
      share: in (0, 1].

    Returns:
      float64 [...] in (0, 1]; where no channel has any score, the share itself, in whole channels.
    """
    falling = -np.sort(-np.asarray(scores, np.float64), axis=-1)
    falling = np.where(falling.sum(axis=-1, keepdims=True) > 0, falling, 1.0)
    held = np.cumsum(falling, axis=-1)
    short = held < share * held[..., -1:] * (1 - 1e-12)  # sums differ in their last bits
    return (short.sum(axis=-1) + 1) / falling.shape[-1]


def concentration_report(
    channel: np.ndarray, keep: np.ndarray, increase: np.ndarray, layers: Sequence[int]
) -> dict[str, Any]:
    """How far the concentration of a layer's score foretells the loss of pruning it alone.

    Args:
      channel: [L, E, F] scores; a layer's are taken together, whichever expert has them.
      keep: bool [L, E, F], what stayed of each layer when it was pruned.
      increase: [L], loss added by that, nats per predicted token.
      layers: the model's number of each layer.

    Returns:
      JSON-compatible: `rows`, one a layer with its Gini coefficient `gini`, the fraction of the
      channels `fraction_holding` nine tenths of its score, the share `score_removed` of the score
      and the loss increase `masked`; and `correlations` of each of the three with the last, by
      rank (`spearman`) and in proportion (`pearson`), None where one side does not vary.
    """
    flat, gone = channel.reshape(len(channel), -1), ~keep.reshape(len(channel), -1)
    total = flat.sum(axis=1)
    removed = np.where(gone, flat, 0.0).sum(axis=1) / np.where(total > 0, total, 1.0)
    values = {"gini": gini(flat), "fraction_holding": fraction_holding(flat)}
    values["score_removed"] = removed
    rows = [
        {"layer": int(layer), **{name: float(value[slot]) for name, value in values.items()},
         "masked": float(increase[slot])}
        for slot, layer in enumerate(layers)
    ]  # fmt: skip
    correlations = {
        name: {"spearman": spearman(value, increase), "pearson": pearson(value, increase)}
        for name, value in values.items()
    }
    return {"rows": rows, "correlations": correlations}
