"""The gated delta rule: a matrix that tokens read, forget and correct, computed chunk by chunk."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

CHUNK = 64  # tokens: products of [CHUNK, CHUNK] against that many reads of the state

_einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
_matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def gated_delta_rule(
    query: Array, key: Array, value: Array, log_decay: Array, strength: Array, state: Array
) -> tuple[Array, Array]:
    """Read a state after each token has corrected what it holds under the token's key.

    Token t turns the state S into S' = exp(g) S, then S' + k (b (v - k S')), and reads q S of that.
    A token with k = 0 or b = 0, and g = 0, leaves the state alone. Axes: K key heads, each shared
    by R value heads; H width of a key, U of a value.

    Args:
      query, key: float32 [B, T, K, H].
      value: float32 [B, T, K, R, U].
      log_decay: g, float32 [B, T, K, R], at most 0.
      strength: b, float32 [B, T, K, R], in [0, 1].
      state: float32 [B, K, R, H, U].

    Returns:
      (float32 [B, T, K, R, U], the state after the last token).

    Source: Gated Delta Networks, arXiv:2412.06464, section 3.
    """
    length = query.shape[1]
    chunk = min(CHUNK, length)
    missing = -length % chunk

    def in_chunks(x: Array) -> Array:  # [B, T, ...] -> [chunks, B, chunk, ...]
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, chunk, *x.shape[2:]), 1, 0)

    tokens = tuple(map(in_chunks, (query, key, value, log_decay, strength)))
    # Without the checkpoint a backward pass would hold the [chunk, chunk] matrices of all chunks.
    state, out = jax.lax.scan(jax.checkpoint(_advance), state, tokens)
    out = jnp.moveaxis(out, 0, 1)
    return out.reshape(out.shape[0], -1, *out.shape[3:])[:, :length], state


def _advance(state: Array, tokens: tuple[Array, ...]) -> tuple[Array, Array]:
    """One chunk: (state before, tokens) -> (state after, what they read).

    With c the sums of the chunk's log decays g, what token i writes under its key is
    u_i = b_i (v_i - exp(c_i) k_i S - sum over j < i of exp(c_i - c_j) (k_i . k_j) u_j), a
    triangular system in u; states and reads are sums over u.
    """
    q, k, v, log_decay, strength = tokens  # [B, C, K, H], same, [B, C, K, R, U], [B, C, K, R], same
    g, b = jnp.moveaxis(log_decay, 1, -1), jnp.moveaxis(strength, 1, -1)  # [B, K, R, C]
    past = jnp.tril(jnp.ones((1, 1, 1, q.shape[1], q.shape[1]), bool))
    # Each sum c_i - c_j by itself: the difference of two sums would lose what one token that
    # forgets all leaves of the digits. Masked before the exponential, whose gradient stays finite.
    later = jnp.tril(past, -1)
    sums = jnp.cumsum(jnp.where(later, g[..., :, None], 0), axis=-2)
    between = jnp.exp(jnp.where(past, sums, -math.inf))  # [B, K, R, C, C]
    since_start = jnp.exp(jnp.cumsum(g, axis=-1))
    predicted = _einsum("bikh,bkrhu->bkriu", k, state) * since_start[..., None]
    wanted = (jnp.moveaxis(v, 1, 3) - predicted) * b[..., None]
    overlap = _einsum("bikh,bjkh->bkij", k, k)[:, :, None] * between * b[..., None]
    written = _einsum("bkrij,bkrju->bkriu", _inverse(overlap), wanted)
    seen = _einsum("bikh,bjkh->bkij", q, k)[:, :, None] * between
    out = _einsum("bikh,bkrhu->bkriu", q, state) * since_start[..., None]
    out = out + _einsum("bkrij,bkrju->bkriu", seen, written)
    kept = written * between[..., -1, :, None]  # until the end of the chunk
    state = state * since_start[..., -1, None, None]
    state = state + _einsum("bjkh,bkrju->bkrhu", k, kept)
    return state, jnp.moveaxis(out, 3, 1)


def _inverse(below: Array) -> Array:
    """Inverse of the identity plus what of `below` [..., C, C] lies below the diagonal.

    Blocks on the diagonal double in size: of two neighbours P and Q with X between them the inverse
    is [[1/P, 0], [-(1/Q) X (1/P), 1/Q]]. It is as exact as substitution, where a product of powers
    of the matrix would be off by binomials if keys repeat; and on a CPU a triangular solver takes
    a hundred times as long for such small matrices.
    """
    size = below.shape[-1]
    lead, at = (1,) * (below.ndim - 2), np.arange(size)
    inverse = jnp.broadcast_to(jnp.eye(size).reshape(*lead, size, size), below.shape)
    half = 1
    while half < size:
        block = at // half
        corner = (block[:, None] == block + 1) & (block % 2 == 0)
        between = jnp.where(corner.reshape(*lead, size, size), below, 0)
        inverse = inverse - _matmul(inverse, _matmul(between, inverse))
        half *= 2
    return inverse
