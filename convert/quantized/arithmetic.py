"""What the formats share: numbers out of 32-bit words, and numbers times their scales."""

import numpy as np

Block = tuple[int, int]  # rows and columns of a weight that share a scale


def unpack_rows(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """Unsigned numbers out of words, the lowest bits first.

    Args:
      words: int32 [rows, any].
      bits: of a number, 4 or 8.
      columns: numbers per row; what is left of the last word is dropped.

    Returns:
      uint8 [rows, columns].
    """
    # Little endian: byte 0 of a word is its lowest.
    found = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 4:
        found = np.stack([found & 15, found >> 4], axis=-1).reshape(len(found), -1)
    return found[:, :columns]


def spread(table: np.ndarray, block: Block, shape: tuple[int, int]) -> np.ndarray:
    """A scale, or zero point, per block as float32 per weight.

    Args:
      table: [blocks of rows, blocks of columns].
      block: the size of a block; the last ones may be incomplete.
      shape: of the weight.

    Returns:
      float32, to be broadcast to `shape`.
    """
    wide = table.astype(np.float32)
    for axis in (0, 1):
        if wide.shape[axis] > 1:
            wide = np.repeat(wide, block[axis], axis=axis)
    return wide[: shape[0], : shape[1]]


def scaled(
    codes: np.ndarray, scale: np.ndarray, dtype: np.dtype, zero: np.ndarray | None = None
) -> np.ndarray:
    """(codes - zero) * scale, in the precision of the stored scales, as the formats' libraries do.

    Args:
      codes: [rows, columns], whole numbers or 8-bit floats.
      scale: float32, broadcast to the codes.
      dtype: in which scales are stored.
      zero: float32, as `scale`.

    Returns:
      float16 if scales are; else float32, which holds products with bfloat16 scales exactly, so
      that the cast to bfloat16 rounds once, like a product in bfloat16.
    """
    values = codes.astype(np.float32)
    if zero is not None:
        values -= zero
    values *= scale
    if dtype != np.float16:
        return values
    with np.errstate(over="ignore"):  # infinity is found, and named, where weights are checked
        return values.astype(np.float16)
