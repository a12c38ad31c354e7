"""One tensor under its public name, whatever stands for it on disk."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FLOATS = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class View:
    """One public tensor: its shape, and how to read it.

    Attributes:
      shape: of the tensor.
      read: its values; a weight that is stored in few bits is dequantised.
      codes: of a weight [rows, columns] in symmetric groups of 4 bits, codes int8 [rows, columns]
        in -8..7 and the scales as stored, [rows, groups]; None of any other.
    """

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]
    codes: Callable[[], tuple[np.ndarray, np.ndarray]] | None = None
