"""Models rounded as they are read: what an export will hold, and what a program makes of it."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from moe_jax.experts.moe import MoE
from moe_jax.mxfp4 import round_experts
from moe_jax.quant import dequantize
from moe_jax.quantized import quantize_layer
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer, Embedding, Head


@dataclass(frozen=True)
class _Rounded:
    """Another `LayerSource` whose layers are to be rounded."""

    base: LayerSource

    @property
    def config(self):
        """The architecture of the base model."""
        return self.base.config

    @property
    def embedding(self) -> Embedding:
        """The base model's embedding, not rounded."""
        return self.base.embedding

    @property
    def head(self) -> Head:
        """The base model's head, not rounded."""
        return self.base.head

    def __len__(self) -> int:
        return len(self.base)


@dataclass(frozen=True)
class QuantizedSource(_Rounded):
    """A `LayerSource` that rounds the layers of another one to 4 bits.

    Attributes:
      group_size: weights per scale.
      float4: round the experts to MXFP4, as float values, instead of all linear layers to integers.
    """

    group_size: int
    float4: bool = False

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` with 4-bit weights."""
        layer = self.base.layer(index)
        return round_experts(layer) if self.float4 else quantize_layer(layer, self.group_size)


@dataclass(frozen=True)
class RoundedExperts(_Rounded):
    """A model as transformers 5 runs a padded 4-bit folder: dequantised experts in bfloat16."""

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` with rounded experts."""
        layer = self.base.layer(index)
        if not isinstance(layer.mlp, MoE):
            return layer
        experts = layer.mlp.experts
        names = ("w_gate", "w_up", "w_down")
        narrow = {n: dequantize(getattr(experts, n)).astype(jnp.bfloat16) for n in names}
        mlp = dataclasses.replace(layer.mlp, experts=dataclasses.replace(experts, **narrow))
        return dataclasses.replace(layer, mlp=mlp)
