"""Models rounded as they are read: what an export will hold, and what a program makes of it."""

import dataclasses

import jax.numpy as jnp

from moe_jax.experts.moe import MoE
from moe_jax.mxfp4 import round_experts
from moe_jax.quant import dequantize
from moe_jax.quantized import quantize_layer
from moe_jax.stream import LayerSource, mapped
from moe_jax.transformer import DecoderLayer


def QuantizedSource(base: LayerSource, group_size: int, float4: bool = False) -> LayerSource:
    """A model whose layers are rounded to 4 bits as they are read; embedding and head are not.

    Args:
      base: the model.
      group_size: weights per scale.
      float4: round the experts to MXFP4, as float values, instead of all linear layers to integers.

    Returns:
      The source.
    """

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        return round_experts(layer) if float4 else quantize_layer(layer, group_size)

    return mapped(base, change)


def bfloat16_experts(base: LayerSource) -> LayerSource:
    """A model as transformers 5 runs a padded 4-bit folder: dequantised experts in bfloat16."""

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        if not isinstance(layer.mlp, MoE):
            return layer
        experts = layer.mlp.experts
        names = ("w_gate", "w_up", "w_down")
        narrow = {n: dequantize(getattr(experts, n)).astype(jnp.bfloat16) for n in names}
        mlp = dataclasses.replace(layer.mlp, experts=dataclasses.replace(experts, **narrow))
        return dataclasses.replace(layer, mlp=mlp)

    return mapped(base, change)
