"""What a backward sweep needs of the forward one, kept on the host or in a file."""

import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.experts.dispatch import padded_rows
from moe_jax.files import scratch_file
from pruning.kit.array_files import InPieces
from pruning.kit.memory import allowance

MEMORY_STATES = 2 << 30  # bytes of hidden states kept in memory; more go to a scratch file
MEMORY_PROJECTIONS = 2 << 30  # bytes of gate and up rows kept; others are computed again


def projection_bytes(moe: MoEConfig, tokens: int) -> int:
    """Bytes of a batch's gate and up rows in one layer, float32 and padded to whole tiles."""
    return 2 * padded_rows(tokens * moe.experts_per_token, moe.num_experts) * moe.d_expert * 4


def projection_room(config: ModelConfig, batches: int, tokens: int) -> int:
    """How often a sweep keeps the gate and up rows of one layer and one batch.

    All that fit `MEMORY_PROJECTIONS`; none if that is less than a quarter, whose gain is not worth
    the memory and second programs, and none on accelerators, which compute them faster than the
    host would take and give them.

    Args:
      config: of the model.
      batches: in the text.
      tokens: in a batch.
    """
    visits = len(config.moe_layers) * batches
    fit = min(visits, MEMORY_PROJECTIONS // projection_bytes(config.moe, tokens))
    return fit if 4 * fit >= visits and jax.default_backend() == "cpu" else 0


def layer_slots(config: ModelConfig) -> int:
    """Slots that keep the input and the middle of every layer."""
    return 2 * config.num_layers


def state_bytes(slots: int, shape: tuple[int, ...], dtype) -> int:
    """Bytes of `States`.

    Args:
      slots: how many states of the text.
      shape: (B, T, D) of the text, windows of padding to whole batches included.
      dtype: of the activations.
    """
    return slots * math.prod(shape) * jnp.dtype(dtype).itemsize


class States:
    """Hidden states of a text, in so many slots as are needed at once: [slots, B, T, D].

    Args:
      slots: how many.
      shape: (B, T, D).
      dtype: of the activations.
      file: of `state_bytes`, where they lie; default in memory.
    """

    def __init__(self, slots: int, shape: tuple[int, ...], dtype, file: BinaryIO | None = None):
        self._file, self._dtype, self._shape = file, jnp.dtype(dtype), shape
        self._values = None if file else np.empty((slots, *shape), self._dtype)

    def put(self, slot: int, rows: slice, x) -> None:
        """Keep the states [b, T, D] of some consecutive windows."""
        x = np.asarray(x)
        assert x.dtype == self._dtype
        if self._values is not None:
            self._values[slot, rows] = x
            return
        assert self._file is not None
        self._file.seek(self._place(slot, rows))
        self._file.write(np.ascontiguousarray(x).view(np.uint8).data)

    def get(self, slot: int, rows: slice) -> np.ndarray:
        """What `put` kept."""
        if self._values is not None:
            return self._values[slot, rows]
        assert self._file is not None
        x = np.empty((rows.stop - rows.start, *self._shape[1:]), self._dtype)
        self._file.seek(self._place(slot, rows))
        # Not a map of the file, whose pages would count as this process's memory.
        got = self._file.readinto(x.view(np.uint8).data)  # type: ignore[attr-defined]
        assert got == x.nbytes
        return x

    def __getitem__(self, rows: slice) -> np.ndarray:
        """What lies in the first slot."""
        return self.get(0, rows)

    def in_pieces(self, rows: int, size: int) -> InPieces:
        """The first rows of the first slot, to be read so many bytes, or a row, at a time."""
        step = max(1, size // max(1, state_bytes(1, (1, *self._shape[1:]), self._dtype)))
        parts = [slice(i, min(i + step, rows)) for i in range(0, rows, step)]
        shape = rows, *self._shape[1:]
        return InPieces(shape, self._dtype, lambda: (self.get(0, part) for part in parts))

    def sync(self) -> None:
        """Wait until all is on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def drop(self) -> None:
        """Give the memory back."""
        self._values = None

    def _place(self, slot: int, rows: slice) -> int:
        windows = slot * self._shape[0] + rows.start
        return windows * math.prod(self._shape[1:]) * self._dtype.itemsize


class InSlot:
    """The states of a text's batches in one slot, as `moe_jax.stream.PerBatch`.

    Args:
      states: where they lie.
      slot: which.
      rows: of each batch.
    """

    def __init__(self, states: States, slot: int, rows: Sequence[slice]):
        self._states, self._slot, self._rows = states, slot, rows

    def __getitem__(self, batch: int, /) -> np.ndarray:
        return self._states.get(self._slot, self._rows[batch])

    def __setitem__(self, batch: int, value: np.ndarray, /) -> None:
        self._states.put(self._slot, self._rows[batch], value)


@contextmanager
def temporary_states(
    slots: int, shape: tuple[int, ...], dtype, scratch: Path | None = None
) -> Iterator[States]:
    """States in memory or, above `MEMORY_STATES` or less that the run's allowance has, in a scratch
    file, gone at the end.

    Args:
      slots, shape, dtype: see `States`.
      scratch: folder of that file; default the system's.

    Raises:
      FullDiskError: there is no room for it.
    """
    size = state_bytes(slots, shape, dtype)
    if size <= allowance().of(MEMORY_STATES):
        states = States(slots, shape, dtype)
        yield states
        states.drop()
        return
    with scratch_file(scratch or Path(tempfile.gettempdir()), size) as file:
        yield States(slots, shape, dtype, file)


class Projections:
    """Arrays that spare the backward pass work, for the first visits of a forward sweep.

    Args:
      room: for how many pairs of a layer and a batch.
    """

    def __init__(self, room: int):
        self._room = room
        self._left = allowance().of(sys.maxsize)  # bytes, beside that `room`
        self._kept: dict[tuple[int, int], Any] = {}

    def has_room(self, visit: int) -> bool:
        """Whether a visit, counted upwards from 0, is one of those, kept or made again."""
        return visit < self._room

    def keep(self, layer: int, rows: slice, arrays: Any) -> None:
        """Keep a tree of arrays of a batch, where the run's allowance has room for them."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
        if size <= self._left:
            self._left -= size
            self._kept[layer, rows.start] = jax.tree.map(np.asarray, arrays)

    def take(self, layer: int, rows: slice) -> Any:
        """What `keep` kept, once; None if it did not, or in a process before this one."""
        return self._kept.pop((layer, rows.start), None)
