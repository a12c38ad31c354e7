"""Alignment-aware redistribution: widths that hardware and quantisation groups like.

Experts with few channels are trimmed, the others rounded down to a multiple of the block, and the
freed channels handed out again in whole blocks.

Source: section 4.3 of arXiv 2606.18304; the repairs are marked where they are made.
"""

import numpy as np

from moe_jax.errors import InputError


def legal_minimum(minimum: int, block: int, d_expert: int) -> int:
    """Smallest width an expert may have when it is kept.

    Args:
      minimum: channels asked for, in [1, d_expert].
      block: channels per block.
      d_expert: channels of an unpruned expert.

    Returns:
      `minimum` rounded up to a block, at most `d_expert`.

    Raises:
      InputError: minimum or block is out of range.
    """
    if not 1 <= block <= d_expert:
        raise InputError(f"block={block} must lie in [1, d_expert={d_expert}]; choose e.g. 1")
    if not 1 <= minimum <= d_expert:
        raise InputError(
            f"minimum={minimum} must lie in [1, {d_expert}], the expert width; choose e.g. {block}"
        )
    return min(block * -(-minimum // block), d_expert)


def check_block(block: int, d_expert: int) -> None:
    """Raise InputError unless `block` divides the expert width; the message has those that do."""
    if block < 1 or d_expert % block:
        fits = [n for n in range(1, d_expert + 1) if d_expert % n == 0]
        raise InputError(
            f"block={block} does not divide the expert width {d_expert}; choose one of {fits}"
        )


def of_groups(
    scores: np.ndarray,  # [L, E, F]
    size: int,
) -> np.ndarray:  # [L, E, F]
    """The mean over every group of `size` neighbours, at each of them.

    Equal scores tie, ties are won by the lower channel, and widths are multiples of the size: so
    `best_channels` keeps whole groups.
    """
    if size == 1:
        return scores
    grouped = scores.reshape(*scores.shape[:2], -1, size).mean(axis=3)
    return np.repeat(grouped, size, axis=2)


def best_channels(
    scores: np.ndarray,  # [L, E, F]
    counts: np.ndarray,  # [L, E]
) -> np.ndarray:  # [L, E, F]
    """Mask of each expert's best channels.

    Args:
      scores: higher is better.
      counts: channels to keep, int in [0, F].

    Returns:
      bool; ties are won by the lower channel index.
    """
    channels = scores.shape[2]
    last = np.clip(channels - counts, 0, channels - 1)[:, :, None]  # [L, E, 1]
    level = np.take_along_axis(np.sort(scores, axis=2), last, axis=2)
    above = scores > level
    tied = scores == level
    left = counts[:, :, None] - above.sum(axis=2, keepdims=True)
    return above | (tied & (np.cumsum(tied, axis=2, dtype=np.int32) <= left))


def uniform_counts(
    shape: tuple[int, int, int], budget: int, block: int, least: int
) -> np.ndarray:  # [L, E]
    """Give every expert of the model the same width, rounded down to a block.

    Args:
      shape: layers, experts per layer, channels per expert.
      budget: channels that may be kept in all.
      block: the width is a multiple of it.
      least: smallest width allowed.

    Returns:
      Channels kept per expert, int64; their sum is at most the budget.

    Raises:
      InputError: the width would be below `least`.
    """
    layers, experts, d_expert = shape
    width = budget // (layers * experts * block) * block
    if width < least:
        raise InputError(
            f"the budget of {budget} channels leaves a uniform width of {width} of {d_expert}, "
            f"at least {least} are needed; lower the prune rate, the minimum or block={block}"
        )
    return np.full((layers, experts), width, np.int64)


def redistribute(
    counts: np.ndarray,  # [L, E]
    *,
    d_expert: int,
    block: int,
    minimum: int = 1,
    attribution: np.ndarray,  # [L, E]
    reserved: np.ndarray | None = None,  # [L, E]
    best_first: np.ndarray | None = None,  # [L, E, F]
    capacity: np.ndarray | None = None,  # [L, E]
    per_layer: bool = False,
) -> np.ndarray:  # [L, E]
    """Move every width to {0} U {n >= minimum : block | n} U {d_expert} within the same budget.

    Where the block divides `d_expert`, the result sums to the budget rounded down to a block.
    Otherwise the last block of a full expert is a smaller one. Fewer channels are used only if
    every kept expert is full and the rest is too small to revive another.

    Args:
      counts: channels kept per expert, int; their sum is the budget, which is never exceeded.
      d_expert: channels of an unpruned expert.
      block: channels per block.
      minimum: experts below are trimmed; rounded up to a block.
      attribution: breaks ties, and orders the experts that are revived.
      reserved: bool; experts lifted to the minimum instead of trimmed.
      best_first: sorted channel scores; if given, blocks go first to the experts that lost the
        largest score by rounding instead of the most channels.
      capacity: int; most channels of each expert, itself a legal width; default `d_expert`.
      per_layer: keep each layer's budget where possible; what a layer cannot use goes to others.

    Returns:
      Channels kept per expert, int64.

    Raises:
      InputError: counts or block are out of range, or the reserved experts alone exceed the budget.
    """
    counts = np.asarray(counts, np.int64)
    reserved = np.zeros(counts.shape, bool) if reserved is None else reserved
    capacity = np.full(counts.shape, d_expert) if capacity is None else capacity
    least = legal_minimum(minimum, block, d_expert)
    _check(counts, reserved, capacity, least=least)
    budgets = counts.sum(axis=1)  # [L]
    rounded = _round_down(counts, reserved, d_expert=d_expert, block=block, least=least)
    lost = counts - rounded
    removed = lost if best_first is None else _score_between(best_first, rounded, counts)
    order = np.lexsort((-attribution, -removed), axis=1)  # [L, E], stable: then by index
    if per_layer:
        rounded = _within_layers(rounded, order, budgets, capacity, block)
    kept, value = rounded.reshape(-1), attribution.reshape(-1)
    order = np.lexsort((-value, -removed.reshape(-1)))
    kept = _give_back(kept, value, reserved.reshape(-1), budgets.sum(), least)
    sizes = {"room_for": capacity.reshape(-1), "block": block}
    kept = _hand_out(kept, order, budgets.sum() - kept.sum(), **sizes)
    left = budgets.sum() - kept.sum()
    return _revive(kept, value, order, left, least=least, **sizes).reshape(counts.shape)


def _within_layers(
    rounded: np.ndarray, order: np.ndarray, budgets: np.ndarray, capacity: np.ndarray, block: int
) -> np.ndarray:  # [L, E], [L, E], [L], [L, E] -> [L, E]
    # Each layer hands out what it freed itself.
    kept = rounded.copy()
    for row, best, budget, most in zip(kept, order, budgets, capacity, strict=True):
        if row.sum() <= budget:
            row[:] = _hand_out(row, best, budget - row.sum(), room_for=most, block=block)
    return kept


def _check(counts: np.ndarray, reserved: np.ndarray, capacity: np.ndarray, *, least: int) -> None:
    if counts.min() < 0 or (counts > capacity).any():
        raise InputError(
            f"counts in [{counts.min()}, {counts.max()}] must lie in [0, d_expert="
            f"{capacity.max()}], and below the capacity of each expert"
        )
    if (capacity[reserved] < least).any():
        raise InputError(
            f"a reserved expert may keep {capacity[reserved].min()} channels, at least {least} are "
            "needed; raise the cap or lower the minimum"
        )
    needed = int(reserved.sum()) * least
    if needed > counts.sum():
        raise InputError(
            f"{int(reserved.sum())} reserved experts of at least {least} channels need {needed}, "
            f"the budget is {counts.sum()}; lower the prune rate, the minimum or the block"
        )


def _round_down(
    counts: np.ndarray, reserved: np.ndarray, *, d_expert: int, block: int, least: int
) -> np.ndarray:
    rounded = np.where(counts == d_expert, d_expert, counts - counts % block)
    rounded = np.where(rounded < least, 0, rounded)
    # The paper would trim these too; a layer needs as many experts as a token selects.
    return np.where(reserved, np.maximum(rounded, least), rounded)


def _score_between(best_first: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    covered = np.cumsum(best_first, axis=2)
    covered = np.pad(covered, ((0, 0), (0, 0), (1, 0)))
    ends = (np.take_along_axis(covered, n[:, :, None], axis=2)[:, :, 0] for n in (high, low))
    return np.subtract(*ends)


def _give_back(
    kept: np.ndarray, value: np.ndarray, reserved: np.ndarray, budget: int, least: int
) -> np.ndarray:
    # Lifting reserved experts can overdraw the budget: empty the experts of least attribution,
    # and if that is not enough cut the reserved ones to the minimum.
    over = kept.sum() - budget
    if over <= 0:
        return kept
    order = np.lexsort((value, reserved))
    free = np.where(reserved, kept - least, kept)[order]
    needed = np.cumsum(free) - free < over
    kept = kept.copy()
    kept[order] -= np.where(needed, free, 0)
    return kept


def _hand_out(
    kept: np.ndarray,  # [G]
    order: np.ndarray,  # [G]
    channels: int,
    *,
    room_for: np.ndarray,  # [G]
    block: int,
) -> np.ndarray:  # [G]
    # One block per visit, in rounds over the active experts that are not full. All complete
    # rounds at once: the largest number of them that the channels pay for.
    room = np.where(kept > 0, room_for - kept, 0)[order]
    low, high = 0, -(-int(room.max(initial=0)) // block)
    while low < high:
        rounds = (low + high + 1) // 2
        if np.minimum(room, rounds * block).sum() <= channels:
            low = rounds
        else:
            high = rounds - 1
    given = np.minimum(room, low * block)
    channels -= given.sum()
    # The round that the channels pay for in part: in order, then the smaller last blocks that
    # still fit.
    visit = np.minimum(room - given, block)
    paid = np.cumsum(visit) <= channels
    rest = channels - visit[paid].sum()
    small = np.where(paid | (visit == block), 0, visit)
    given += np.where(paid, visit, np.where(np.cumsum(small) <= rest, small, 0))
    result = kept.copy()
    result[order] += given
    return result


def _revive(
    kept: np.ndarray,  # [G]
    value: np.ndarray,  # [G]
    order: np.ndarray,  # [G]
    channels: int,
    *,
    least: int,
    room_for: np.ndarray,  # [G]
    block: int,
) -> np.ndarray:  # [G]
    # Every active expert is full: the paper's rule would leave the rest unspent.
    empty = np.flatnonzero((kept == 0) & (room_for >= least))
    revived = empty[np.argsort(-value[empty], kind="stable")][: channels // least]
    if not revived.size:
        return kept
    kept = kept.copy()
    kept[revived] = least
    channels -= least * revived.size
    return _hand_out(kept, order, channels, room_for=room_for, block=block)
