"""The best aligned widths: what the redistribution rule of the paper is measured against.

An expert keeps nothing, or `least` blocks, or any number of blocks above that. Choosing the widths
that maximise a sum of concave utilities is a knapsack whose first item per expert is bigger than
the others. `by_hull` takes items by density and is exact where `least` is one block; `by_table`
is exact always, at the cost of a table of budget times widths per expert.

Source: design method 2(e).
"""

from collections.abc import Callable

import numpy as np

from pruning.budget.apportion import apportion
from pruning.budget.objectives import utility
from pruning.budget.planners import select
from pruning.kit.errors import BudgetError

# (values [G, K+1], blocks to spend, least blocks of a kept group, reserved [G], most [G])
# -> blocks per group [G].
Solver = Callable[[np.ndarray, int, int, np.ndarray, np.ndarray], np.ndarray]

# Above this many table entries (a few seconds) the exact optimum is estimated by the hull.
TABLE_LIMIT = 50_000_000


def coverage_by_blocks(scores: np.ndarray, block: int) -> np.ndarray:  # [L, E, F] -> [L, E, K+1]
    """Coverage of each expert when it keeps its best 0, 1, ..., K = F / block blocks.

    An expert without any score has coverage 0 throughout: none of its channels is worth a place.
    """
    # Negated throughout, in place: these arrays are the largest of a plan.
    best = -scores
    best.sort(axis=2)
    np.cumsum(best, axis=2, out=best)
    covered = np.zeros((*scores.shape[:2], scores.shape[2] // block + 1))
    total = best[:, :, -1:]
    np.divide(best[:, :, block - 1 :: block], total, out=covered[:, :, 1:], where=total < 0.0)
    return covered


def block_values(
    coverage: np.ndarray,  # [L, E, K+1]
    weights: np.ndarray,  # [L, E]
    *,
    degree: float = 0.0,
    rho_max: float = 1.0,
) -> np.ndarray:  # [L, E, K+1]
    """Weighted utility of each expert by the blocks it keeps; non-decreasing and concave."""
    coverage = np.minimum(coverage, rho_max) / rho_max
    top = weights.max()
    weights = np.maximum(weights / top, 1e-12) if top > 0.0 else np.ones_like(weights)
    return weights[:, :, None] * utility(coverage, degree)


def weighted_coverage(
    coverage: np.ndarray,  # [L, E, F+1]
    weights: np.ndarray,  # [L, E]
    counts: np.ndarray,  # [L, E]
) -> float:
    """Mean coverage of the experts under these weights, in [0, 1]."""
    share = np.take_along_axis(coverage, counts[:, :, None], axis=2)[:, :, 0]
    return float((weights * share).sum() / weights.sum())


def by_table(
    values: np.ndarray, blocks: int, least: int, reserved: np.ndarray, most: np.ndarray
) -> np.ndarray:
    """Exact optimum by dynamic programming over groups and blocks.

    Args:
      values: [G, K+1] float64, value of a group by the blocks it keeps.
      blocks: blocks that may be kept in all.
      least: fewest blocks of a kept group.
      reserved: [G] bool, groups that must be kept.
      most: [G] int, most blocks of each group.

    Returns:
      Blocks per group, int64. As many as possible among equal values; fewer than `blocks` only
      where the widths do not add up to more, or adding up costs value.

    Raises:
      InputError: the reserved groups need more than there is.
    """
    groups, widths = values.shape
    _check_reserved(blocks, least, reserved, most)
    best = np.full(blocks + 1, -np.inf)
    best[0] = 0.0
    choice = np.zeros((groups, blocks + 1), np.int16)
    number = np.arange(widths)
    for group, value in enumerate(values):
        legal = ((number >= least) | ((number == 0) & ~reserved[group])) & (number <= most[group])
        padded = np.concatenate([np.full(widths - 1, -np.inf), best])
        # before[b, n] = best value of the earlier groups with b - n blocks.
        before = np.lib.stride_tricks.sliding_window_view(padded, widths)[:, ::-1]
        total = before + np.where(legal, value, -np.inf)
        choice[group] = total.argmax(axis=1)
        best = np.take_along_axis(total, choice[group][:, None].astype(np.int64), axis=1)[:, 0]
    left = blocks - int(best[::-1].argmax())
    kept = np.zeros(groups, np.int64)
    for group in reversed(range(groups)):
        kept[group] = choice[group, left]
        left -= kept[group]
    return kept


def by_hull(
    values: np.ndarray, blocks: int, least: int, reserved: np.ndarray, most: np.ndarray
) -> np.ndarray:
    """Items by value per block; misses the optimum by less than one first item.

    Arguments, result and errors are those of `by_table`. Needs values that are concave in the
    blocks, so that the items of one group come in order.
    """
    _check_reserved(blocks, least, reserved, most)
    gain = np.diff(values, axis=1)
    if least == 1:
        spent = np.array([min(blocks, int(most.sum()))])
        return select(-gain[None], spent, reserved[None].astype(np.int64), most[None])[0]
    gain = gain[:, least:]
    first = (values[:, least] - values[:, 0]) / least
    density = np.concatenate([np.where(reserved, np.inf, first)[:, None], gain], axis=1)
    # Rounding must not put a block before the item that it extends.
    density = np.minimum.accumulate(density, axis=1)
    number = np.arange(least, values.shape[1])  # [K - least + 1]
    group, item = np.nonzero(number <= most[:, None])
    order = np.argsort(-density[group, item], kind="stable")
    group, item = group[order], item[order]
    used = np.cumsum(np.where(item == 0, least, 1))
    taken = used <= blocks
    left = blocks - int(used[taken].max(initial=0))
    options = [_with_open_groups(taken, group, item, left)]
    if left and not taken.all():
        # A first item did not fit. Worth its place, perhaps, at the cost of the least blocks taken.
        missing = least - left
        least_taken = np.flatnonzero(taken & (item > 0))[::-1][:missing]
        swapped = taken.copy()
        swapped[least_taken] = False
        swapped[int(taken.sum())] = True
        options += [swapped] if least_taken.size == missing else []
    counts = [_blocks_of(chosen, group, item, least, len(values)) for chosen in options]
    worth = [np.take_along_axis(values, kept[:, None], axis=1).sum() for kept in counts]
    return counts[int(np.argmax(worth))]


def _with_open_groups(
    taken: np.ndarray, group: np.ndarray, item: np.ndarray, left: int
) -> np.ndarray:
    # What is left goes, block by block, to the groups that are already open.
    opened = np.isin(group, group[taken & (item == 0)])
    chosen = taken.copy()
    chosen[np.flatnonzero(~taken & (item > 0) & opened)[:left]] = True
    return chosen


def _blocks_of(
    chosen: np.ndarray, group: np.ndarray, item: np.ndarray, least: int, groups: int
) -> np.ndarray:  # [G]
    size = np.where(item[chosen] == 0, least, 1)
    return np.bincount(group[chosen], weights=size, minlength=groups).astype(np.int64)


SOLVERS: dict[str, Solver] = {"dp": by_table, "hull": by_hull}


def aligned_optimum(
    values: np.ndarray,  # [L, E, K+1]
    blocks: int,
    *,
    least: int,
    reserved: np.ndarray,  # [L, E]
    most: np.ndarray,  # [L, E]
    solver: Solver = by_hull,
    layer_shares: np.ndarray | None = None,  # [L]
) -> np.ndarray:  # [L, E]
    """Blocks per expert that maximise the sum of values.

    Args:
      values: see `block_values`.
      blocks: blocks to keep in all.
      least: fewest blocks of a kept expert.
      reserved: bool, experts that must be kept.
      most: most blocks of each expert.
      solver: an entry of `SOLVERS`.
      layer_shares: if given, each layer is solved alone with its share of the blocks.

    Returns:
      int64, summing to at most `blocks`.

    Raises:
      InputError: the reserved experts need more blocks than there are.
    """
    layers, experts, widths = values.shape
    if layer_shares is None:
        flat = (values.reshape(-1, widths), blocks, least, reserved.ravel(), most.ravel())
        return solver(*flat).reshape(layers, experts)
    totals = apportion(layer_shares, blocks, least * reserved.sum(axis=1), most.sum(axis=1))
    rows = zip(values, totals.tolist(), reserved, most, strict=True)
    return np.stack([solver(value, total, least, held, top) for value, total, held, top in rows])


def best_known(
    values: np.ndarray,  # [L, E, K+1]
    blocks: int,
    *,
    least: int,
    reserved: np.ndarray,  # [L, E]
    most: np.ndarray,  # [L, E]
) -> np.ndarray:  # [L, E]
    """The exact optimum where its table is small, the hull's answer otherwise."""
    small = least > 1 and values.size * blocks <= TABLE_LIMIT
    bounds = {"least": least, "reserved": reserved, "most": most}
    return aligned_optimum(values, blocks, solver=by_table if small else by_hull, **bounds)


def _check_reserved(blocks: int, least: int, reserved: np.ndarray, most: np.ndarray) -> None:
    needed = int(reserved.sum()) * least
    if needed > blocks or (most[reserved] < least).any():
        raise BudgetError(
            f"{int(reserved.sum())} reserved experts of at least {least} blocks need {needed} "
            f"blocks, the budget is {blocks}; lower the prune rate, the minimum or the block"
        )
