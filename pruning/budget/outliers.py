"""Super-channels: channels whose score, or energy, is out of proportion in their layer.

They are kept in any case.
"""

import dataclasses

import numpy as np

from pruning.budget.problem import Allocation, Problem

# Both must hold. The median says what is usual; the share says that the layer hangs on it.
TIMES_MEDIAN, SHARE = 1000.0, 0.01


def super_channels(channel: np.ndarray) -> np.ndarray:  # [L, E, F] -> bool [L, E, F]
    """Channels above 1000 times the median positive score of their layer with 1 % of its total.

    A hundred channels of a layer at most can qualify.

    Args:
      channel: non-negative scores.

    Returns:
      Which channels are super-channels.
    """
    found = np.zeros(channel.shape, bool)
    for layer, scores in enumerate(channel):
        positive = scores[scores > 0.0]
        if positive.size:
            usual, total = np.median(positive), positive.sum()
            found[layer] = (scores > TIMES_MEDIAN * usual) & (scores >= SHARE * total)
    return found


def reserve(
    reserved: np.ndarray,  # [L, E]
    outliers: np.ndarray,  # [L, E, F]
    room: int,
) -> np.ndarray:  # [L, E]
    """Reserve the experts that hold super-channels too, as far as the budget has room for them."""
    wanted = np.flatnonzero(outliers.any(axis=2) & ~reserved)[: max(room, 0)]
    reserved = reserved.copy()
    reserved.flat[wanted] = True
    return reserved


def with_super_channels(problem: Problem, widths: Allocation, outliers: np.ndarray) -> Allocation:
    """Widen experts that are too narrow for their super-channels, at the widest experts' cost.

    Blocks move inside the layer, so that budgets of layers hold. An expert's super-channels are
    ranked first, hence kept once it is wide enough.

    Args:
      problem: what was planned.
      widths: the plan's.
      outliers: bool [L, E, F].

    Returns:
      Allocation of the same sum; unchanged where no layer has a block to spare.
    """
    block = problem.block
    wanted = -(-outliers.sum(axis=2) // block) * block  # [L, E]
    wanted = np.minimum(wanted, problem.most - problem.most % block)
    counts = widths.counts.copy()
    for layer, expert in np.argwhere((wanted > counts) & (counts > 0)):
        kept = counts[layer]
        while kept[expert] < wanted[layer, expert]:
            # Nobody goes below its own need or the least width.
            spare = kept - np.maximum(wanted[layer], problem.least)
            spare[expert] = 0
            giver = int(np.argmax(spare))
            if spare[giver] < block:
                break
            kept[giver] -= block
            kept[expert] += block
    return dataclasses.replace(widths, counts=counts)
