"""The decoder layer and the whole model."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import Array

from moe_jax.attention.context import Context, KVCache, init_cache, make_context
from moe_jax.attention.delta_net import (
    LinearAttention,
    LinearCache,
    init_linear_attention,
    init_linear_cache,
)
from moe_jax.attention.grouped import Attention, init_attention
from moe_jax.attention.latent import LatentAttention, init_latent_attention
from moe_jax.config import LatentAttentionConfig, ModelConfig
from moe_jax.experts.dense import DenseMLP, init_dense
from moe_jax.experts.moe import MoE, MoETrace, init_moe
from moe_jax.experts.run import RunExperts, run_experts
from moe_jax.linear import linear
from moe_jax.module import module
from moe_jax.norm import Centred, NormWeight, rms_norm
from moe_jax.quant import Weight

Cache = KVCache | LinearCache


@module
class DecoderLayer(nnx.Module):
    """Attention and a feed-forward part, each behind its norm and added to the residual."""

    attention_norm: NormWeight = nnx.data()  # [D]
    attention: Attention | LatentAttention | LinearAttention = nnx.data()
    mlp_norm: NormWeight = nnx.data()  # [D]
    mlp: MoE | DenseMLP = nnx.data()
    norm_eps: float = nnx.static()

    def __call__(
        self, x: Array, context: Context, run: RunExperts = run_experts
    ) -> Array:  # [B, T, D] -> [B, T, D]
        """Run the layer, its experts as `run` says."""
        return self.trace(x, context, run)[0]

    def trace(
        self, x: Array, context: Context, run: RunExperts = run_experts
    ) -> tuple[Array, MoETrace | None]:
        """Run the layer and show what its experts did (None for a dense layer)."""
        return self.feed_forward(self.attend(x, context)[0], context, run)

    def step(self, x: Array, context: Context, cache: Cache) -> tuple[Array, Cache]:
        """Run the layer on the next tokens of sequences whose past is in `cache`."""
        middle, new_cache = self.attend(x, context, cache)
        assert new_cache is not None
        return self.feed_forward(middle, context)[0], new_cache

    def attend(
        self, x: Array, context: Context, cache: Cache | None = None
    ) -> tuple[Array, Cache | None]:
        """The first half: attention behind its norm, added to the residual."""
        with jax.named_scope("attention_norm"):
            normed = rms_norm(x, self.attention_norm, self.norm_eps)
        with jax.named_scope("attention"):
            attended, cache = self.attention(normed, context, cache)  # type: ignore[arg-type]
        with jax.named_scope("residual"):
            return x + attended, cache

    def feed_forward(
        self,
        x: Array,
        context: Context,
        run: RunExperts = run_experts,
        expert: Array | None = None,
    ) -> tuple[Array, MoETrace | None]:
        """The second half, and what its experts did (None for a dense layer).

        `expert` [B * T, k] is a choice of experts made before; None lets the router choose.
        """
        with jax.named_scope("mlp_norm"):
            normed = rms_norm(x, self.mlp_norm, self.norm_eps)
        if isinstance(self.mlp, DenseMLP):
            with jax.named_scope("dense_mlp"):
                out, trace = self.mlp(normed), None
        else:
            with jax.named_scope("moe"):
                flat = normed.reshape(-1, normed.shape[-1])
                out, trace = self.mlp(flat, context.valid.reshape(-1), run, expert)
        with jax.named_scope("residual"):
            return x + out.reshape(x.shape), trace


@module
class Embedding(nnx.Module):
    """Token embedding."""

    weight: Array = nnx.data()  # [V, D]

    @partial(jax.jit, static_argnames="dtype")
    def __call__(self, tokens: Array, dtype) -> Array:  # int [B, T] -> [B, T, D]
        """Look tokens up, in the activations' dtype."""
        with jax.named_scope("embedding"):
            return self.weight[tokens].astype(dtype)


@module
class Head(nnx.Module):
    """Final norm and projection to the vocabulary."""

    norm: NormWeight = nnx.data()  # [D]
    weight: Weight = nnx.data()  # [V, D]; the embedding's array if the two are tied
    norm_eps: float = nnx.static()

    @jax.jit
    def __call__(self, x: Array) -> Array:  # [..., D] -> float32 [..., V]
        """Logits of the next token."""
        with jax.named_scope("head"):
            return linear(rms_norm(x, self.norm, self.norm_eps), self.weight).astype(jnp.float32)


