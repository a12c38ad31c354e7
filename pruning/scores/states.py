"""What a backward sweep needs of the forward one, kept on the host."""

import math
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.config import ModelConfig, MoEConfig
from moe_jax.experts.dispatch import padded_rows
from moe_jax.files import scratch_file
from moe_jax.stream import LayerSource

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
      batches: in a chunk.
      tokens: in a batch.
    """
    visits = len(config.moe_layers) * batches
    fit = min(visits, MEMORY_PROJECTIONS // projection_bytes(config.moe, tokens))
    return fit if 4 * fit >= visits and jax.default_backend() == "cpu" else 0


def scratch_bytes(config: ModelConfig, shape: tuple[int, ...], dtype) -> int:
    """Bytes of the scratch file that the states of a text take; 0 if they fit in memory.

    Args:
      config: of the model.
      shape: (B, T) of the text, windows of padding to whole batches included.
      dtype: of the activations.
    """
    size = 2 * config.num_layers * math.prod(shape) * config.d_model * jnp.dtype(dtype).itemsize
    return size if size > MEMORY_STATES else 0


class States:
    """Hidden states before and in the middle of every layer: [L, 2, B, T, D] on the host.

    With them, for the first `room` pairs of a layer and a batch, whatever arrays spare the backward
    pass work. In a `with` statement, at whose end they and their scratch file are gone.

    Args:
      source: the model.
      shape: (B, T) of the text.
      dtype: of the activations.
      scratch: folder of the file of states that do not fit in memory; default the system's.
      room: see above.

    Raises:
      FullDiskError: there is no room for that file.
    """

    def __init__(
        self,
        source: LayerSource,
        shape: tuple[int, ...],
        dtype,
        scratch: Path | None = None,
        room: int = 0,
    ):
        self.room = room
        self._kept: dict[tuple[int, int], Any] = {}
        self._file = ExitStack()
        size = scratch_bytes(source.config, shape, dtype)
        shape = (len(source), 2, *shape, source.config.d_model)
        if not size:
            self.values = np.empty(shape, dtype)
            return
        file = scratch_file(scratch or Path(tempfile.gettempdir()), size)
        self._file.enter_context(file)
        self.values = np.memmap(file, dtype, "r+", shape=shape)

    def __enter__(self) -> "States":
        return self

    def __exit__(self, *error: object) -> None:
        del self.values
        self._kept.clear()
        self._file.close()

    def put(self, layer: int, rows: slice, x: Array, middle: Array) -> None:
        """Keep a layer's input and its state after attention, each [B, T, D]."""
        for half, state in enumerate((x, middle)):
            self.values[layer, half, rows] = np.asarray(state)

    def get(self, layer: int, rows: slice) -> tuple[Array, Array]:
        """What `put` kept."""
        before, middle = self.values[layer, :, rows]
        return jnp.asarray(before), jnp.asarray(middle)

    def keep(self, layer: int, rows: slice, arrays) -> None:
        """Keep a tree of arrays of a batch; takes one of `room`."""
        self.room -= 1
        self._kept[layer, rows.start] = jax.tree.map(np.asarray, arrays)

    def take(self, layer: int, rows: slice) -> Any:
        """What `keep` kept, once; None if it was not asked to."""
        return self._kept.pop((layer, rows.start), None)
