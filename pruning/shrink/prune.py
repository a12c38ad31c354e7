"""Cutting channels out of a layer, and masking them, which is the same function."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts, channels_per_step, kept_experts
from moe_jax.groups import own_experts
from moe_jax.quant import dequantize
from moe_jax.stream import LayerSource, mapped
from moe_jax.transformer import DecoderLayer
from pruning.budget.plan import PruningPlan


def prune_layer(
    layer: DecoderLayer,
    keep: np.ndarray,
    *,
    width: int,
    rows: int,
    block: int,
    constants: np.ndarray | None = None,
) -> DecoderLayer:
    """Keep the chosen channels: rows of w_gate, w_up and w_down under one index set.

    The biases of gate and up go with their channels. That of the output stays, even in an emptied
    expert: it is added once whatever the channels do, so a mask of channels cannot reach it.

    Args:
      layer: a layer with dense experts of F channels.
      keep: bool [E, F].
      width, rows, block: pool sizes shared by all layers of the model (see `kept_experts`).
      constants: float32 [E, D], what emptied experts add, see `PruningPlan.added`.

    Returns:
      The layer with narrower experts; an emptied expert adds its constant, else zero or its output
      bias; the router is untouched.
    """
    moe = _dense_moe(layer, keep)
    bias = output_bias(moe.experts, keep, constants)
    size = {"width": width, "rows": rows, "block": block}
    experts = kept_experts(moe.experts, keep, **size, down_bias=bias)
    return dataclasses.replace(layer, mlp=dataclasses.replace(moe, experts=experts))


def mask_layer(
    layer: DecoderLayer, keep: np.ndarray, constants: np.ndarray | None = None
) -> DecoderLayer:
    """Zero the removed channels of a dense layer: the specification of `prune_layer`.

    A zero row of w_down is enough: whatever the gate, up and their biases make of the channel is
    multiplied by it.
    """
    moe = _dense_moe(layer, keep)
    experts = moe.experts
    mask = jnp.asarray(keep.reshape(-1, 1))
    masked = {
        name: jnp.where(mask, dequantize(getattr(experts, name)), 0)
        for name in ("w_gate", "w_up", "w_down")
    }
    bias = output_bias(experts, keep, constants)
    experts = dataclasses.replace(experts, **masked, b_down=bias)
    return dataclasses.replace(layer, mlp=dataclasses.replace(moe, experts=experts))


def output_bias(
    experts: Experts, keep: np.ndarray | Array, constants: np.ndarray | Array | None
) -> Array | None:  # [E, D]
    """What each expert adds whatever its channels do.

    Args:
      experts: of the dense model.
      keep: bool [E, F].
      constants: float32 [E, D]; of an emptied expert it stands in the place of the bias.
    """
    bias = experts.b_down
    if constants is None:
        return bias
    dtype = experts.w_down.dtype if bias is None else bias.dtype
    own = jnp.zeros((), dtype) if bias is None else bias
    return jnp.where(keep.any(axis=1, keepdims=True), own, jnp.asarray(constants).astype(dtype))


def cut_router(layer: DecoderLayer, alive: np.ndarray, top_k: int | None = None) -> DecoderLayer:
    """A layer that routes tokens among some experts alone, as if the others' rows of the router,
    and of its biases, were gone.

    Args:
      layer: with experts.
      alive: bool [E], at least as many as a token goes to.
      top_k: experts per token, None for as many as before.
    """
    moe = layer.mlp
    assert isinstance(moe, MoE)
    config = dataclasses.replace(
        moe.config, experts_per_token=top_k or moe.config.experts_per_token
    )
    return dataclasses.replace(
        layer, mlp=dataclasses.replace(moe, alive=jnp.asarray(alive), config=config)
    )


def _dense_moe(layer: DecoderLayer, keep: np.ndarray) -> MoE:
    if not isinstance(layer.mlp, MoE):
        raise InputError("the layer has no experts; prune only the model's expert layers")
    rows = layer.mlp.experts.w_gate.shape[0]
    if rows != keep.size:
        raise InputError(
            f"keep has shape {keep.shape} for {keep.size} channels, the layer has {rows}; the plan "
            "was made for another model"
        )
    return layer.mlp


def PrunedSource(base: LayerSource, plan: PruningPlan, block: int | None = None) -> LayerSource:
    """A model that is pruned layer by layer as it is read.

    Args:
      base: the dense model.
      plan: what each of its layers keeps; layers that it does not name stay as they are.
      block: channels per step of the products, at most; None for `channels_per_step`.

    Returns:
      The source, all of whose pruned layers have pools of one size and share one compilation.
    """
    return mapped(base, lambda index, layer: pruned_layer(index, layer, plan, block), by_group=True)


def pruned_layer(
    index: int, layer: DecoderLayer, plan: PruningPlan, block: int | None = None
) -> DecoderLayer:
    """Layer `index` of `PrunedSource`, or a group of it, from that of the dense model."""
    if index not in plan.layer_indices:
        return layer
    slot = plan.layer_indices.index(index)
    is_moe = isinstance(layer.mlp, MoE)  # others are refused below
    own = own_experts(layer) if is_moe else slice(0, plan.keep.shape[1])
    counts = plan.keep.sum(axis=2)  # [L, E]
    widest = max(1, int(counts.max()))  # a plan may empty every expert
    step = channels_per_step(counts) if block is None else min(block, widest)
    width = -(-widest // step) * step
    groups = np.arange(0, counts.shape[1], own.stop - own.start)
    rows = int(np.add.reduceat(counts, groups, axis=1).max()) + step
    added = plan.added(slot)
    constants = None if added is None else added[own]
    keep = plan.keep[slot, own]
    pruned = prune_layer(layer, keep, width=width, rows=rows, block=step, constants=constants)
    return cut_router(pruned, counts[slot] > 0, plan.top_k) if plan.cut_router else pruned
