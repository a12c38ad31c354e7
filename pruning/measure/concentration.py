"""How unevenly channels share a score, as numbers."""

import numpy as np

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
