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
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.experts.run import run_experts
from moe_jax.quant import dequantize
from moe_jax.stream import LayerSource, in_batches, layer_forward, sweep
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan
from pruning.shrink.prune import output_bias

Variants = list[list[np.ndarray]]  # of each plan, an array per batch


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
    text = in_batches(source, tokens, valid, batch)

    def step(index: int, layer: DecoderLayer, variants: Variants) -> Variants:
        for x, plan in zip(variants, plans, strict=True):
            masks = _masks(layer, index, plan)

            def run(x: Array, place: Context, rows: slice, masks=masks) -> Array:
                if masks is None:
                    return layer_forward(layer, x, place)
                return masked_forward(layer, x, place, *masks)

            text.each(x, run)
        return variants

    first = text.embedded(source, dtype)
    last = sweep(source, [list(first) for _ in plans], step, on_layer=on_layer)
    hidden = np.empty((len(plans), *tokens.shape, source.config.d_model), dtype)
    for x, out in zip(last, hidden, strict=True):
        text.joined(x, out)
    return hidden


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
