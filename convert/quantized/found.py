"""What a format's reader hands over, and the checks that all of them need."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from convert.reader import SafetensorsFolder
from convert.view import View


@dataclass(frozen=True)
class Found:
    """A weight out of several stored tensors.

    Attributes:
      name: its public name.
      view: None if something is wrong with it, which then stands among the problems.
      stored: names of the tensors that it is made of.
    """

    name: str
    view: View | None
    stored: tuple[str, ...]


def is_table(folder: SafetensorsFolder, name: str, shape: Sequence[int], kinds: Sequence[str]):
    """Whether a tensor is stored with one of these dtypes and this shape, axes of one left out."""
    if name not in folder:
        return False
    dtype, stored = folder.spec(name)
    return dtype.name in kinds and _long(stored) == _long(shape)


def _long(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size > 1]


def described(folder: SafetensorsFolder, names: Sequence[str]) -> str:
    """Dtypes and shapes of tensors, for an error."""
    said = []
    for name in names:
        last = name.rpartition(".")[2]
        if name in folder:
            dtype, shape = folder.spec(name)
            said.append(f"{last} {dtype} {list(shape)}")
        else:
            said.append(f"no {last}")
    return ", ".join(said)


def read_table(folder: SafetensorsFolder, name: str, shape: tuple[int, int]) -> np.ndarray:
    """A tensor for which `is_table` holds, with all axes."""
    return folder.read(name).reshape(shape)
