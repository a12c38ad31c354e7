"""Many pruning plans of one model, run masked: no pruned weights are made, each layer is read once.

A removed channel is a zero row of `w_down`: the same function as cutting it out (`prune_layer`).
The mask is an argument, so all plans share one compilation.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention import Context
from moe_jax.expert_weights import routing_matrix
from moe_jax.grouped_matmul import Dispatch
from moe_jax.moe import Experts, MoE, run_experts
from moe_jax.quant import dequantize
from moe_jax.stream import LayerSource, contexts, embed, layer_forward, pad_rows
from moe_jax.transformer import DecoderLayer
from pruning.plan import PruningPlan
from pruning.states import row_slices


@dataclasses.dataclass(frozen=True, eq=False)
class Variant:
    """A plan, and what an expert's output is replaced by.

    Attributes:
      plan: what stays.
      constants: float [L, E, D], added with the routing weight to the output of each expert; zero
        for experts that stay. See `pruning.expert_drop.replacement_vectors`.
    """

    plan: PruningPlan
    constants: np.ndarray | None = None


@jax.jit
def masked_forward(
    layer: DecoderLayer,
    x: Array,  # [B, T, D]
    context: Context,
    keep: Array,  # bool [E, F]
    constants: Array | None = None,  # [E, D]
) -> Array:  # [B, T, D]
    """One layer of experts without the channels that are not kept."""

    def run(experts: Experts, tokens: Array, row_weight: Array, dispatch: Dispatch):
        down = dequantize(experts.w_down)
        down = jnp.where(keep.reshape(-1, 1), down, jnp.zeros((), down.dtype))
        masked = dataclasses.replace(experts, w_down=down)
        if constants is not None and experts.b_down is not None:  # constants include the bias
            bias = jnp.where(keep.any(axis=1, keepdims=True), experts.b_down, 0)
            masked = dataclasses.replace(masked, b_down=bias)
        out, kept = run_experts(masked, tokens, row_weight, dispatch)
        if constants is not None:
            weight = routing_matrix(row_weight, dispatch, len(tokens))
            out = out + (weight @ constants.astype(jnp.float32)).astype(out.dtype)
        return out, kept

    return layer.feed_forward(layer.attend(x, context)[0], context, run)[0]


def masked_hidden(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    variants: Sequence[Variant],
    *,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Hidden states before the head of several pruned models.

    Args:
      source: the dense model; every layer is read once.
      tokens: int32 [B, T].
      valid: bool [B, T].
      variants: V plans of this model.
      batch: rows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      [V, B, T, D] on the host.

    Raises:
      ValueError: a plan is of another shape than the model's experts.
    """
    rows = len(tokens)
    tokens, valid = pad_rows(tokens, batch), pad_rows(valid, batch)
    places, parts = contexts(source, valid, batch), row_slices(len(tokens), batch)
    first = np.concatenate([embed(source, tokens[part], dtype) for part in parts])
    hidden = np.repeat(first[None], len(variants), axis=0)
    for index in range(len(source)):
        layer = source.layer(index)
        for states, variant in zip(hidden, variants, strict=True):
            masks = _masks(layer, index, variant)
            for part, place in zip(parts, places, strict=True):
                x = jnp.asarray(states[part])
                done = masked_forward(layer, x, place, *masks) if masks else None
                states[part] = layer_forward(layer, x, place) if done is None else done
        if on_layer:
            on_layer(index)
    return hidden[:, :rows]


def _masks(layer: DecoderLayer, index: int, variant: Variant) -> tuple[Array, Array | None] | None:
    plan = variant.plan
    if index not in plan.layer_indices:
        return None
    slot = plan.layer_indices.index(index)
    keep = plan.keep[slot]
    rows = layer.mlp.experts.w_down.shape[0] if isinstance(layer.mlp, MoE) else 0
    if rows != keep.size:
        raise ValueError(
            f"the plan keeps some of {list(keep.shape)} channels in layer {index}, which has "
            f"{rows}; the plan was made for another model"
        )
    added = None if variant.constants is None else jnp.asarray(variant.constants[slot], jnp.float32)
    return jnp.asarray(keep), added
