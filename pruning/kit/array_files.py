"""Files of named arrays that are larger than what should be in memory at a time."""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

# What safetensors calls types, in the order in which it lays arrays of the same width.
TYPES = {
    "int64": "I64", "float64": "F64", "float32": "F32", "int32": "I32", "bfloat16": "BF16",
    "float16": "F16", "int8": "I8", "uint8": "U8",
}  # fmt: skip
NAMES = {of: name for name, of in TYPES.items()}
ALIGNMENT = 8  # bytes, of where the first array begins


@dataclass(frozen=True, eq=False)
class InPieces:
    """An array that is never whole in memory.

    Attributes:
      shape: of all of it.
      dtype: of it.
      pieces: gives arrays that follow each other in the order of its numbers.
    """

    shape: tuple[int, ...]
    dtype: Any
    pieces: Callable[[], Iterable[np.ndarray]]


WHOLE = slice(None)  # all rows of an array
AnyArray = np.ndarray | InPieces


def save_arrays(arrays: Mapping[str, AnyArray], path: Path) -> None:
    """Write a safetensors file, the bytes of which are those that `safetensors.numpy` writes.

    Args:
      arrays: by name, of the types of `TYPES`.
      path: of the file.
    """
    names, types = list(TYPES), {name: jnp.dtype(one.dtype).name for name, one in arrays.items()}
    order = sorted(arrays, key=lambda name: (names.index(types[name]), name))
    header, start = {}, 0
    for name in order:
        shape, dtype = arrays[name].shape, jnp.dtype(arrays[name].dtype)
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": TYPES[dtype.name], "shape": list(shape), "data_offsets": [start, stop],
        }  # fmt: skip
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            one = arrays[name]
            for piece in one.pieces() if isinstance(one, InPieces) else [one]:
                if piece.size:
                    file.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data)


def read_rows(path: Path, rows: Mapping[str, slice]) -> dict[str, np.ndarray]:
    """Some rows of the arrays of a safetensors file, of those that it has.

    Args:
      path: of the file.
      rows: by name of the array.

    Raises:
      SafetensorError: it is damaged.
      FileNotFoundError: there is none.
    """
    with safe_open(path, "numpy") as file:

        def read(name: str, own: slice) -> np.ndarray:
            if own == WHOLE:
                return file.get_tensor(name)
            if own.start < own.stop:
                return file.get_slice(name)[own]
            dtype, shape = (
                getattr(file.get_slice(name), of)() for of in ("get_dtype", "get_shape")
            )
            return np.empty((0, *shape[1:]), jnp.dtype(NAMES[dtype]))

        there = set(file.keys())
        return {name: read(name, own) for name, own in rows.items() if name in there}
