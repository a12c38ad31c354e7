"""Which of several models is taken by its loss on a few windows, and when two count as equal."""

from collections.abc import Mapping

import numpy as np

MARGIN = 0.02  # of the least added loss: what differs by more is no tie, however noisy


def take(
    losses: Mapping[str, np.ndarray],  # [B] each
    dense: np.ndarray,  # [B]
    tokens: np.ndarray,  # [B]
    domains: np.ndarray,  # [B]
) -> tuple[str, list[str]]:
    """Take the least loss; among those that tie with it, the one whose worst domain is best.

    A model ties with the best if their difference in loss per token is at most its own standard
    error, estimated from the windows, and at most `MARGIN` of what the best adds to the dense one.

    Args:
      losses: by model, nats summed over each of B windows.
      dense: the same of the dense model.
      tokens: predictions in each window.
      domains: int, which text each window is of.

    Returns:
      (the name that is taken, the names that tie with the best, itself included). The earlier name
      wins where all is equal.
    """
    total = tokens.sum()
    best = min(losses, key=lambda name: losses[name].sum())
    margin = MARGIN * max(0.0, (losses[best] - dense).sum() / total)
    tied = [
        name for name, loss in losses.items()
        if name == best or _difference(loss - losses[best], tokens, margin)
    ]  # fmt: skip
    texts = [domains == one for one in np.unique(domains[tokens > 0])]
    if len(texts) < 2:
        return best, tied
    worst = {
        name: max((losses[name] - dense)[rows].sum() / tokens[rows].sum() for rows in texts)
        for name in tied
    }
    return min(tied, key=worst.__getitem__), tied


def _difference(apart: np.ndarray, tokens: np.ndarray, margin: float) -> bool:
    """Whether a difference [B] in nats may be chance, and is small."""
    total, count = tokens.sum(), len(tokens)
    mean = apart.sum() / total
    if count < 2 or mean > margin:
        return False
    error = np.sqrt(count / (count - 1) * np.square(apart - mean * tokens).sum()) / total
    return bool(mean <= error)
