"""Widths and bits of all layers at once: the least sum of errors within so many bytes.

What a layer does to the model's predictions is taken for its own: errors of layers add up, and in a
layer that of removed channels and that of fewer bits. Near the dense model, where divergences are
quadratic and of no common direction, they do; far from it their sum falls short.
"""

from collections.abc import Sequence

import numpy as np

from pruning.kit.errors import BudgetError

GRID = 1 << 14  # steps of the table into which a budget is divided
LEAST_ERROR = 1e-9  # nats per token, below what float32 tells


def cheapest(
    cost: Sequence[np.ndarray], error: Sequence[np.ndarray], budget: int, grid: int = GRID
) -> list[int]:
    """One option of each layer, so that errors add up to the least within a budget.

    By a table over the budget, exact if that has no more than `grid` units; else costs are rounded
    up to a grid-th of it, so that what is chosen never exceeds it.

    Args:
      cost: for each layer whole numbers [O], of each of its options.
      error: for each layer [O].
      budget: that the costs may add up to.
      grid: steps of the table.

    Returns:
      The option of each layer.

    Raises:
      BudgetError: the cheapest options cost more.
    """
    unit = max(1, -(-budget // grid))
    room = budget // unit
    best = np.zeros(room + 1)  # least error of the layers so far within so many units
    taken: list[np.ndarray] = []
    steps = [-(-np.asarray(one) // unit) for one in cost]
    for own, errors in zip(steps, error, strict=True):
        found, choice = np.full(room + 1, np.inf), np.zeros(room + 1, np.int32)
        for option in _undominated(own, errors):
            at = int(own[option])
            if at > room:
                continue
            sums = best[: room + 1 - at] + errors[option]
            better = sums < found[at:]
            found[at:][better], choice[at:][better] = sums[better], option
        best = found
        taken.append(choice)
    if not np.isfinite(best[room]):
        raise BudgetError(
            f"even the smallest choice for every layer takes more than the {budget} bytes left"
        )
    options, left = [], room
    for own, choice in zip(reversed(steps), reversed(taken), strict=True):
        options.append(int(choice[left]))
        left -= int(own[options[-1]])
    return options[::-1]


def _undominated(cost: np.ndarray, error: np.ndarray) -> list[int]:
    """Options than which none costs no more and errs no more, cheapest first."""
    found: list[int] = []
    for option in np.lexsort((np.arange(len(cost)), error, cost)).tolist():
        if not found or error[option] < error[found[-1]]:
            found.append(option)
    return found


def error_between(kept: np.ndarray, points: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """What a layer errs when it keeps some number of channels, between numbers that were measured.

    Over the number of channels it is a line on a logarithmic scale, for errors grow so; from the
    most of them to the whole layer, which errs by nothing, a parabola. Fewer channels never err
    less.

    Args:
      kept: [N], channels kept.
      points: [P] channels that were kept when it was measured, all channels among them.
      errors: [P] of these, of all channels 0.

    Returns:
      float64 [N]; infinite where fewer are kept than ever were measured.
    """
    order = np.argsort(-points, kind="stable")
    rising = np.maximum(np.maximum.accumulate(errors[order]), LEAST_ERROR)
    inner = points[order] < points.max()
    measured, log_error = points[order][inner][::-1], np.log(rising[inner][::-1])  # ascending
    found = np.full(np.shape(kept), np.inf)
    if len(measured):
        lines = np.exp(np.interp(kept, measured, log_error))
        share = (points.max() - kept) / (points.max() - measured[-1])
        near = np.exp(log_error[-1]) * np.square(share)
        found = np.where(kept >= measured[-1], near, lines)
        found[kept < measured[0]] = np.inf
    found[kept == points.max()] = 0.0
    return found
