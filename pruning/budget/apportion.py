"""Splitting a whole number of channels by shares, between bounds and without a remainder."""

import numpy as np

from moe_jax.errors import InputError
from pruning.kit.errors import BudgetError


def apportion(
    shares: np.ndarray,  # [G]
    total: int,
    low: np.ndarray | int = 0,  # [G]
    high: np.ndarray | int | None = None,  # [G]
) -> np.ndarray:  # [G]
    """Give each group its share of a total, in whole units and inside its bounds.

    Groups whose share is out of bounds take the bound, the others share the rest in proportion;
    fractions are settled by the largest remainder, ties to the lower index.

    Args:
      shares: non-negative; if all are 0 they count as equal.
      total: units to give.
      low: least of each group.
      high: most of each group; default the total.

    Returns:
      int64, summing to `total` exactly.

    Raises:
      InputError: a share is negative or not finite, or the bounds leave no room for the total.
    """
    shares = np.asarray(shares, np.float64)
    if not (np.isfinite(shares) & (shares >= 0.0)).all():
        raise InputError(f"shares={shares.tolist()} must be non-negative and finite")
    low = np.broadcast_to(np.asarray(low, np.int64), shares.shape)
    high = np.broadcast_to(np.asarray(total if high is None else high, np.int64), shares.shape)
    if not low.sum() <= total <= high.sum() or (low > high).any():
        raise BudgetError(
            f"{total} cannot be split: the groups take at least {low.sum()} and at most "
            f"{high.sum()}; change the prune rate or the minimum"
        )
    shares = shares / shares.max() if shares.any() else np.ones_like(shares)
    # A group of share 0 gets more than its least only once all others are full.
    shares = np.maximum(shares, 1e-12)
    exact = np.clip(_scale(shares, total, low, high) * shares, low, high)
    whole = np.floor(exact + 1e-9).astype(np.int64)
    left = int(total - whole.sum())
    step = 1 if left >= 0 else -1
    # Rounding leaves at most one unit per group, whose bound may be closed.
    while left:
        open_ = whole < high if step > 0 else whole > low
        order = np.argsort(np.where(open_, -step * (exact - whole), np.inf), kind="stable")
        chosen = order[: min(abs(left), int(open_.sum()))]
        whole[chosen] += step
        left -= step * chosen.size
    return whole


def _scale(shares: np.ndarray, total: int, low: np.ndarray, high: np.ndarray) -> float:
    # The sum of the clipped shares grows piecewise linearly with the scale, with corners where a
    # group meets a bound: find the piece that holds the total, and interpolate.
    corners = np.unique(np.concatenate([low / shares, high / shares]))
    first, last = 0, corners.size - 1

    def filled(scale: float) -> float:
        return float(np.clip(scale * shares, low, high).sum())

    while last - first > 1:
        middle = (first + last) // 2
        first, last = (middle, last) if filled(corners[middle]) <= total else (first, middle)
    start, end = filled(corners[first]), filled(corners[last])
    part = 0.0 if end == start else (total - start) / (end - start)
    return float(corners[first] + min(max(part, 0.0), 1.0) * (corners[last] - corners[first]))
