"""Eight-bit floats with one scale per block of 128 x 128 weights, as DeepSeek-V3 is published.

Numpy rounds: its casts and divisions are those of IEEE, which XLA's need not be, so that the same
weight always gets the same codes.
"""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import struct
from jax import Array

BLOCK = 128  # rows, and columns, that share a scale
LARGEST = 448.0  # the largest number of e4m3
CODE = np.dtype(ml_dtypes.float8_e4m3fn)
FLOAT32 = np.dtype(np.float32)


@struct.dataclass
class Float8Tensor:
    """A 2-D weight as 8-bit floats; the last block of either axis may be incomplete.

    Attributes:
      codes: float8_e4m3fn [rows, columns].
      scale: float32 [ceil(rows / 128), ceil(columns / 128)], by which codes are multiplied.
    """

    codes: Array
    scale: Array

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the codes stand for."""
        rows, columns = self.codes.shape
        return rows, columns

    @property
    def dtype(self):
        """Dtype of the dequantised weight."""
        return self.scale.dtype


@jax.jit
def block_values(weight: Float8Tensor) -> Array:  # -> float32 [rows, columns]
    """The matrix that codes stand for, each product rounded once."""
    rows, columns = weight.shape
    wide = jnp.repeat(weight.scale, BLOCK, axis=0)[:rows]
    wide = jnp.repeat(wide, BLOCK, axis=1)[:, :columns]
    return weight.codes.astype(jnp.float32) * wide


def round_blocks(
    weight: np.ndarray, dtype: np.dtype = FLOAT32, *, power_of_two: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Round a matrix to its nearest codes; the largest of a block becomes 448.

    Args:
      weight: float [rows, columns].
      dtype: in which scales are kept; what it makes of a scale is what codes are multiplied by.
      power_of_two: take the next larger power of two as the scale.

    Returns:
      (codes float8_e4m3fn [rows, columns], scales of `dtype` [ceil(rows / 128),
      ceil(columns / 128)]); a block of zeros has scale 1.
    """
    rows, columns = weight.shape
    codes = np.empty(weight.shape, CODE)
    scales = np.empty((-(-rows // BLOCK), -(-columns // BLOCK)), dtype)
    for line, start in enumerate(range(0, rows, BLOCK)):  # bounds the temporaries
        part = weight[start : start + BLOCK].astype(np.float32)
        largest = np.maximum.reduceat(np.abs(part).max(axis=0), range(0, columns, BLOCK))
        scale = largest / np.float32(LARGEST)
        if power_of_two:
            scale = np.exp2(np.ceil(np.log2(np.maximum(scale, np.finfo(np.float32).tiny))))
        scale = np.where((largest > 0) & (scale.astype(dtype) > 0), scale, 1)
        scales[line] = scale.astype(dtype)
        wide = np.repeat(scales[line].astype(np.float32), BLOCK)[:columns]
        codes[start : start + BLOCK] = np.clip(part / wide, -LARGEST, LARGEST).astype(CODE)
    return codes, scales


def float8(weight: Array) -> Float8Tensor:
    """A matrix [rows, columns] rounded by `round_blocks`."""
    codes, scale = round_blocks(np.asarray(weight))
    return Float8Tensor(codes=jnp.asarray(codes), scale=jnp.asarray(scale))
