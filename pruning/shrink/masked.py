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

from moe_jax.attention.context import Context
from moe_jax.errors import InputError
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.moe import Experts, MoE, run_experts
from moe_jax.quant import dequantize
from moe_jax.stream import LayerSource, contexts, embed, layer_forward, pad_rows
from moe_jax.transformer import DecoderLayer
from pruning.budget.decide import PruningPlan
from pruning.scores.states import row_slices
from pruning.shrink.prune import output_bias


@jax.jit
def masked_forward(
    layer: DecoderLayer,
    x: Array,  # [B, T, D]
    context: Context,
    keep: Array,  # bool [E, F]
    constants: Array | None = None,  # [E, D]
) -> Array:  # [B, T, D]
    """One layer of experts without the channels that are not kept; emptied ones add constants."""

    def run(experts: Experts, tokens: Array, row_weight: Array, dispatch: Dispatch):
        down = dequantize(experts.w_down)
        down = jnp.where(keep.reshape(-1, 1), down, jnp.zeros((), down.dtype))
        bias = output_bias(experts, keep, constants)
        masked = dataclasses.replace(experts, w_down=down, b_down=bias)
        return run_experts(masked, tokens, row_weight, dispatch)

    return layer.feed_forward(layer.attend(x, context)[0], context, run)[0]


def masked_hidden(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    plans: Sequence[PruningPlan],
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
      plans: V plans of this model.
      batch: rows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      [V, B, T, D] on the host.

    Raises:
      InputError: a plan is of another shape than the model's experts.
    """
    rows = len(tokens)
    tokens, valid = pad_rows(tokens, batch), pad_rows(valid, batch)
    places, parts = contexts(source, valid, batch), row_slices(len(tokens), batch)
    first = np.concatenate([embed(source, tokens[part], dtype) for part in parts])
    hidden = np.repeat(first[None], len(plans), axis=0)
    for index in range(len(source)):
        layer = source.layer(index)
        for states, plan in zip(hidden, plans, strict=True):
            masks = _masks(layer, index, plan)
            for part, place in zip(parts, places, strict=True):
                x = jnp.asarray(states[part])
                done = masked_forward(layer, x, place, *masks) if masks else None
                states[part] = layer_forward(layer, x, place) if done is None else done
        if on_layer:
            on_layer(index)
    return hidden[:, :rows]


def _masks(layer: DecoderLayer, index: int, plan: PruningPlan) -> tuple[Array, Array | None] | None:
    if index not in plan.layer_indices:
        return None
    slot = plan.layer_indices.index(index)
    keep = plan.keep[slot]
    rows = layer.mlp.experts.w_down.shape[0] if isinstance(layer.mlp, MoE) else 0
    if rows != keep.size:
        raise InputError(
            f"the plan keeps some of {list(keep.shape)} channels in layer {index}, which has "
            f"{rows}; the plan was made for another model"
        )
    constants = plan.added(slot)
    return jnp.asarray(keep), None if constants is None else jnp.asarray(constants)