def next_token_loss(
    head: Head, x: Array, tokens: Array, valid: Array, counted: Array | None = None
) -> Array:
    """Summed next-token loss of one sequence.

    Args:
      head: of the model.
      x: [T, D], hidden states before the head.
      tokens: int32 [T].
      valid: bool [T]; a prediction counts where its token and the next are both valid.
      counted: bool [T], tokens whose prediction counts; default all.

    Returns:
      float32 scalar, nats.
    """
    logits = head(x[:-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[1:])
    wanted = valid[:-1] & valid[1:]
    if counted is not None:
        wanted &= counted[1:]
    return jnp.sum(jnp.where(wanted, nll, 0.0))


@module
class Transformer(nnx.Module):
    """A whole model in memory; satisfies `LayerSource`."""

    embedding: Embedding = nnx.data()
    layers: tuple[DecoderLayer, ...] = nnx.data()
    final_norm: NormWeight = nnx.data()  # [D]
    config: ModelConfig = nnx.static()
    lm_head: Weight | None = nnx.data(default=None)  # [V, D], None if tied

    @property
    def head(self) -> Head:
        """The final norm and projection, tied to the embedding if the model is."""
        weight = self.embedding.weight if self.lm_head is None else self.lm_head
        return Head(norm=self.final_norm, weight=weight, norm_eps=self.config.norm_eps)

    def __len__(self) -> int:
        return len(self.layers)

    def layer(self, index: int) -> DecoderLayer:
        """The decoder layer with this index."""
        return self.layers[index]

    def __call__(self, tokens: Array, valid: Array | None = None, *, dtype=None) -> Array:
        """Logits of a batch.

        Args:
          tokens: int32 [B, T].
          valid: bool [B, T], default all True.
          dtype: of the activations; default the embedding's.

        Returns:
          float32 [B, T, V].
        """
        return self.head(self.hidden(tokens, valid, dtype=dtype)[0])

    def hidden(
        self, tokens: Array, valid: Array | None = None, *, dtype=None, remat: bool = False
    ) -> tuple[Array, list[MoETrace | None]]:
        """Hidden states before the head, [B, T, D], and the trace of every layer.

        `remat` recomputes each layer in the backward pass instead of keeping its intermediates.
        """
        c = self.config
        valid = jnp.ones(tokens.shape, bool) if valid is None else valid
        context = make_context(c.attention, c.max_position, valid)
        x = self.embedding(tokens, dtype or self.embedding.weight.dtype)
        run = jax.checkpoint(DecoderLayer.trace) if remat else DecoderLayer.trace
        traces = []
        for layer in self.layers:
            x, trace = run(layer, x, context)
            traces.append(trace)
        return x, traces


def init_caches(config: ModelConfig, batch: int, slots: int, dtype) -> list[Cache]:
    """Empty caches of all layers, for `batch` sequences of up to `slots` positions."""
    linear_caches = [config.linear(index) for index in range(config.num_layers)]
    return [
        init_cache(config.attention, batch, slots, dtype)
        if own is None
        else init_linear_cache(own, batch, dtype)
        for own in linear_caches
    ]


def init(config: ModelConfig, key: Array, *, dtype=jnp.float32) -> Transformer:
    """A model with random weights: normal with standard deviation 0.02, and depth-scaled outputs.

    Args:
      config: the architecture.
      key: PRNG key.
      dtype: of every weight.

    Returns:
      The model.
    """
    draw = _Draw(config, iter(jax.random.split(key, 16 * config.num_layers + 2)), dtype)
    layers = tuple(_layer(draw, index) for index in range(config.num_layers))
    return Transformer(
        embedding=Embedding(weight=draw.normal(config.vocab_size, config.d_model)),
        layers=layers,
        final_norm=draw.norm(config.d_model),
        lm_head=None if config.tie_embeddings else draw.normal(config.vocab_size, config.d_model),
        config=config,
    )


def abstract(config: ModelConfig, *, dtype=jnp.float32) -> Transformer:
    """A model without its numbers: every array is a `jax.ShapeDtypeStruct`.

    For sizes, shardings and compilation of models that fit no memory at hand.

    Args:
      config: the architecture.
      dtype: of every weight.

    Returns:
      What `init` returns, with shapes and dtypes for arrays.
    """
    return jax.eval_shape(partial(init, config, dtype=dtype), jax.random.key(0))


@dataclass(frozen=True)
class _Draw:
    """Random weights, one key after the other."""

    config: ModelConfig
    keys: Iterator[Array]
    dtype: Any

    @property
    def out_scale(self) -> float:
        """Standard deviation of what is added to the residual."""
        return 0.02 / math.sqrt(2 * self.config.num_layers)

    def normal(self, *shape: int, scale: float = 0.02) -> Array:
        """A weight."""
        return (jax.random.normal(next(self.keys), shape) * scale).astype(self.dtype)

    def norm(self, size: int) -> NormWeight:
        """A norm's scale of one."""
        plain = jnp.ones(size, self.dtype)
        return Centred(jnp.zeros_like(plain)) if self.config.centred_norms else plain


def _layer(draw: _Draw, index: int) -> DecoderLayer:
    config, a = draw.config, draw.config.attention
    d, linear_attention = config.d_model, config.linear(index)
    if linear_attention is not None:
        attention = init_linear_attention(linear_attention, d, draw.normal, draw.out_scale)
    elif isinstance(a, LatentAttentionConfig):
        attention = init_latent_attention(a, d, draw.normal, draw.out_scale)
    else:
        window = config.window(index)
        attention = init_attention(a, d, window, draw.normal, draw.norm, draw.out_scale)
    if index in config.dense_layers:
        mlp = init_dense(config.d_dense, d, draw.normal, draw.out_scale)
    else:
        mlp = init_moe(config.moe, d, draw.normal, draw.out_scale)
    return DecoderLayer(
        attention_norm=draw.norm(d),
        attention=attention,
        mlp_norm=draw.norm(d),
        mlp=mlp,
        norm_eps=config.norm_eps,
    )
