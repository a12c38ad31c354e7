"""Grouped-query attention with an optional key/value cache."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.attention.context import Context, KVCache, apply_rope, attend_with_cache
from moe_jax.config import AttentionConfig
from moe_jax.linear import linear
from moe_jax.module import module
from moe_jax.norm import NormWeight, rms_norm
from moe_jax.quant import Weight


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
        c, lead = self.config, x.shape[:2]
        with jax.named_scope("qkv"):
            q, k, v, gate = self._projected(x)
        with jax.named_scope("rope"):
            q, k = apply_rope(q, context), apply_rope(k, context)
        with jax.named_scope("softmax_attention"):
            out, cache = attend_with_cache(
                q, k, v, context, cache,
                scale=c.head_dim**-0.5, window=self.window, sinks=self.sinks,
            )  # fmt: skip
        with jax.named_scope("out"):
            if gate is not None:
                out = out * jax.nn.sigmoid(gate)
            return linear(out.reshape(*lead, -1), self.w_out, self.b_out), cache

    def _projected(self, x: Array) -> tuple[Array, Array, Array, Array | None]:
        """Queries [B, T, N, H], keys and values [B, T, K, H], gates of the output if there are."""
        c, lead = self.config, x.shape[:2]
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
        return q, k, v, gate

    def _normed(self, q: Array, k: Array) -> tuple[Array, Array]:
        if self.q_norm is None or self.k_norm is None:
            return q, k
        eps = self.config.norm_eps
        return rms_norm(q, self.q_norm, eps), rms_norm(k, self.k_norm, eps)


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
