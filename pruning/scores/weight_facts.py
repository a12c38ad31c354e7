"""What the weights of a layer's experts say by themselves."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.errors import InputError
from moe_jax.experts.grouped_matmul import float_bits, weight_bits
from moe_jax.experts.moe import MoE
from moe_jax.quant import Weight, dequantize
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer


def slots_of(source: LayerSource) -> dict[int, int]:
    """Place of each layer with experts among these.

    Raises:
      InputError: there is none.
    """
    if not source.config.moe_layers:
        raise InputError("the model has no layer with experts; there is nothing to prune")
    return {layer: slot for slot, layer in enumerate(source.config.moe_layers)}


def weight_facts(layer: DecoderLayer, d_expert: int) -> dict[str, np.ndarray]:
    """Norms and sums of magnitudes of every channel's weights.

    Args:
      layer: with experts.
      d_expert: F.

    Returns:
      `down_norm`, `down_l1` and those of up and gate, float64 [1, E, F].

    Raises:
      InputError: the experts are pruned.
    """
    assert isinstance(layer.mlp, MoE)
    experts = layer.mlp.experts
    if bool(np.any(np.asarray(experts.count) != d_expert)):
        raise InputError(
            f"expert widths {np.asarray(experts.count).tolist()} differ from d_expert={d_expert}; "
            "score the dense model, then plan every budget from its statistics"
        )
    weights = {"down": experts.w_down, "up": experts.w_up, "gate": experts.w_gate}
    found = {}
    for name, weight in weights.items():
        for fact, value in zip(("norm", "l1"), _row_facts(weight, d_expert), strict=True):
            found[f"{name}_{fact}"] = np.asarray(value, np.float64)[None]
    return found


@partial(jax.jit, static_argnames="width")
def _row_facts(weight: Weight, width: int) -> tuple[Array, Array]:
    """Norm and l1 of every row [C, D], float32 [E, width] each; of one expert at a time, because
    XLA:CPU makes the float32 of whole arrays before it adds."""
    bits = weight_bits(dequantize(weight)).reshape(-1, width, weight.shape[1])

    def facts(rows: Array) -> tuple[Array, Array]:
        wide = float_bits(rows).astype(jnp.float32)
        return jnp.sqrt(jnp.sum(jnp.square(wide), axis=-1)), jnp.sum(jnp.abs(wide), axis=-1)

    return jax.lax.map(facts, bits)
