"""Positions of a batch, and grouped-query attention with an optional key/value cache."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from moe_jax.config import AttentionConfig, LatentAttentionConfig
from moe_jax.module import module
from moe_jax.norm import NormWeight, rms_norm
from moe_jax.quant import Weight, dequantize
from moe_jax.rope import rope_frequencies
from moe_jax.softmax_attention import attend


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


@partial(jax.jit, static_argnames=("attention", "max_position", "length"))
def make_context(
    attention: AttentionConfig | LatentAttentionConfig,
    max_position: int,
    valid: Array,
    start: Array | int = 0,
    length: int | None = None,
) -> Context:
    """Positions and rotations of a batch.

    Args:
      attention: head width and rope.
      max_position: context length of the config.
      valid: bool [B, T]; positions count valid tokens, so left padding shifts nothing.
      start: first position, int or int32 [B].
      length: longest position that will be used (default T), for length-dependent ropes.

    Returns:
      The context.
    """
    inverse, scale = rope_frequencies(
        attention.rope, attention.rope_dim, max_position, length or valid.shape[1]
    )
    count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (valid.shape[0],))
    position = start[:, None] + jnp.maximum(count - 1, 0)  # [B, T]
    angle = position.astype(jnp.float32)[..., None] * jnp.asarray(inverse, jnp.float32)[None, None]
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


def linear(x: Array, weight: Weight, bias: Array | None = None) -> Array:
    """`x [..., in] @ weight.T + bias` for a weight stored [out, in], in the dtype of `x`."""
    wide = dequantize(weight).astype(x.dtype)
    out = jnp.einsum("...i,oi->...o", x, wide, precision=jax.lax.Precision.HIGHEST)
    if bias is None:
        return out
    return out + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))


@module
class Attention(nnx.Module):
    """Grouped-query attention; weights as [out, in]."""

    config: AttentionConfig = nnx.static()
    w_q: Weight = nnx.data()  # [N*H, D], or [N*2H, D] with an output gate
    w_k: Weight = nnx.data()  # [K*H, D]
    w_v: Weight = nnx.data()  # [K*H, D]
    w_out: Weight = nnx.data()  # [D, N*H]
    b_q: Array | None = nnx.data(default=None)  # [N*H], or [N*2H]
    b_k: Array | None = nnx.data(default=None)  # [K*H]
    b_v: Array | None = nnx.data(default=None)  # [K*H]
    b_out: Array | None = nnx.data(default=None)  # [D]
    q_norm: NormWeight | None = nnx.data(default=None)  # [H], or [N*H] if joint
    k_norm: NormWeight | None = nnx.data(default=None)  # [H], or [K*H] if joint
    sinks: Array | None = nnx.data(default=None)  # [N]
    window: int | None = nnx.static(default=None)

    def __call__(self, x: Array, context: Context, cache: KVCache | None = None):
        """Attend causally.

        Args:
          x: [B, T, D], already normalised.
          context: positions of these T tokens.
          cache: earlier keys and values; without it the T tokens attend to each other only.

        Returns:
          ([B, T, D], the updated cache or None).
        """
        c = self.config
        lead = x.shape[:2]
        q, k = linear(x, self.w_q, self.b_q), linear(x, self.w_k, self.b_k)
        v = linear(x, self.w_v, self.b_v)
        gate = None
        if c.output_gate:
            q, gate = jnp.split(q.reshape(*lead, c.num_heads, 2 * c.head_dim), 2, axis=-1)
        if c.joint_qk_norm:
            q, k = self._normed(q, k)
        if c.clip_qkv is not None:
            q, k, v = (jnp.clip(part, -c.clip_qkv, c.clip_qkv) for part in (q, k, v))
        q = q.reshape(*lead, c.num_heads, c.head_dim)
        k, v = (part.reshape(*lead, c.num_kv_heads, c.head_dim) for part in (k, v))
        if not c.joint_qk_norm:
            q, k = self._normed(q, k)
        q, k = apply_rope(q, context), apply_rope(k, context)
        out, cache = attend_with_cache(
            q, k, v, context, cache, scale=c.head_dim**-0.5, window=self.window, sinks=self.sinks
        )
        if gate is not None:
            out = out * jax.nn.sigmoid(gate)
        return linear(out.reshape(*lead, -1), self.w_out, self.b_out), cache

    def _normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        eps = self.config.norm_eps
        return rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)


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


def init_attention(
    config: AttentionConfig,
    d_model: int,
    window: int | None,
    normal: Callable[..., Array],
    norm: Callable[[int], NormWeight],
    out_scale: float,
) -> Attention:
    """Random attention: weights from `normal(*shape, scale=...)`, `norm(size)`, no bias."""
    a, n, k = config, config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    first = normal(2 * n if a.output_gate else n, d_model)
    dtype = first.dtype

    def vector(present: bool, size: int) -> Array | None:
        return jnp.zeros(size, dtype) if present else None

    return Attention(
        w_q=first,
        w_k=normal(k, d_model),
        w_v=normal(k, d_model),
        w_out=normal(d_model, n, scale=out_scale),
        b_q=vector(a.qkv_bias, len(first)),
        b_k=vector(a.qkv_bias, k),
        b_v=vector(a.qkv_bias, k),
        b_out=vector(a.out_bias, d_model),
        q_norm=norm(n if a.joint_qk_norm else a.head_dim) if a.qk_norm else None,
        k_norm=norm(k if a.joint_qk_norm else a.head_dim) if a.qk_norm else None,
        sinks=vector(a.sinks, a.num_heads),
        config=a,
        window=window,
    )
