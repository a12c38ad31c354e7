"""Hidden states that a backward sweep needs, kept on the host."""

import math
import tempfile

import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.stream import LayerSource

MEMORY_STATES = 2 << 30  # bytes of hidden states kept in memory; more go to a temporary file


class States:
    """Hidden states before and in the middle of every layer: [L, 2, B, T, D] on the host."""

    def __init__(self, source: LayerSource, shape: tuple[int, ...], dtype):
        shape = (len(source), 2, *shape, source.config.d_model)
        size = math.prod(shape) * jnp.dtype(dtype).itemsize
        if size <= MEMORY_STATES:
            self.values = np.empty(shape, dtype)
            return
        file = tempfile.TemporaryFile(prefix="moe-states-")
        self.values = np.memmap(file, dtype, "w+", shape=shape)

    def put(self, layer: int, rows: slice, x: np.ndarray, middle: Array) -> None:
        """Keep a layer's input and its state after attention, each [B, T, D]."""
        self.values[layer, 0, rows], self.values[layer, 1, rows] = x, np.asarray(middle)

    def get(self, layer: int, rows: slice) -> tuple[Array, Array]:
        """What `put` kept."""
        before, middle = self.values[layer, :, rows]
        return jnp.asarray(before), jnp.asarray(middle)


def row_slices(count: int, batch: int) -> list[slice]:
    """Consecutive batches of `count` rows."""
    return [slice(start, start + batch) for start in range(0, count, batch)]
