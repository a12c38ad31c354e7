"""Four-bit floats in blocks that share a power of two (MXFP4).

Source: OCP Microscaling Formats specification 1.0; the choice between two scales is ours.
"""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.experts.moe import MoE
from moe_jax.quant import dequantize
from moe_jax.transformer import DecoderLayer

BLOCK = 32
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of the codes 0..7; 8..15 are negative
# Code i goes up to the middle between its neighbour and itself; a tie goes to the even code.
_MIDDLES = tuple((low + high) / 2 for low, high in itertools.pairwise(MAGNITUDES))
LEAST, MOST = -126, 124  # exponents whose powers, and inverse powers, are normal floats


@partial(jax.jit, static_argnames="axis")
def block_codes(weight: Array, axis: int) -> tuple[Array, Array]:
    """Nearest codes of every block, under the better of two scales.

    The scales are the largest that keeps the block's largest weight above 4 and the one above it,
    which clips nothing; the one with less squared error wins, the smaller if they are equal. So a
    weight that already is a multiple of such codes keeps its value.

    Args:
      weight: float [rows, columns], a multiple of 32 along `axis`.
      axis: 0 or 1, along which blocks lie.

    Returns:
      (codes uint8, exponent int32): codes as `weight` with the axis split into [blocks, 32],
      exponents the same without the 32. A block of zeros has exponent 0.
    """
    shape = (*weight.shape[:axis], -1, BLOCK, *weight.shape[axis + 1 :])
    blocks = weight.astype(jnp.float32).reshape(shape)
    largest = jnp.max(jnp.abs(blocks), axis=axis + 1, keepdims=True)
    bits = jax.lax.bitcast_convert_type(largest, jnp.int32)
    exponent = jnp.where(largest > 0, (bits >> 23) - 127 - 2, 0)
    small, large = (jnp.clip(exponent + step, LEAST, MOST) for step in (0, 1))
    first, second = _codes(blocks, small), _codes(blocks, large)
    scaled = blocks * _power(-small)  # squares of large weights would overflow
    errors = [
        jnp.sum(jnp.square(_values(codes, e - small) - scaled), axis=axis + 1, keepdims=True)
        for codes, e in ((first, small), (second, large))
    ]
    grow = errors[1] < errors[0]
    chosen = jnp.where(grow, large, small)
    return jnp.where(grow, second, first), jnp.squeeze(chosen, axis + 1)


def _power(exponent: Array) -> Array:  # exp2 rounds; this is exact
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)


def _codes(blocks: Array, exponent: Array) -> Array:
    scaled = blocks * _power(-exponent)
    magnitude = jnp.abs(scaled)
    codes = jnp.zeros(blocks.shape, jnp.uint8)
    for code, middle in enumerate(_MIDDLES):
        above = magnitude >= middle if code % 2 else magnitude > middle
        codes += above.astype(jnp.uint8)
    return jnp.where((scaled < 0) & (codes > 0), codes + jnp.uint8(8), codes)


def _values(codes: Array, exponent: Array) -> Array:  # float32
    table = jnp.asarray([*MAGNITUDES, *(-value for value in MAGNITUDES)], jnp.float32)
    return table[codes] * _power(exponent)


@partial(jax.jit, static_argnames="axis")
def rounded(weight: Array, axis: int) -> Array:
    """A weight [rows, columns] with every block along `axis` rounded, in its dtype."""
    spare = -weight.shape[axis] % BLOCK
    padded = jnp.pad(weight, [(0, spare if axis == i else 0) for i in range(2)])
    codes, exponent = block_codes(padded, axis)
    values = _values(codes, jnp.expand_dims(exponent, axis + 1)).reshape(padded.shape)
    return values[: weight.shape[0], : weight.shape[1]].astype(weight.dtype)


def round_experts(layer: DecoderLayer) -> DecoderLayer:
    """Round the three matrices of a layer's experts, along their inputs; the rest stays.

    Args:
      layer: expert widths are multiples of 32, so that no block spans two experts.
    """
    if not isinstance(layer.mlp, MoE):
        return layer
    experts = layer.mlp.experts
    found = {
        name: rounded(dequantize(getattr(experts, name)), axis)
        for name, axis in (("w_gate", 1), ("w_up", 1), ("w_down", 0))
    }
    experts = dataclasses.replace(experts, **found)
    return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))
