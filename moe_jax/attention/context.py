"""Where the tokens of a batch stand, and the keys and values of those before them."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import Array

from moe_jax.attention.rope import rope_frequencies
from moe_jax.attention.softmax import attend
from moe_jax.config import AttentionConfig, LatentAttentionConfig


@struct.dataclass
class Context:
    """Where the tokens of a batch stand: shared by all layers.

    Attributes:
      position: int32 [B, T].
      valid: bool [B, T]; padding is False, is attended by nobody and routed nowhere.
      cos, sin: float32 [B, T, rotated / 2].
    """

    position: Array
    valid: Array
    cos: Array
    sin: Array


@struct.dataclass
class KVCache:
    """Keys and values of the positions seen so far.

    Attributes:
      key: [B, S, K, H].
      value: [B, S, K, H], or of another head width under latent attention.
      position: int32 [B, S].
      valid: bool [B, S].
      length: int32 scalar, slots in use.
    """

    key: Array
    value: Array
    position: Array
    valid: Array
    length: Array


@partial(jax.jit, static_argnames=("attention", "max_position", "length", "stride"))
def make_context(
    attention: AttentionConfig | LatentAttentionConfig,
    max_position: int,
    valid: Array,
    start: Array | int = 0,
    length: int | None = None,
    stride: int = 1,
) -> Context:
    """Positions and rotations of a batch.

    Args:
      attention: head width and rope.
      max_position: context length of the config.
      valid: bool [B, T]; positions count valid tokens, so left padding shifts nothing.
      start: first position, int or int32 [B].
      length: positions that will be used (default those of T tokens), for length-dependent ropes.
      stride: positions from a token to the next as rotations have it: a few tokens then turn as
        those of a long text do. Masks see tokens beside each other all the same.

    Returns:
      The context.
    """
    reach = length or stride * (valid.shape[1] - 1) + 1
    inverse, scale = rope_frequencies(attention.rope, attention.rope_dim, max_position, reach)
    count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (valid.shape[0],))
    position = start[:, None] + jnp.maximum(count - 1, 0)  # [B, T]
    turned = (stride * position).astype(jnp.float32)
    angle = turned[..., None] * jnp.asarray(inverse, jnp.float32)[None, None]
    return Context(
        position=position, valid=valid, cos=jnp.cos(angle) * scale, sin=jnp.sin(angle) * scale
    )


def apply_rope(
    x: Array, context: Context, *, interleaved: bool = False
) -> Array:  # [B, T, N, H] -> [B, T, N, H]
    """Rotate the first coordinates of every head; pairs are (i, i + rotated / 2).

    If `interleaved`, pairs are (2i, 2i + 1) of `x` and lie as the others do in the result: queries
    and keys are permuted alike, which no score can tell.
    """
    half = context.cos.shape[-1]
    cos = context.cos[:, :, None].astype(x.dtype)
    sin = context.sin[:, :, None].astype(x.dtype)
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = turning[..., :half], turning[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def attend_with_cache(
    q: Array,
    k: Array,
    v: Array,
    context: Context,
    cache: KVCache | None,
    *,
    scale: float,
    window: int | None = None,
    sinks: Array | None = None,
) -> tuple[Array, KVCache | None]:
    """Attend to these tokens and those in the cache, which they join.

    Args:
      q, k, v: [B, T, heads, width], see `softmax_attention.attend`.
      context: positions of the T tokens.
      cache: earlier keys and values, or None.
      scale, window, sinks: see `softmax_attention.attend`.

    Returns:
      ([B, T, N, width of v], the updated cache or None).
    """
    position, valid = context.position, context.valid
    if cache is not None:
        cache = _extend(cache, k, v, context)
        k, v, position, valid = cache.key, cache.value, cache.position, cache.valid
    out = attend(
        q,
        k,
        v,
        query_position=context.position,
        key_position=position,
        key_valid=valid,
        scale=scale,
        window=window,
        sinks=sinks,
        own_keys=cache is None,
    )
    return out, cache


def _extend(cache: KVCache, k: Array, v: Array, context: Context) -> KVCache:
    start = cache.length
    put = jax.lax.dynamic_update_slice_in_dim
    return KVCache(
        key=put(cache.key, k.astype(cache.key.dtype), start, 1),
        value=put(cache.value, v.astype(cache.value.dtype), start, 1),
        position=put(cache.position, context.position, start, 1),
        valid=put(cache.valid, context.valid, start, 1),
        length=start + k.shape[1],
    )


def init_cache(
    config: AttentionConfig | LatentAttentionConfig, batch: int, slots: int, dtype
) -> KVCache:
    """An empty cache for `batch` sequences of up to `slots` positions."""
    shape = (batch, slots, config.num_kv_heads)
    return KVCache(
        key=jnp.zeros((*shape, config.key_dim), dtype),
        value=jnp.zeros((*shape, config.value_dim), dtype),
        position=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )
