"""Memory of the host that JAX on a CPU takes as it is."""

import math
from collections.abc import Sequence

import numpy as np


def aligned_empty(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory on a 64-byte boundary, which `jax.device_put(..., may_alias=True)` on a
    CPU uses without copying it."""
    size = math.prod(shape) * dtype.itemsize
    raw = np.empty(size + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size].view(dtype).reshape(shape)
