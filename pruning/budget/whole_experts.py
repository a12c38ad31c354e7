"""Whole experts: which ones to keep, by any score or by what their removal costs jointly."""

import itertools

import numpy as np

from pruning.kit.errors import BudgetError

# Beyond this many experts the subsets of a layer are not enumerated.
ENUMERATED = 8


def keep_experts(
    value: np.ndarray,  # [L, E]
    kept: int,
    *,
    per_layer: bool,
    reserved: np.ndarray | None = None,  # [L, E]
) -> np.ndarray:  # [L, E]
    """The experts of largest value.

    Args:
      value: higher is worth more, any sign.
      kept: experts to keep in the whole model.
      reserved: bool; experts kept in any case.
      per_layer: every layer keeps the same number (the first layers one more where it does not
        divide); otherwise all layers compete.

    Returns:
      bool; ties go to the lower layer, then the lower expert.

    Raises:
      InputError: fewer than the reserved or more than all experts are to be kept.
    """
    if reserved is None:
        reserved = np.zeros(value.shape, bool)
    layers = len(value)
    quota = np.array([kept])
    rank_first = np.where(reserved, -np.inf, -value)
    if per_layer:
        quota = kept // layers + (np.arange(layers) < kept % layers)
    rows = rank_first.reshape(len(quota), -1)
    least = reserved.reshape(len(quota), -1).sum(axis=1)
    if (quota < least).any() or (quota > rows.shape[1]).any():
        raise BudgetError(
            f"kept={kept} of {value.size} experts must leave the {int(reserved.sum())} reserved "
            f"ones in place{' in every layer' if per_layer else ''}; change the prune rate"
        )
    rank = np.argsort(np.argsort(rows, axis=1, kind="stable"), axis=1)
    return (rank < quota[:, None]).reshape(value.shape)


def naee(
    gram: np.ndarray,  # [L, E, E]
    kept: int | np.ndarray,  # [L]
) -> np.ndarray:  # [L, E]
    """Per layer, the subset of experts whose output differs least from the layer's.

    Every subset is tried up to 8 experts. Beyond, experts are removed one at a time, each time the
    one that adds least to the loss given those already gone.

    Args:
      gram: float64, sum over tokens of the products of the experts' weighted outputs.
      kept: experts per layer, in [1, E].

    Returns:
      bool; ties keep the lower index.

    Raises:
      InputError: `kept` is out of range.

    Source: "Not All Experts are Equal", arXiv 2402.14800, with the loss in closed form.
    """
    layers, experts, _ = gram.shape
    quota = np.broadcast_to(np.asarray(kept), (layers,))
    if (quota < 1).any() or (quota > experts).any():
        raise BudgetError(f"kept={kept} must lie in [1, {experts}], the experts of a layer")
    search = _best_removal if experts <= ENUMERATED else _greedy_removal
    rows = [search(one, experts - int(n)) for one, n in zip(gram, quota, strict=True)]
    return ~np.stack(rows)


def _best_removal(gram: np.ndarray, count: int) -> np.ndarray:  # [E, E] -> [E]
    experts = len(gram)
    # From the highest indices down, so that a tie keeps the lower ones.
    subsets = np.array(list(itertools.combinations(reversed(range(experts)), count)), np.int64)
    removed = np.zeros((len(subsets), experts), bool)
    np.put_along_axis(removed, subsets, True, axis=1)
    chosen = removed.astype(np.float64)
    loss = np.einsum("se,ef,sf->s", chosen, gram, chosen)
    return removed[int(loss.argmin())]


def _greedy_removal(gram: np.ndarray, count: int) -> np.ndarray:  # [E, E] -> [E]
    removed = np.zeros(len(gram), bool)
    added = np.diagonal(gram).astype(np.float64).copy()
    for _ in range(count):
        cost = np.where(removed, np.inf, added)
        # The last of equal costs, so that a tie keeps the lower ones.
        worst = len(cost) - 1 - int(cost[::-1].argmin())
        removed[worst] = True
        added += 2.0 * gram[worst]
    return removed


def replacement_vectors(
    output_sum: np.ndarray,  # [L, E, D]
    tokens: np.ndarray,  # [L, E]
    counts: np.ndarray,  # [L, E]
) -> tuple[np.ndarray, ...]:  # [emptied, D] of each layer
    """Mean output of every emptied expert over its routed tokens: what a constant can stand in for.

    Zero for those no token ever reached.

    Args:
      output_sum: sum over the routed tokens of the expert's output.
      tokens: tokens routed to the expert.
      counts: channels kept, 0 for an emptied expert.

    Returns:
      float32, as the `constants` of a plan.

    Source: MoNE, arXiv 2507.00390.
    """
    return tuple(
        (sums[gone] / np.maximum(routed[gone], 1.0)[:, None]).astype(np.float32)
        for sums, routed, gone in zip(output_sum, tokens, counts == 0, strict=True)
    )
