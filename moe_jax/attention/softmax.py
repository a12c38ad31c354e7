"""Causal softmax attention in blocks of queries, so that no [T, S] array of all heads exists."""

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array

from moe_jax.linear import OUTER_ROWS, outer

# Scores held at a time, elements: 4 MiB in float32. With a quarter of it attention alone is slower
# by a third on a long sequence, more is hardly faster.
BLOCK_SCORES = 1 << 20
# A sequence's blocks fall into at most so many groups; a group meets only the keys up to its end.
# Four save 3/8 of the products of causal attention, and more would lengthen the compilation.
CAUSAL_GROUPS = 4

_einsum = partial(
    jnp.einsum, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
)


def attend(
    q: Array,  # [B, T, N, H]
    k: Array,  # [B, S, K, H]
    v: Array,  # [B, S, K, G]
    *,
    query_position: Array,  # [B, T]
    key_position: Array,  # [B, S]
    key_valid: Array,  # [B, S]
    scale: float,
    window: int | None = None,
    sinks: Array | None = None,  # [N]
    own_keys: bool = False,
) -> Array:  # [B, T, N, G]
    """Let every query see the valid keys at or before its position.

    Scores and their softmax are float32. Small problems are one product; larger ones loop over
    sequences and blocks of queries. The backward pass makes scores again, and none are kept.

    Args:
      q: queries; N is a multiple of K, consecutive heads share a key head.
      k, v: keys and values; the two may differ in width.
      query_position, key_position: int32.
      key_valid: bool; other keys are seen by nobody.
      scale: factor of the scores.
      window: positions a query looks back at most, itself included; None for all.
      sinks: per head, the score of a key that every query sees and whose value is zero.
      own_keys: whether key i is the key of query i, so that no later key needs to be looked at.

    Returns:
      Weighted values in the dtype of `v`.
    """
    batch, length, heads, width = q.shape
    shared = k.shape[2]
    chex.assert_shape(k, (batch, None, shared, width))
    chex.assert_shape(v, (*k.shape[:3], None))
    chex.assert_shape(query_position, (batch, length))
    chex.assert_shape([key_position, key_valid], k.shape[:2])
    size = _block_size(length, BLOCK_SCORES // (heads * k.shape[1]), heads // shared)
    spare = -length % size  # queries that fill the last block and are cut off again
    at = jnp.pad(query_position, ((0, 0), (0, spare)))
    q = _blocks(jnp.pad(q, ((0, 0), (0, spare), (0, 0), (0, 0))), size, shared)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    if sinks is not None:  # one per row of a block: float32 [K, R, 1]
        sinks = jnp.tile(sinks.astype(jnp.float32).reshape(shared, 1, -1), (1, size, 1))
        sinks = sinks.reshape(shared, -1, 1)

    block = partial(_block, repeats=heads // shared, window=window, scale=scale, sinks=sinks)
    rows = q, at.reshape(batch, -1, size), k, v, key_position, key_valid
    if q.shape[1] == 1 and batch * heads * length * k.shape[2] <= BLOCK_SCORES:
        out = jax.vmap(lambda q, at, *keys: block(q[0], at[0], *keys)[None])(*rows)
    else:
        out = jax.lax.map(partial(_sequence, block=block, size=size, own_keys=own_keys), rows)
    return _sequences(out, size, heads)[:, :length]


def _block_size(length: int, most: int, repeats: int) -> int:
    """Queries of a block, `most` or up to a quarter more: where that leaves a choice, so many that
    with `repeats` rows for each their gradients are fast products, and that few are padding."""
    unit = OUTER_ROWS // math.gcd(OUTER_ROWS, repeats)
    if length <= most or most < unit:
        blocks = math.ceil(length / max(1, min(length, most)))
        return math.ceil(length / blocks)  # alike, so that few are padding

    def cost(size: int) -> float:  # a quarter of the size takes a third longer
        return math.ceil(length / size) * size * (1 + most / (8 * size))

    return min(range(unit, most * 5 // 4 + 1, unit), key=cost)


def _block(
    q: Array,  # [K, R, H]
    at: Array,  # [R / repeats]
    k: Array,  # [K, S, H]
    v: Array,  # [K, S, G]
    keys: Array,  # [S]
    valid: Array,  # [S]
    *,
    repeats: int,
    window: int | None,
    scale: float,
    sinks: Array | None,  # [K, R, 1]
) -> Array:  # [K, R, G]
    """One block of queries of one sequence; `repeats` rows have the position of a query."""
    distance = at[:, None] - keys[None]
    seen = (distance >= 0) & valid[None]
    if window is not None:
        seen &= distance < window
    return _weighted_values(q, k, v, jnp.repeat(seen, repeats, axis=0), sinks, scale)


def _sequence(
    row: tuple[Array, ...], *, block: Callable[..., Array], size: int, own_keys: bool
) -> Array:  # [T / size, K, R, G]
    """All blocks of one sequence, of `size` queries each."""
    q, at, k, v, keys, valid = row
    groups = min(CAUSAL_GROUPS, len(q)) if own_keys else 1
    bounds = [len(q) * group // groups for group in range(groups + 1)]
    parts = []
    for first, last in itertools.pairwise(bounds):
        end = last * size
        near = k[:, :end], v[:, :end], keys[:end], valid[:end]
        parts.append(
            jax.lax.map(
                lambda part, near=near: block(*part, *near), (q[first:last], at[first:last])
            )
        )
    return jnp.concatenate(parts)


def _blocks(q: Array, size: int, shared: int) -> Array:
    """Queries [B, T, N, H] as blocks [B, T / size, K, R, H] for one product per key head.

    Its rows R are the block's queries of all heads that share the key head.
    """
    batch, _, heads, width = q.shape
    q = q.reshape(batch, -1, size, shared, heads // shared, width).transpose(0, 1, 3, 2, 4, 5)
    return q.reshape(batch, -1, shared, size * heads // shared, width)


def _sequences(out: Array, size: int, heads: int) -> Array:
    """Undo `_blocks`."""
    batch, _, shared, _, width = out.shape
    out = out.reshape(batch, -1, shared, size, heads // shared, width).transpose(0, 1, 3, 2, 4, 5)
    return out.reshape(batch, -1, heads, width)


def _scored(
    q: Array,  # [K, R, H]
    k: Array,  # [K, S, H]
    seen: Array,  # [R, S]
    sinks: Array | None,  # [K, R, 1]
    scale: float,
) -> tuple[Array, Array, Array]:  # [K, R, S], [K, R, 1], [K, R, 1]
    """Weights of the keys before they are divided by their mass, it, and the sinks' part of it."""
    score = _einsum("krh,ksh->krs", q, k) * scale
    score = jnp.where(seen[None], score, -1e30)
    highest = score.max(axis=-1, keepdims=True)
    highest = highest if sinks is None else jnp.maximum(highest, sinks)
    weight = jnp.exp(score - highest)
    mass = weight.sum(axis=-1, keepdims=True)
    sunk = jnp.zeros_like(mass) if sinks is None else jnp.exp(sinks - highest)
    return weight, mass + sunk, sunk


def _values(
    q: Array,  # [K, R, H]
    k: Array,  # [K, S, H]
    v: Array,  # [K, S, G]
    seen: Array,  # [R, S]
    sinks: Array | None,  # [K, R, 1]
    scale: float,
) -> Array:  # [K, R, G]
    """Softmax attention of a block; its gradient makes the scores again and keeps none."""
    weight, mass, _ = _scored(q, k, seen, sinks, scale)
    # Dividing by the mass afterwards touches fewer elements than a softmax does.
    out = _einsum("krs,ksg->krg", weight.astype(v.dtype), v)
    return (out / mass).astype(v.dtype)


def _values_forward(q, k, v, seen, sinks, scale):
    return _values(q, k, v, seen, sinks, scale), (q, k, v, seen, sinks)


def _values_backward(scale, saved, d_out):
    q, k, v, seen, sinks = saved
    weight, mass, sunk = _scored(q, k, seen, sinks, scale)
    pulled = (d_out.astype(jnp.float32) / mass).astype(v.dtype)
    d_v = jax.vmap(outer)(weight.astype(v.dtype), pulled)
    d_weight = _einsum("krg,ksg->krs", pulled, v)
    d_mass = -jnp.sum(weight * d_weight, axis=-1, keepdims=True) / mass
    d_score = (weight * (d_weight + d_mass) * scale).astype(q.dtype)
    d_q = _einsum("krs,ksh->krh", d_score, k)
    d_k = jax.vmap(outer)(d_score, q)
    d_sinks = None if sinks is None else d_mass * sunk
    return d_q.astype(q.dtype), d_k.astype(k.dtype), d_v.astype(v.dtype), None, d_sinks


# `_values` itself is what runs, so that a gradient can be differentiated again.
_weighted_values: Any = jax.custom_vjp(_values, nondiff_argnums=(5,))
_weighted_values.defvjp(_values_forward, _values_backward)
