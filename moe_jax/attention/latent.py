"""Multi-head latent attention, with an optional cache of the expanded keys and values."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from moe_jax.attention.context import Context, KVCache, apply_rope, attend_with_cache
from moe_jax.attention.rope import yarn_scale
from moe_jax.config import LatentAttentionConfig
from moe_jax.linear import linear
from moe_jax.module import module
from moe_jax.norm import rms_norm
from moe_jax.quant import Weight


@module
class LatentAttention(nnx.Module):
    """Latent attention; weights as [out, in].

    Axes: Q query rank, C latent width, P plain and R rotated coordinates of a head, U value width.
    """

    config: LatentAttentionConfig = nnx.static()
    w_kv_down: Weight = nnx.data()  # [C+R, D]
    kv_norm: Array = nnx.data()  # [C]
    w_kv_up: Weight = nnx.data()  # [N*(P+U), C]
    w_out: Weight = nnx.data()  # [D, N*U]
    w_q: Weight | None = nnx.data(default=None)  # [N*(P+R), D], without a query rank
    w_q_down: Weight | None = nnx.data(default=None)  # [Q, D]
    q_norm: Array | None = nnx.data(default=None)  # [Q]
    w_q_up: Weight | None = nnx.data(default=None)  # [N*(P+R), Q]
    b_q_down: Array | None = nnx.data(default=None)  # [Q]
    b_kv_down: Array | None = nnx.data(default=None)  # [C+R]
    b_out: Array | None = nnx.data(default=None)  # [D]

    def __call__(self, x: Array, context: Context, cache: KVCache | None = None):
        """Attend causally.

        Args:
          x: [B, T, D], already normalised.
          context: positions of these T tokens.
          cache: earlier keys and values; without it the T tokens attend to each other only.

        Returns:
          ([B, T, D], the updated cache or None).

        Source: DeepSeek-V2, arXiv:2405.04434, section 2.1.
        """
        c = self.config
        lead = (*x.shape[:2], c.num_heads)
        with jax.named_scope("qkv"):
            q = self._queries(x).reshape(*lead, c.key_dim)
            compressed = linear(x, self.w_kv_down, self.b_kv_down)
            latent, k_turned = compressed[..., : c.kv_rank], compressed[..., None, c.kv_rank :]
            expanded = linear(rms_norm(latent, self.kv_norm, c.norm_eps), self.w_kv_up)
            expanded = expanded.reshape(*lead, c.plain_dim + c.value_dim)
        with jax.named_scope("rope"):
            q_turned = apply_rope(q[..., c.plain_dim :], context, interleaved=c.interleaved)
            k_turned = apply_rope(k_turned, context, interleaved=c.interleaved)  # [B, T, 1, R]
            k_turned = jnp.broadcast_to(k_turned, (*lead, c.rope_dim))
            q = jnp.concatenate([q[..., : c.plain_dim], q_turned], axis=-1)
            k = jnp.concatenate([expanded[..., : c.plain_dim], k_turned], axis=-1)
        with jax.named_scope("softmax_attention"):
            v = expanded[..., c.plain_dim :]
            out, cache = attend_with_cache(q, k, v, context, cache, scale=score_scale(c))
        with jax.named_scope("out"):
            return linear(out.reshape(*x.shape[:2], -1), self.w_out, self.b_out), cache

    def _queries(self, x: Array) -> Array:  # [B, T, D] -> [B, T, N*(P+R)]
        if self.w_q is not None:
            return linear(x, self.w_q)
        assert self.w_q_down is not None and self.q_norm is not None and self.w_q_up is not None
        narrow = linear(x, self.w_q_down, self.b_q_down)
        return linear(rms_norm(narrow, self.q_norm, self.config.norm_eps), self.w_q_up)


def score_scale(config: LatentAttentionConfig) -> float:
    """Factor of the attention scores: a longer context sharpens them."""
    rope = config.rope
    scale = config.key_dim**-0.5
    if rope.kind != "default" and rope.mscale_all_dim:
        scale *= yarn_scale(rope.factor, rope.mscale_all_dim) ** 2
    return scale


def init_latent_attention(
    config: LatentAttentionConfig, d_model: int, normal: Callable[..., Array], out_scale: float
) -> LatentAttention:
    """Random latent attention: weights from `normal(*shape, scale=...)`, no bias, plain norms."""
    c, heads = config, config.num_heads
    w_kv_down = normal(c.kv_rank + c.rope_dim, d_model)
    dtype, rank = w_kv_down.dtype, c.query_rank

    def bias(size: int | None) -> Array | None:
        return jnp.zeros(size, dtype) if c.bias and size else None

    return LatentAttention(
        w_q=None if rank else normal(heads * c.key_dim, d_model),
        w_q_down=normal(rank, d_model) if rank else None,
        q_norm=jnp.ones(rank, dtype) if rank else None,
        w_q_up=normal(heads * c.key_dim, rank) if rank else None,
        w_kv_down=w_kv_down,
        kv_norm=jnp.ones(c.kv_rank, dtype),
        w_kv_up=normal(heads * (c.plain_dim + c.value_dim), c.kv_rank),
        w_out=normal(d_model, heads * c.value_dim, scale=out_scale),
        b_q_down=bias(rank),
        b_kv_down=bias(c.kv_rank + c.rope_dim),
        b_out=bias(d_model),
        config=c,
    )
