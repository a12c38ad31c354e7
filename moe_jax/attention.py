"""Rotary position embedding and grouped-query attention, with an optional key/value cache."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax import Array

from moe_jax.config import AttentionConfig, RopeConfig
from moe_jax.module import module
from moe_jax.norm import rms_norm
from moe_jax.quant import Weight, dequantize
from moe_jax.softmax_attention import attend


def rope_frequencies(rope: RopeConfig, head_dim: int, max_position: int, length: int):
    """Inverse frequencies and the attention scale of a rotary embedding.

    Args:
      rope: base and context extension.
      head_dim: H; `rope.fraction` of it rotates.
      max_position: context length of the checkpoint's config.
      length: positions in use; only "dynamic" and "longrope" depend on it.

    Returns:
      (float32 numpy [rotated / 2], float scale of cos and sin).

    Source: arXiv:2104.09864; arXiv:2309.00071 (yarn); arXiv:2402.13753 (longrope).
    """
    dim = int(head_dim * rope.fraction)
    exponent = np.arange(0, dim, 2, dtype=np.float32) / dim
    base = np.float32(1.0) / np.float32(rope.theta) ** exponent
    match rope.kind:
        case "default":
            return base, 1.0
        case "linear":
            return base / rope.factor, 1.0
        case "dynamic":
            longest = max(length, max_position)
            grown = rope.factor * longest / max_position - (rope.factor - 1)
            return 1.0 / (rope.theta * grown ** (dim / (dim - 2))) ** exponent, 1.0
        case "yarn":
            return _yarn(rope, base, dim, max_position)
        case "llama3":
            return _llama3(rope, base, max_position), 1.0
        case "longrope":
            return _longrope(rope, exponent, max_position, length)


def _yarn(rope: RopeConfig, base: np.ndarray, dim: int, max_position: int):
    original = rope.original_max_position or max_position

    def pair_with(rotations: float) -> float:  # the pair that turns so often over the context
        turns = original / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    high = high + 0.001 if low == high else high
    slow = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    return base / rope.factor * slow + base * (1 - slow), _yarn_scale(rope)


def _yarn_scale(rope: RopeConfig) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _llama3(rope: RopeConfig, base: np.ndarray, max_position: int) -> np.ndarray:
    original = rope.original_max_position or max_position
    wavelength = 2 * np.pi / base
    smooth = (original / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    blended = (1 - smooth) * base / rope.factor + smooth * base
    slow = np.where(wavelength > original / rope.low_freq_factor, base / rope.factor, blended)
    return np.where(wavelength < original / rope.high_freq_factor, base, slow).astype(np.float32)


def _longrope(rope: RopeConfig, exponent: np.ndarray, max_position: int, length: int):
    original = rope.original_max_position or max_position
    stretch = rope.long_factor if length > original else rope.short_factor
    scale = rope.attention_factor
    if scale is None:
        log_factor = math.log(max(rope.factor, 1.0))
        scale = math.sqrt(1 + log_factor / math.log(original))
    return 1.0 / (np.asarray(stretch, np.float32) * rope.theta**exponent), scale


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
      key, value: [B, S, K, H].
      position: int32 [B, S].
      valid: bool [B, S].
      length: int32 scalar, slots in use.
    """

    key: Array
    value: Array
    position: Array
    valid: Array
    length: Array


def make_context(
    attention: AttentionConfig,
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
        attention.rope, attention.head_dim, max_position, length or valid.shape[1]
    )
    count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    start = jnp.broadcast_to(jnp.asarray(start, jnp.int32), (valid.shape[0],))
    position = start[:, None] + jnp.maximum(count - 1, 0)  # [B, T]
    angle = position.astype(jnp.float32)[..., None] * jnp.asarray(inverse, jnp.float32)[None, None]
    return Context(
        position=position, valid=valid, cos=jnp.cos(angle) * scale, sin=jnp.sin(angle) * scale
    )


def apply_rope(x: Array, context: Context) -> Array:  # [B, T, N, H] -> [B, T, N, H]
    """Rotate the first coordinates of every head; pairs are (i, i + rotated / 2)."""
    half = context.cos.shape[-1]
    cos = context.cos[:, :, None].astype(x.dtype)
    sin = context.sin[:, :, None].astype(x.dtype)
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def linear(x: Array, weight: Weight, bias: Array | None = None) -> Array:
    """`x [..., in] @ weight.T + bias` for a weight stored [out, in], in the dtype of `x`."""
    out = jnp.einsum("...i,oi->...o", x, dequantize(weight).astype(x.dtype))
    if bias is None:
        return out
    return out + jnp.expand_dims(bias.astype(x.dtype), range(x.ndim - 1))


@module
class Attention(nnx.Module):
    """Grouped-query attention; weights as [out, in]."""

    config: AttentionConfig = nnx.static()
    w_q: Weight = nnx.data()  # [N*H, D]
    w_k: Weight = nnx.data()  # [K*H, D]
    w_v: Weight = nnx.data()  # [K*H, D]
    w_out: Weight = nnx.data()  # [D, N*H]
    b_q: Array | None = nnx.data(default=None)  # [N*H]
    b_k: Array | None = nnx.data(default=None)  # [K*H]
    b_v: Array | None = nnx.data(default=None)  # [K*H]
    b_out: Array | None = nnx.data(default=None)  # [D]
    q_norm: Array | None = nnx.data(default=None)  # [H]
    k_norm: Array | None = nnx.data(default=None)  # [H]
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
        q = linear(x, self.w_q, self.b_q).reshape(*lead, c.num_heads, c.head_dim)
        k = linear(x, self.w_k, self.b_k).reshape(*lead, c.num_kv_heads, c.head_dim)
        v = linear(x, self.w_v, self.b_v).reshape(*lead, c.num_kv_heads, c.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = rms_norm(q, self.q_norm, c.norm_eps), rms_norm(k, self.k_norm, c.norm_eps)
        q, k = apply_rope(q, context), apply_rope(k, context)
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
            scale=c.head_dim**-0.5,
            window=self.window,
        )
        return linear(out.reshape(*lead, -1), self.w_out, self.b_out), cache


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


def init_cache(config: AttentionConfig, batch: int, slots: int, dtype) -> KVCache:
    """An empty cache for `batch` sequences of up to `slots` positions."""
    shape = (batch, slots, config.num_kv_heads, config.head_dim)
    return KVCache(
        key=jnp.zeros(shape, dtype),
        value=jnp.zeros(shape, dtype),
        position=jnp.zeros((batch, slots), jnp.int32),
        valid=jnp.zeros((batch, slots), bool),
        length=jnp.zeros((), jnp.int32),
    )
