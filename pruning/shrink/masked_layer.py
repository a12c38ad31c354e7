"""One layer without the channels that a plan removes: a mask, and no new weights."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.experts.run import run_experts
from moe_jax.groups import Halfway, added_group
from moe_jax.quant import dequantize
from moe_jax.transformer import DecoderLayer
from pruning.shrink.fewer_experts import fewer_rows
from pruning.shrink.prune import output_bias


@jax.jit
def masked_forward(
    layer: DecoderLayer,
    x: Array,  # [B, T, D]
    context: Context,
    keep: Array,  # bool [E, F]
    constants: Array | None = None,  # [E, D]
    fewer: tuple[Array, Array] | None = None,
) -> tuple[Array, Array | None]:  # [B, T, D]
    """One layer of experts without the channels that are not kept; emptied ones add constants.

    With the numbers of a `Fewer` tokens go to fewer experts, and how many these are in all, int32,
    is returned as well.
    """
    assert isinstance(layer.mlp, MoE)
    run = _masking(keep, constants, fewer, renormalize=layer.mlp.config.renormalize)
    out, trace = layer.feed_forward(layer.attend(x, context)[0], context, run)
    assert trace is not None
    return out, trace.kept


@jax.jit
def masked_group(
    group: DecoderLayer,
    halfway: Halfway,
    context: Context,
    keep: Array,  # bool [g, F]
    constants: Array | None = None,  # [g, D]
) -> Array:  # float32 [B, T, D]
    """The same of a group, whose experts are added to those before them; tokens go to all."""
    run = _masking(keep, constants)
    return added_group(group, halfway, context, run).routed.reshape(halfway.routed.shape)


def _masking(
    keep: Array,
    constants: Array | None,
    fewer: tuple[Array, Array] | None = None,
    *,
    renormalize: bool = False,
) -> Callable[..., tuple[Array, Array | None]]:
    def run(
        experts: Experts,
        tokens: Array,
        row_weight: Array,
        dispatch: Dispatch,
        onto: Array | None = None,
    ):
        down = dequantize(experts.w_down)
        down = jnp.where(keep.reshape(-1, 1), down, jnp.zeros((), down.dtype))
        bias = output_bias(experts, keep, constants)
        masked, left = dataclasses.replace(experts, w_down=down, b_down=bias), None
        if fewer is not None:
            row_weight, left = fewer_rows(
                row_weight, dispatch, len(tokens), fewer, renormalize=renormalize
            )
        return run_experts(masked, tokens, row_weight, dispatch, onto=onto)[0], left

    return run
