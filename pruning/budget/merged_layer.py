"""How the experts of one layer are merged, as a value and as arrays of a plan."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.errors import InputError

ARRAYS = ("leaders", "share", "order")  # of a plan's file, each with the layer's number behind it


@dataclass(frozen=True, eq=False)
class MergedLayer:
    """How the experts of one layer are merged.

    Attributes:
      leaders: int [E], the expert whose channels' order its group has; leaders lead themselves.
      share: float64 [E], how much of the merged expert is of each; one in all over a group.
      order: int [E, F], which of an expert's channels stands beside each of its leader's.
      cut: whether tokens are routed among leaders alone.
    """

    leaders: np.ndarray
    share: np.ndarray
    order: np.ndarray
    cut: bool

    @property
    def is_leader(self) -> np.ndarray:  # bool [E]
        """Which experts lead a group."""
        return self.leaders == np.arange(len(self.leaders))

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What makes it, but for the cut, by names of `ARRAYS`."""
        return {
            "leaders": self.leaders.astype(np.int32),
            "share": self.share.astype(np.float64),
            "order": self.order.astype(np.int32),
        }

    def check(self, shape: tuple[int, int]) -> None:
        """Raise InputError unless it merges as many experts of as many channels, [E, F]."""
        experts, channels = shape
        numbers: dict[str, Any] = self.arrays
        leaders, share, order = (numbers[name] for name in ARRAYS)
        fits = leaders.shape == share.shape == (experts,) and order.shape == shape
        fits = fits and ((leaders >= 0) & (leaders < experts)).all()
        fits = fits and (leaders[leaders] == leaders).all() and (share >= 0).all()
        fits = fits and (np.sort(order, axis=1) == np.arange(channels)).all()
        sums = np.bincount(leaders, share, experts) if fits else np.zeros(0)
        if not fits or np.abs(sums[self.is_leader] - 1).max() > 1e-6:
            raise InputError(
                f"the merged experts of a plan do not belong to {experts} experts of {channels} "
                "channels: leaders lead themselves, shares of a group are one in all, orders are "
                "permutations; compare again"
            )
