"""The linear layer that every other one is made of."""

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.quant import Weight, dequantize


def linear(x: Array, weight: Weight, bias: Array | None = None) -> Array:
    """`x [..., in] @ weight.T + bias` for a weight stored [out, in], in the dtype of `x`."""
    wide = dequantize(weight).astype(x.dtype)
    out = jnp.einsum("...i,oi->...o", x, wide, precision=jax.lax.Precision.HIGHEST)
    if bias is None:
        return out
    return out + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))
