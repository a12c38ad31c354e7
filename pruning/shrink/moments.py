"""Second moments of what the linear layers of a decoder layer are given, from real text."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.attention.delta_net import LinearAttention
from moe_jax.attention.grouped import Attention
from moe_jax.attention.latent import LatentAttention
from moe_jax.experts.dense import DenseMLP
from moe_jax.experts.dispatch import gather_rows
from moe_jax.experts.moe import MoE
from moe_jax.experts.run import gated_experts
from moe_jax.linear import linear
from moe_jax.norm import rms_norm
from moe_jax.spread import ALONE, Spread
from moe_jax.transformer import DecoderLayer

Batch = tuple[np.ndarray, Context]  # [B, T, D] on the host, and where the tokens stand
Moments = dict[str, Array]


def _gram(x: Array) -> Array:  # [..., I] -> float32 [I, I]
    x = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
    return jnp.einsum("ri,rj->ij", x, x, precision=jax.lax.Precision.HIGHEST)


AnyAttention = Attention | LatentAttention | LinearAttention


def attention_groups(attention: AnyAttention) -> list[tuple[str, ...]]:
    """Names of an attention's linear weights, together where they share their input."""
    first = ("w_q", "w_k", "w_v", "w_q_down", "w_kv_down")
    groups = [first, ("w_q_up",), ("w_kv_up",), ("w_out",)]
    present = [tuple(n for n in g if getattr(attention, n, None) is not None) for g in groups]
    return [group for group in present if group]


@jax.jit
def attention_moments(layer: DecoderLayer, x: Array, context: Context) -> Moments:
    """Second moments of the inputs of each of `attention_groups`, by its first name."""
    attention = layer.attention
    if isinstance(attention, LinearAttention):  # has none that go to 4 bits
        return {}
    normed = rms_norm(x, layer.attention_norm, layer.norm_eps)
    inputs = attention.w_out.shape[1]
    identity = jnp.eye(inputs, dtype=x.dtype)  # in place of w_out: shows what w_out would be given
    heads = dataclasses.replace(attention, w_out=identity, b_out=None)(normed, context)[0]
    seen = {"w_out": heads}
    if isinstance(attention, LatentAttention):
        eps = attention.config.norm_eps
        latent = linear(normed, attention.w_kv_down, attention.b_kv_down)
        latent = latent[..., : attention.config.kv_rank]
        seen["w_kv_up"] = rms_norm(latent, attention.kv_norm, eps)
        if attention.w_q_down is not None and attention.q_norm is not None:
            narrow = linear(normed, attention.w_q_down, attention.b_q_down)
            seen["w_q_up"] = rms_norm(narrow, attention.q_norm, eps)
    valid = context.valid[..., None]
    return {
        names[0]: _gram(jnp.where(valid, seen.get(names[0], normed), 0))
        for names in attention_groups(attention)
    }


@jax.jit
def dense_moments(layer: DecoderLayer, mlp: DenseMLP, y: Array, context: Context) -> Moments:
    """Second moments of the inputs of a SwiGLU network that every valid token visits."""
    normed = rms_norm(y, layer.mlp_norm, layer.norm_eps)
    x = jnp.where(context.valid[..., None], normed, 0)
    hidden = jax.nn.silu(linear(x, mlp.w_gate)) * linear(x, mlp.w_up)
    return {"w_gate_up": _gram(x), "w_down": _gram(hidden)}


@partial(jax.jit, static_argnames="size")
def expert_moments(
    layer: DecoderLayer, y: Array, context: Context, first: Array, *, size: int
) -> Moments:
    """Second moments of the rows of experts first .. first + size - 1, and their row counts."""
    moe = layer.mlp
    assert isinstance(moe, MoE)
    flat = rms_norm(y, layer.mlp_norm, layer.norm_eps).reshape(-1, y.shape[-1])
    seen = gated_experts(lambda hidden, dispatch: hidden)
    trace = moe(flat, context.valid.reshape(-1), seen)[1]
    d = trace.dispatch
    rows = gather_rows(flat, d, d.copies)

    def per_expert(values: Array) -> Array:  # [P, I] -> [size, I, I]
        tiles = values.reshape(-1, d.tile, values.shape[-1])

        def add(tile: Array, sums: Array) -> Array:
            expert = d.tile_expert[tile] - first
            inside = (expert >= 0) & (expert < size)

            def grow(sums: Array) -> Array:
                return sums.at[expert].add(_gram(tiles[tile]))

            return jax.lax.cond(inside, grow, lambda sums: sums, sums)

        empty = jnp.zeros((size, values.shape[-1], values.shape[-1]))
        return jax.lax.fori_loop(0, d.num_tiles, add, empty)

    tokens = jax.lax.dynamic_slice_in_dim(d.tokens, first, size)
    return {
        "w_gate_up": per_expert(rows),
        "w_down": per_expert(trace.kept.hidden),
        "tokens": tokens,
    }


def total(
    measure: Callable[[Array, Context], Moments], batches: Sequence[Batch], spread: Spread = ALONE
) -> Moments:
    """Sum of what `measure` finds on every batch, of all processes."""
    sums: Moments = {}
    for x, context in batches:
        found = measure(jnp.asarray(x), context)
        sums = found if not sums else {name: sums[name] + found[name] for name in found}
    return sums if spread.processes == 1 else {n: _added_up(v, spread) for n, v in sums.items()}


def _added_up(own: Array, spread: Spread) -> Array:
    """The sum over processes, of many matrices one at a time: in float64 all take twice as much."""
    whole = np.array(own)
    for part in whole if whole.ndim == 3 else [whole]:
        part[...] = spread.total({"sum": part.astype(np.float64)})["sum"]
    return jnp.asarray(whole)
