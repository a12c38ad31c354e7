"""Decoder layers whose linear weights are rounded to 4 or 8 bits."""

import dataclasses
from collections.abc import Callable, Set
from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.experts.pool import Experts
from moe_jax.float8 import Float8Tensor, float8
from moe_jax.quant import QTensor, Weight, dequantize, is_linear, quantize
from moe_jax.transformer import DecoderLayer

M = TypeVar("M", bound=nnx.Module)
Code = Callable[[Array, int], Weight]  # (a matrix, the axis of its inputs) -> its codes


def quantize_layer(
    layer: DecoderLayer, group_size: int, only: Set[str] | None = None, bits: int = 4
) -> DecoderLayer:
    """Round a layer's linear weights to symmetric integers; router, norms and biases stay.

    Args:
      layer: expert widths are multiples of the group size; `QTensor` weights of no more bits keep
        their codes.
      group_size: weights per scale, along the input of each linear layer.
      only: attribute paths below the layer of the weights to round; default all.
      bits: 4 or 8.

    Returns:
      The layer with `QTensor` weights, scales in float32 so that products are exact.
    """

    def code(weight: Array, axis: int) -> QTensor:
        return quantize(weight, group_size=group_size, axis=axis, dtype=jnp.float32, bits=bits)

    def is_coded(weight: Weight) -> bool:
        return isinstance(weight, QTensor) and weight.bits <= bits

    return _coded(layer, code, is_coded, "", only)


def float8_layer(layer: DecoderLayer, only: Set[str] | None = None) -> DecoderLayer:
    """Round a layer's linear weights to 8-bit floats in blocks of 128 x 128; the rest stays.

    Args:
      layer: expert widths are multiples of 128, so that no block spans two; `Float8Tensor` weights
        keep their codes.
      only: as of `quantize_layer`.

    Returns:
      The layer with `Float8Tensor` weights.
    """
    is_coded = lambda weight: isinstance(weight, Float8Tensor)  # noqa: E731
    return _coded(layer, lambda weight, axis: float8(weight), is_coded, "", only)


@jax.jit
def widened_layer(layer: DecoderLayer) -> DecoderLayer:
    """The layer with every weight as a plain float32 array, as which it computes in float32.

    One program then serves a layer in whatever form it came.
    """

    def widened(leaf: Weight) -> Weight:
        plain = dequantize(leaf)
        return plain.astype(jnp.float32) if jnp.issubdtype(plain.dtype, jnp.floating) else plain

    return jax.tree.map(widened, layer, is_leaf=lambda x: isinstance(x, QTensor | Float8Tensor))


def _coded(
    module: M, code: Code, is_coded: Callable[[Weight], bool], prefix: str, only: Set[str] | None
) -> M:
    coded = {}
    for field in dataclasses.fields(module):  # type: ignore[arg-type]
        value, path = getattr(module, field.name), prefix + field.name
        if isinstance(value, nnx.Module):
            coded[field.name] = _coded(value, code, is_coded, f"{path}.", only)
        elif only is not None and path not in only:
            continue
        elif is_linear(field.name) and value is not None and not is_coded(value):
            # rows of the pool of experts are inputs of w_down
            axis = 0 if isinstance(module, Experts) and field.name == "w_down" else 1
            coded[field.name] = code(dequantize(value), axis)
    return dataclasses.replace(module, **coded)  # type: ignore[type-var]
