"""The decoder layer and the whole model."""

import math
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
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
from moe_jax.config import SWIGLU, Activation, LatentAttentionConfig, ModelConfig
from moe_jax.experts.moe import (
    DenseMLP,
    Experts,
    MoE,
    MoETrace,
    RunExperts,
    SharedExpert,
    run_experts,
)
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
        normed = rms_norm(x, self.attention_norm, self.norm_eps)
        attended, cache = self.attention(normed, context, cache)  # type: ignore[arg-type]
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
        normed = rms_norm(x, self.mlp_norm, self.norm_eps)
        if isinstance(self.mlp, DenseMLP):
            return x + self.mlp(normed), None
        flat = normed.reshape(-1, normed.shape[-1])
        out, trace = self.mlp(flat, context.valid.reshape(-1), run, expert)
        return x + out.reshape(x.shape), trace


@module
class Embedding(nnx.Module):
    """Token embedding."""

    weight: Array = nnx.data()  # [V, D]

    @partial(jax.jit, static_argnames="dtype")
    def __call__(self, tokens: Array, dtype) -> Array:  # int [B, T] -> [B, T, D]
        """Look tokens up, in the activations' dtype."""
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
        return linear(rms_norm(x, self.norm, self.norm_eps), self.weight).astype(jnp.float32)


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


def dense_experts(
    w_gate: Weight,
    w_up: Weight,
    w_down: Weight,
    num_experts: int,
    *,
    biased: bool = False,
    activation: Activation = SWIGLU,
) -> Experts:
    """Experts of equal width from pools [E*F, D], w_down transposed to a row per channel.

    `biased` ones have biases, all zero.
    """
    zeros = lambda *shape: jnp.zeros(shape, w_gate.dtype) if biased else None  # noqa: E731
    width = w_gate.shape[0] // num_experts
    return Experts(
        w_gate=w_gate,
        w_up=w_up,
        w_down=w_down,
        count=jnp.full(num_experts, width, jnp.int32),
        width=width,
        block=width,
        b_gate=zeros(w_gate.shape[0]),
        b_up=zeros(w_gate.shape[0]),
        b_down=zeros(num_experts, w_gate.shape[1]),
        activation=activation,
    )


def init(config: ModelConfig, key: Array, *, dtype=jnp.float32) -> Transformer:
    """A model with random weights: normal with standard deviation 0.02, and depth-scaled outputs.

    Args:
      config: the architecture.
      key: PRNG key.
      dtype: of every weight.

    Returns:
      The model.
    """
    keys = iter(jax.random.split(key, 16 * config.num_layers + 2))
    out_scale = 0.02 / math.sqrt(2 * config.num_layers)

    def normal(*shape: int, scale: float = 0.02) -> Array:
        return (jax.random.normal(next(keys), shape) * scale).astype(dtype)

    def norm(size: int) -> NormWeight:
        plain = jnp.ones(size, dtype)
        return Centred(jnp.zeros_like(plain)) if config.centred_norms else plain

    d, a, m = config.d_model, config.attention, config.moe

    def mlp(width: int) -> DenseMLP:
        return DenseMLP(
            w_gate=normal(width, d), w_up=normal(width, d), w_down=normal(d, width, scale=out_scale)
        )

    def moe() -> MoE:
        rows = m.num_experts * m.d_expert
        shared = None
        if m.d_shared:
            gate = normal(1, d) if m.shared_gate else None
            shared = SharedExpert(mlp=mlp(m.d_shared), gate=gate)
        return MoE(
            router=normal(m.num_experts, d),
            experts=dense_experts(
                normal(rows, d),
                normal(rows, d),
                normal(rows, d, scale=out_scale),
                m.num_experts,
                biased=m.expert_bias,
                activation=m.activation,
            ),
            logit_bias=jnp.zeros(m.num_experts, dtype) if m.logit_bias else None,
            shared=shared,
            router_bias=jnp.zeros(m.num_experts) if m.correction_bias else None,
            config=m,
        )

    def layer(index: int) -> DecoderLayer:
        linear_attention = config.linear(index)
        if linear_attention is not None:
            attention = init_linear_attention(linear_attention, d, normal, out_scale)
        elif isinstance(a, LatentAttentionConfig):
            attention = init_latent_attention(a, d, normal, out_scale)
        else:
            attention = init_attention(a, d, config.window(index), normal, norm, out_scale)
        return DecoderLayer(
            attention_norm=norm(d),
            attention=attention,
            mlp_norm=norm(d),
            mlp=mlp(config.d_dense) if index in config.dense_layers else moe(),
            norm_eps=config.norm_eps,
        )

    layers: Sequence[DecoderLayer] = [layer(i) for i in range(config.num_layers)]
    return Transformer(
        embedding=Embedding(weight=normal(config.vocab_size, d)),
        layers=tuple(layers),
        final_norm=norm(d),
        lm_head=None if config.tie_embeddings else normal(config.vocab_size, d),
        config=config,
    )
