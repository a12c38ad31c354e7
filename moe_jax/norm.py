"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from jax import Array


def rms_norm(x: Array, weight: Array, eps: float) -> Array:  # [..., D], [D] -> [..., D]
    """Scale `x` to unit root mean square, then by `weight`; computed in float32.

    Args:
      x: activations, any float dtype.
      weight: per-coordinate scale.
      eps: added to the mean square.

    Returns:
      Array of the shape and dtype of `x`.

    Source: arXiv:1910.07467.
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    # The product is rounded to the model's dtype before the weight enters, as the
    # checkpoints were trained.
    weight = jnp.expand_dims(weight.astype(x.dtype), range(x.ndim - 1))
    return (wide * scale).astype(x.dtype) * weight
