"""What a repair makes of the experts of a layer, a group at a time, in memory or in a file."""

import numpy as np

from moe_jax.experts.pool import Experts
from pruning.scores.states import States
from pruning.shrink.progress import LayerArrays
from pruning.shrink.repair_layer import Changes

PIECE = 1 << 24  # bytes of repaired rows that are read at a time


class StoredChanges:
    """`Changes` of all experts of a layer.

    Args:
      keep: bool [E, F].
      states: float32 [kept channels + E, D], for a bias behind the channels of every expert.
    """

    def __init__(self, keep: np.ndarray, states: States):
        counts = keep.sum(axis=1)
        self._start = np.cumsum(counts + 1) - counts - 1
        self._states, self._rows = states, dict[int, int]()  # of an expert that is changed

    def put(self, own: slice, changes: Changes) -> None:
        """Keep those of a group, numbered from its first expert."""
        for expert in range(own.start, own.stop):
            self._rows.pop(expert, None)
        for number, change in changes.items():
            expert = own.start + number
            self._rows[expert] = len(change)
            self._states.put(0, self._of(expert), change)

    def get(self, own: slice) -> Changes:
        """What `put` kept."""
        there = [expert for expert in range(own.start, own.stop) if expert in self._rows]
        return {
            expert - own.start: np.array(self._states.get(0, self._of(expert))) for expert in there
        }

    def _of(self, expert: int) -> slice:
        return slice(self._start[expert], self._start[expert] + self._rows[expert])


class StoredLayer:
    """The down-projections of a repaired layer.

    Args:
      keep: bool [E, F].
      states: [kept channels, D], where they lie.

    Attributes:
      changed: how many experts were.
    """

    def __init__(self, keep: np.ndarray, states: States):
        self._ends = np.append(0, np.cumsum(keep.sum(axis=1)))
        self._states = states
        self._bias: list[np.ndarray] = []  # of each group
        self.changed = 0

    def put(self, own: slice, experts: Experts, changed: int) -> None:
        """Keep those of a group; groups come in their order."""
        rows = slice(self._ends[own.start], self._ends[own.stop])
        self._states.put(0, rows, np.asarray(experts.w_down)[: rows.stop - rows.start])
        if experts.b_down is not None:
            self._bias.append(np.asarray(experts.b_down))
        self.changed += changed

    def arrays(self) -> LayerArrays:
        """All of the layer, to be written in pieces."""
        down = self._states.in_pieces(int(self._ends[-1]), PIECE)
        return {"w_down": down} | ({"b_down": np.concatenate(self._bias)} if self._bias else {})
