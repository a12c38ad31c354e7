"""Root-mean-square normalisation."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array


@struct.dataclass
class Centred:
    """A norm's scale kept as what it exceeds one by.

    The sum is not kept instead, since its rounding to the weights' dtype could not be undone.

    Attributes:
      offset: [D].
    """

    offset: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the scale."""
        return self.offset.shape


NormWeight = Array | Centred


def rms_norm(
    x: Array, weight: NormWeight, eps: float, dtype: Any = None
) -> Array:  # [..., D], [D] -> [..., D]
    """Scale `x` to unit root mean square, then by `weight`; computed in float32.

    Args:
      x: activations, any float dtype.
      weight: per-coordinate scale.
      eps: added to the mean square.
      dtype: of the result; default that of `x`.

    Returns:
      Array of the shape of `x`.

    Source: arXiv:1910.07467.
    """
    dtype = x.dtype if dtype is None else dtype
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    axes = range(x.ndim - 1)
    # Each kind rounds as its checkpoints were trained: a centred scale multiplies in float32, while
    # with a plain one the product is rounded to the model's dtype before the weight enters.
    if isinstance(weight, Centred):
        gain = jnp.expand_dims(1.0 + weight.offset.astype(jnp.float32), axes)
        return (wide * scale * gain).astype(dtype)
    return (wide * scale).astype(dtype) * jnp.expand_dims(weight.astype(dtype), axes)
