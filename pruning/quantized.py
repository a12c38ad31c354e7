"""A model whose linear layers are rounded to 4 bits as they are read: what an export will hold."""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from moe_jax.moe import DenseMLP, MoE
from moe_jax.quant import QTensor, quantize
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer, Embedding, Head


def quantize_layer(layer: DecoderLayer, group_size: int) -> DecoderLayer:
    """Round a layer's linear weights to symmetric int4; router, norms and biases stay.

    Args:
      layer: with 16- or 32-bit weights; expert widths are multiples of the group size.
      group_size: weights per scale, along the input of each linear layer.

    Returns:
      The layer with `QTensor` weights, scales in float32 so that products are exact.
    """

    def pack(weight, axis: int = 1) -> QTensor:
        return quantize(weight, group_size=group_size, axis=axis, dtype=jnp.float32)

    def pack_mlp(mlp: DenseMLP) -> DenseMLP:
        return DenseMLP(w_gate=pack(mlp.w_gate), w_up=pack(mlp.w_up), w_down=pack(mlp.w_down))

    attention = dataclasses.replace(
        layer.attention,
        **{name: pack(getattr(layer.attention, name)) for name in ("w_q", "w_k", "w_v", "w_out")},
    )
    if isinstance(layer.mlp, MoE):
        experts, shared = layer.mlp.experts, layer.mlp.shared
        experts = dataclasses.replace(
            experts,
            w_gate=pack(experts.w_gate),
            w_up=pack(experts.w_up),
            w_down=pack(experts.w_down, axis=0),  # rows of the pool are inputs of w_down
        )
        if shared is not None:
            shared = dataclasses.replace(shared, mlp=pack_mlp(shared.mlp))
        mlp = dataclasses.replace(layer.mlp, experts=experts, shared=shared)
    else:
        mlp = pack_mlp(layer.mlp)
    return dataclasses.replace(layer, attention=attention, mlp=mlp)


@dataclass(frozen=True)
class QuantizedSource:
    """A `LayerSource` that rounds the layers of another one to 4 bits."""

    base: LayerSource
    group_size: int

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
        return quantize_layer(self.base.layer(index), self.group_size)
