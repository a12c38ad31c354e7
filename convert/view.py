"""One tensor under its public name, whatever stands for it on disk."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Told of weights that are rounded a second time: before and after, arrays of one shape.
OnRounded = Callable[[np.ndarray, np.ndarray], None]
FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class View:
    """One public tensor: its shape, and how to read it.

    Attributes:
      shape: of the tensor.
      read: its values; a weight that is stored in few bits is dequantised.
      codes: of a weight [rows, columns] that is stored in few bits as exports are, its codes and
        its scales as stored: in symmetric groups of 4 bits int8 [rows, columns] in -8..7 and
        [rows, groups], in blocks of 8-bit floats float8_e4m3fn [rows, columns] and [blocks of
        rows, blocks of columns]; None of any other.
      scale: in which those scales are stored.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    codes: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
    scale: np.dtype | None = None
