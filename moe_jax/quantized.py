"""Decoder layers whose linear weights are rounded to 4 bits."""

import dataclasses
from collections.abc import Set
from typing import TypeVar

import jax.numpy as jnp
from flax import nnx

from moe_jax.experts.pool import Experts
from moe_jax.quant import QTensor, is_linear, quantize
from moe_jax.transformer import DecoderLayer

M = TypeVar("M", bound=nnx.Module)


def quantize_layer(
    layer: DecoderLayer, group_size: int, only: Set[str] | None = None
) -> DecoderLayer:
    """Round a layer's linear weights to symmetric int4; router, norms and biases stay.

    Args:
      layer: with 16- or 32-bit weights, or already in 4 bits; expert widths are multiples of the
        group size.
      group_size: weights per scale, along the input of each linear layer.
      only: attribute paths below the layer of the weights to round; default all.

    Returns:
      The layer with `QTensor` weights, scales in float32 so that products are exact.
    """
    return _quantize(layer, group_size, "", only)


def _quantize(module: M, group_size: int, prefix: str, only: Set[str] | None) -> M:
    packed = {}
    for field in dataclasses.fields(module):  # type: ignore[arg-type]
        value, path = getattr(module, field.name), prefix + field.name
        if isinstance(value, nnx.Module):
            packed[field.name] = _quantize(value, group_size, f"{path}.", only)
        elif only is not None and path not in only:
            continue
        elif is_linear(field.name) and value is not None and not isinstance(value, QTensor):
            # rows of the pool of experts are inputs of w_down
            axis = 0 if isinstance(module, Experts) and field.name == "w_down" else 1
            packed[field.name] = quantize(
                value, group_size=group_size, axis=axis, dtype=jnp.float32
            )
    return dataclasses.replace(module, **packed)  # type: ignore[type-var]
