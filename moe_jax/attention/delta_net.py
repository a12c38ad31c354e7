"""Gated DeltaNet: linear attention with a short convolution, and the state it decodes from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.attention.delta_rule import gated_delta_rule
from moe_jax.config import LinearAttentionConfig
from moe_jax.linear import linear
from moe_jax.module import module
from moe_jax.norm import rms_norm

_LENGTH_EPS = 1e-6  # added to the squared length of queries and keys


@struct.dataclass
class LinearCache:
    """All that linear attention keeps of the positions seen so far.

    Attributes:
      window: [B, conv_width - 1, channels], the convolution's last inputs.
      state: float32 [B, K, R, H, U].
    """

    window: Array
    state: Array


@module
class LinearAttention(nnx.Module):
    """Gated DeltaNet; weights as [out, in].

    Axes: K key heads of width H, each shared by R value heads of width U. No field is named as the
    linear layers that go to 4 bits are: a state adds up rounding errors over the whole text, and
    the recipes for vLLM leave these matrices in 16 bits too.
    """

    config: LinearAttentionConfig = nnx.static()
    in_qkvz: Array = nnx.data()  # [K*(2H+2RU), D]: of each key head its q, k, values and gates
    in_ba: Array = nnx.data()  # [K*2R, D]: of each key head its strengths and time steps
    convolution: Array = nnx.data()  # [2KH+KRU, 1, width], of all queries, all keys, all values
    log_rate: Array = nnx.data()  # [K*R]
    time_bias: Array = nnx.data()  # [K*R]
    out_norm: Array = nnx.data()  # [U]
    out: Array = nnx.data()  # [D, K*R*U]

    def __call__(self, x: Array, context: Context, cache: LinearCache | None = None):
        """Attend causally.

        Args:
          x: [B, T, D], already normalised.
          context: which of these T tokens are padding; that counts as zeros for the convolution and
            leaves the state alone.
          cache: what is kept of earlier tokens; without it the T tokens are the first.

        Returns:
          ([B, T, D], the updated cache or None).

        Source: Gated Delta Networks, arXiv:2412.06464.
        """
        c, valid = self.config, context.valid
        x = jnp.where(valid[..., None], x, 0)
        with jax.named_scope("qkv"):
            mixed, gate = self._projected(x)
        start = init_linear_cache(c, x.shape[0], x.dtype) if cache is None else cache
        with jax.named_scope("convolution"):
            inputs = jnp.concatenate([start.window.astype(x.dtype), mixed], axis=1)
            q, k, v = self._heads(jax.nn.silu(self._convolved(inputs)))
        with jax.named_scope("rates"):
            log_decay, strength = self._rates(x, valid)
        with jax.named_scope("delta_rule"):
            read, state = gated_delta_rule(q, k, v, log_decay, strength, start.state)
        with jax.named_scope("out"):
            read = rms_norm(read.astype(x.dtype), self.out_norm, c.norm_eps).astype(jnp.float32)
            gated = (read * jax.nn.silu(gate.astype(jnp.float32))).astype(x.dtype)
            out = linear(gated.reshape(*x.shape[:2], -1), self.out)
        if cache is None:
            return out, None
        window = inputs[:, inputs.shape[1] - c.conv_width + 1 :]
        return out, LinearCache(window=window.astype(cache.window.dtype), state=state)

    def _projected(self, x: Array) -> tuple[Array, Array]:
        """Inputs of the convolution [B, T, channels] and gates of the output [B, T, K, R, U]."""
        c, lead = self.config, x.shape[:2]
        values = c.values_per_key * c.value_dim
        by_head = linear(x, self.in_qkvz).reshape(*lead, c.num_key_heads, -1)
        ends = (c.key_dim, 2 * c.key_dim, 2 * c.key_dim + values)
        *mixed, gate = jnp.split(by_head, ends, axis=-1)
        mixed = jnp.concatenate([part.reshape(*lead, -1) for part in mixed], axis=-1)
        return mixed, gate.reshape(*lead, c.num_key_heads, c.values_per_key, c.value_dim)

    def _convolved(
        self, inputs: Array
    ) -> Array:  # [B, T + width - 1, channels] -> [B, T, channels]
        width = self.config.conv_width
        length = inputs.shape[1] - width + 1
        taps = self.convolution[:, 0].T.astype(jnp.float32)[:, None, None]
        wide = inputs.astype(jnp.float32)
        out = sum(wide[:, tap : tap + length] * taps[tap] for tap in range(width))
        return jnp.asarray(out).astype(inputs.dtype)

    def _heads(self, mixed: Array) -> tuple[Array, Array, Array]:
        """Queries and keys of one length [B, T, K, H] and values [B, T, K, R, U], in float32."""
        c, lead = self.config, mixed.shape[:2]
        q, k, v = jnp.split(mixed.astype(jnp.float32), (c.keys, 2 * c.keys), axis=-1)
        q, k = (part.reshape(*lead, c.num_key_heads, c.key_dim) for part in (q, k))
        v = v.reshape(*lead, c.num_key_heads, c.values_per_key, c.value_dim)
        return _unit(q) * c.key_dim**-0.5, _unit(k), v

    def _rates(self, x: Array, valid: Array) -> tuple[Array, Array]:
        """Log decays and strengths of all tokens, float32 [B, T, K, R]; none for padding."""
        c = self.config
        heads = (c.num_key_heads, c.values_per_key)
        both = linear(x, self.in_ba).reshape(*x.shape[:2], c.num_key_heads, -1)
        strength, step = jnp.split(both, 2, axis=-1)
        rate, bias = (
            jnp.expand_dims(part.astype(jnp.float32).reshape(heads), (0, 1))
            for part in (self.log_rate, self.time_bias)
        )
        log_decay = -jnp.exp(rate) * jax.nn.softplus(step.astype(jnp.float32) + bias)
        strength = jax.nn.sigmoid(strength).astype(jnp.float32)
        present = valid[..., None, None]
        return jnp.where(present, log_decay, 0), jnp.where(present, strength, 0)


def _unit(x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + _LENGTH_EPS)


def init_linear_cache(config: LinearAttentionConfig, batch: int, dtype) -> LinearCache:
    """The cache of `batch` sequences before their first token; its size knows no text length."""
    c = config
    heads = (c.num_key_heads, c.values_per_key, c.key_dim, c.value_dim)
    return LinearCache(
        window=jnp.zeros((batch, c.conv_width - 1, c.channels), dtype),
        state=jnp.zeros((batch, *heads), jnp.float32),
    )


def init_linear_attention(
    config: LinearAttentionConfig, d_model: int, normal: Callable[..., Array], out_scale: float
) -> LinearAttention:
    """Random linear attention: weights from `normal(*shape, scale=...)`, decays as unit steps."""
    c = config
    in_qkvz = normal(c.channels + c.values, d_model)
    dtype = in_qkvz.dtype
    return LinearAttention(
        in_qkvz=in_qkvz,
        in_ba=normal(2 * c.num_value_heads, d_model),
        convolution=normal(c.channels, 1, c.conv_width, scale=c.conv_width**-0.5),
        log_rate=jnp.zeros(c.num_value_heads, dtype),
        time_bias=jnp.ones(c.num_value_heads, dtype),
        out_norm=jnp.ones(c.value_dim, dtype),
        out=normal(d_model, c.values, scale=out_scale),
        config=c,
    )
