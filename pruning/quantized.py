"""A model whose linear layers are rounded to 4 bits as they are read: what an export will hold."""

from dataclasses import dataclass

from moe_jax.mxfp4 import round_experts
from moe_jax.quantized import quantize_layer
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer, Embedding, Head


@dataclass(frozen=True)
class QuantizedSource:
    """A `LayerSource` that rounds the layers of another one to 4 bits.

    Attributes:
      base: the other one.
      group_size: weights per scale.
      float4: round the experts to MXFP4, as float values, instead of all linear layers to integers.
    """

    base: LayerSource
    group_size: int
    float4: bool = False

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

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` with 4-bit weights."""
        layer = self.base.layer(index)
        return round_experts(layer) if self.float4 else quantize_layer(layer, self.group_size)
