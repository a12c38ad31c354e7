"""Symmetric groupwise weights of 4 and 8 bits."""

from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import Array

from moe_jax.errors import InputError
from moe_jax.float8 import Float8Tensor, block_values

MIN_SCALE = 2.0**-14  # smallest normal float16: every client sees the same scale
# What the least code, -8 of 4 bits, stands for over the largest weight of a group. Clipping a few
# large weights lets all others be finer.
SHRINKS = tuple(1 - step / 40 for step in range(17))
ROWS_AT_ONCE = 4096
# Groups that are rounded side by side, so that what 17 scales make of them stays near the core; an
# accelerator wants more to do at once.
GROUPS_AT_ONCE, GROUPS_ON_ACCELERATORS = 2048, 1 << 17

AnyArray = TypeVar("AnyArray", Array, np.ndarray)


@struct.dataclass
class QTensor:
    """A 2-D weight as codes of 4 or 8 bits with one scale per group along `axis`.

    Attributes:
      packed: uint8 [rows, cols / 2] of 4 bits; column 2j in the low nibble, 2j + 1 in the high one,
        each stored as code + 8 with code in -8..7. Of 8 bits [rows, cols], code + 128.
      scale: [rows / g, cols] for axis 0, [rows, cols / g] for axis 1; representable in bfloat16, of
        either sign.
      group_size: g, weights that share one scale.
      axis: 0 or 1, the axis of the matrix that is contracted.
      bits: 4 or 8.
    """

    packed: Array
    scale: Array
    group_size: int = struct.field(pytree_node=False)
    axis: int = struct.field(pytree_node=False)
    bits: int = struct.field(pytree_node=False, default=4)

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the weight that the codes stand for."""
        rows, packed = self.packed.shape
        return rows, packed * 8 // self.bits

    @property
    def dtype(self):
        """Dtype of the dequantised weight."""
        return self.scale.dtype


Weight = Array | QTensor | Float8Tensor
CODED = (QTensor, Float8Tensor)  # what a weight may be beside an array


def is_linear(path: str) -> bool:
    """Whether a weight of a decoder layer, by its attribute path, is a linear layer's matrix.

    These are the weights that go to few bits, in memory and in every export; routers, gates of
    shared experts, norms and biases are named otherwise and stay.
    """
    return path.rpartition(".")[2].startswith("w_")


def pack_nibbles(codes: AnyArray) -> AnyArray:  # [rows, cols] -> [rows, cols / 2]
    """Pack integer codes in -8..7 two to a byte; the number of columns must be even.

    Codes on the host are packed there, which compiles nothing.
    """
    shifted = (codes.astype(np.int32) + 8).astype(np.uint8)
    return shifted[:, 0::2] | (shifted[:, 1::2] << 4)


def unpack_nibbles(packed: AnyArray) -> AnyArray:  # [rows, cols / 2] -> [rows, cols]
    """Inverse of `pack_nibbles`, as int8, on the host as well."""
    xp: Any = np if isinstance(packed, np.ndarray) else jnp
    pairs = xp.stack([packed & 0xF, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    return pairs.astype(xp.int8) - xp.int8(8)


def unpack(weight: QTensor) -> Array:
    """The codes of a weight, int8 [rows, cols]; of arrays on the host there as well."""
    if weight.bits == 4:
        return unpack_nibbles(weight.packed)
    xp: Any = np if isinstance(weight.packed, np.ndarray) else jnp
    return (weight.packed.astype(xp.int16) - xp.int16(128)).astype(xp.int8)


def quantize(
    weight: Array, *, group_size: int, axis: int, dtype=jnp.bfloat16, bits: int = 4
) -> QTensor:
    """Round a matrix to codes of few bits, to nearest, with the scale of least squared error.

    Args:
      weight: float [rows, cols], cols even of 4 bits.
      group_size: weights per scale; must divide the length of `axis`.
      axis: the contracted axis, along which groups lie.
      dtype: dtype in which scales are kept (their values always fit bfloat16).
      bits: of a code, 4 or 8.

    Returns:
      The QTensor. An all-zero group gets codes 0 and the smallest scale.

    Raises:
      InputError: if the group size does not divide the axis or cols is odd.
    """
    if weight.shape[axis] % group_size or (bits == 4 and weight.shape[1] % 2):
        raise InputError(
            f"group_size={group_size} must divide axis {axis} of a weight of shape "
            f"{weight.shape}, whose column count must be even; choose a smaller group size"
        )
    step = max(1, ROWS_AT_ONCE // group_size) * group_size  # bounds the temporaries
    parts = [
        _quantize_rows(weight[start : start + step], group_size, axis, bits)
        for start in range(0, weight.shape[0], step)
    ]
    packed, scale = (jnp.concatenate(part) for part in zip(*parts, strict=True))
    return QTensor(packed, scale.astype(dtype), group_size, axis, bits)


@partial(jax.jit, static_argnames=("group_size", "axis", "bits"))
def _quantize_rows(weight: Array, group_size: int, axis: int, bits: int) -> tuple[Array, Array]:
    # Compiled by itself wherever it is used, so that the same weight always gets the same codes.
    rows, cols = weight.shape
    beside = cols if axis == 0 else 1
    groups = weight.reshape(-1, group_size, beside)
    at_once = GROUPS_AT_ONCE if jax.default_backend() == "cpu" else GROUPS_ON_ACCELERATORS
    together = min(len(groups), max(1, at_once // beside))
    padded = jnp.pad(groups, ((0, -len(groups) % together), (0, 0), (0, 0)))

    def rounded(tile: Array) -> tuple[Array, Array]:  # [together, g, beside]
        wide = tile.swapaxes(0, 1).reshape(group_size, -1).astype(jnp.float32)
        scale = best_scale(wide, bits)
        codes = nearest_codes(wide, scale[None], bits).astype(jnp.int16)
        return codes.reshape(group_size, together, beside).swapaxes(0, 1), scale

    codes, scale = jax.lax.map(rounded, padded.reshape(-1, together, group_size, beside))
    codes = codes.reshape(padded.shape)[: len(groups)].reshape(rows, cols)
    scale = scale.ravel()[: len(groups) * beside]
    packed = pack_nibbles(codes) if bits == 4 else (codes + 128).astype(jnp.uint8)
    return packed, scale.reshape(-1, cols if axis == 0 else cols // group_size)


def best_scale(groups: Array, bits: int = 4) -> Array:  # [g, N] -> [N]
    """The scale of each group with the least squared rounding error, among `SHRINKS`.

    Its sign gives the largest weight the least code, the one without a counterpart, so all codes,
    sixteen of 4 bits, serve every group. llama.cpp's Q4_0 takes its scale from the largest value in
    the same way, and so finds a group of 32 with code -8 on its own grid: it rounds nothing again.

    Args:
      groups: float32, a group in each column.
      bits: of a code.

    Returns:
      float32 that bfloat16 can hold, of magnitude at least `MIN_SCALE`; of equally good scales the
      largest.
    """
    highest, lowest = groups.max(axis=0), groups.min(axis=0)
    largest, sign = jnp.maximum(highest, -lowest), jnp.where(highest > -lowest, -1.0, 1.0)
    shrinks = jnp.asarray(SHRINKS, jnp.float32)[:, None]
    scale = jnp.maximum(largest[None] * (shrinks / 2 ** (bits - 1)), MIN_SCALE)  # [17, N]
    # Not a pair of casts, which XLA leaves out on GPUs.
    scale = sign[None] * jax.lax.reduce_precision(scale, exponent_bits=8, mantissa_bits=7)

    def add(error: Array, weight: Array):  # [17, N], [N]
        # One weight of every group at a time: XLA:CPU sums along an axis value by value.
        weight = weight[None]
        return error + jnp.square(nearest_codes(weight, scale, bits) * scale - weight), None

    error, _ = jax.lax.scan(add, jnp.zeros_like(scale), groups)
    return jnp.take_along_axis(scale, error.argmin(axis=0)[None], axis=0)[0]


def nearest_codes(groups: Array, scale: Array, bits: int = 4) -> Array:
    """Codes, -8..7 of 4 bits, of the whole multiples of `scale` nearest to `groups`, ties to even.

    A plain rounded quotient would depend on the program: XLA:CPU's division is not correctly
    rounded and quotients of bfloat16 weights often are ties. Products of short scales are exact.
    """
    groups, scale = groups * jnp.sign(scale), jnp.abs(scale)
    low = jnp.floor(groups * (1 / scale))
    above, below = (low + 1) * scale - groups, groups - low * scale
    odd = low - 2 * jnp.floor(low / 2) == 1
    up = (above < below) | ((above == below) & odd)
    half = 2 ** (bits - 1)
    return jnp.clip(jnp.where(up, low + 1, low), -half, half - 1)


def dequantize(weight: Weight) -> Array:  # -> [rows, cols]
    """The matrix that a weight stands for; plain arrays are returned as they are."""
    if isinstance(weight, Float8Tensor):
        return block_values(weight)
    return _dequantize(weight) if isinstance(weight, QTensor) else weight


@jax.jit
def _dequantize(weight: QTensor) -> Array:
    codes = unpack(weight).astype(jnp.float32)
    groups = _grouped(codes, weight.group_size, weight.axis)
    scale = jnp.expand_dims(weight.scale.astype(jnp.float32), weight.axis + 1)
    return (groups * scale).reshape(weight.shape).astype(weight.dtype)


def _grouped(matrix: Array, group_size: int, axis: int) -> Array:
    rows, cols = matrix.shape
    if axis == 0:
        return matrix.reshape(rows // group_size, group_size, cols)
    return matrix.reshape(rows, cols // group_size, group_size)
