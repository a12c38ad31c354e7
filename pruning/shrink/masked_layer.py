"""One layer without the channels that a plan removes, in arrays of one shape for all plans."""

from collections.abc import Callable
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import STEPS, Experts
from moe_jax.experts.run import run_experts
from moe_jax.groups import Halfway, added_group
from moe_jax.quant import Weight, dequantize
from moe_jax.transformer import DecoderLayer
from pruning.shrink.fewer_experts import fewer_rows
from pruning.shrink.prune import output_bias

SHARES = 8  # of an expert's channels: steps that all of them take at least


@jax.jit
def masked_layer(
    layer: DecoderLayer,
    keep: Array,  # bool [E, F]
    constants: Array | None = None,  # [E, D]
) -> DecoderLayer:
    """A layer, or a group of one, whose experts run the channels that are kept; emptied ones add
    constants.

    The pools are as large as before, with the channels that are gone behind all others. So every
    mask has the same programs, and only takes the time of what it keeps.
    """
    assert isinstance(layer.mlp, MoE)
    experts, (_, width) = layer.mlp.experts, keep.shape
    block = next((step for step in STEPS if step <= width // SHARES), min(width, STEPS[-1]))
    order = jnp.argsort(~keep.reshape(-1), stable=True)
    order = jnp.pad(order, (0, block))  # a step may begin at the last channel

    def rows(pool: Weight | None) -> Array | None:
        return None if pool is None else dequantize(pool)[order]

    kept = replace(
        experts,
        w_gate=rows(experts.w_gate), w_up=rows(experts.w_up), w_down=rows(experts.w_down),
        b_gate=rows(experts.b_gate), b_up=rows(experts.b_up),
        b_down=output_bias(experts, keep, constants),
        count=keep.sum(axis=1, dtype=jnp.int32), width=-(-width // block) * block, block=block,
    )  # fmt: skip
    return replace(layer, mlp=replace(layer.mlp, experts=kept))


@jax.jit
def masked_forward(
    layer: DecoderLayer,
    x: Array,  # [B, T, D]
    context: Context,
    fewer: tuple[Array, Array] | None = None,
) -> tuple[Array, Array | None]:  # [B, T, D]
    """A `masked_layer` on a batch.

    With the numbers of a `Fewer` tokens go to fewer experts, and how many these are in all, int32,
    is returned as well.
    """
    assert isinstance(layer.mlp, MoE)
    run = _running(fewer, renormalize=layer.mlp.config.renormalize)
    out, trace = layer.feed_forward(layer.attend(x, context)[0], context, run)
    assert trace is not None
    return out, trace.kept


@jax.jit
def masked_group(group: DecoderLayer, halfway: Halfway, context: Context) -> Array:
    """The same of a group, float32 [B, T, D], whose experts are added to those before them; tokens
    go to all."""
    return added_group(group, halfway, context).routed.reshape(halfway.routed.shape)


def _running(
    fewer: tuple[Array, Array] | None, *, renormalize: bool
) -> Callable[..., tuple[Array, Array | None]]:
    def run(experts: Experts, tokens: Array, row_weight: Array, dispatch: Dispatch):
        left = None
        if fewer is not None:
            row_weight, left = fewer_rows(
                row_weight, dispatch, len(tokens), fewer, renormalize=renormalize
            )
        return run_experts(experts, tokens, row_weight, dispatch)[0], left

    return run
