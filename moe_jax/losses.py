"""What language models are trained on."""

import jax.numpy as jnp
import optax
from jax import Array

from moe_jax.experts.moe import MoETrace
from moe_jax.transformer import Transformer


def balance_loss(trace: MoETrace) -> Array:
    """Load-balance loss of one layer: E x sum over experts of load share x mean probability.

    1 when every expert gets the same share of the tokens, E when one gets all. Taken per layer:
    pooled over layers it lets a layer lose experts.

    Source: Switch Transformer, arXiv:2101.03961, equation 4.
    """
    valid = trace.valid[:, None].astype(jnp.float32)
    mean_probability = (trace.probability * valid).sum(0) / valid.sum()
    tokens = _load(trace)
    return tokens.size * jnp.sum(tokens / tokens.sum() * mean_probability)


def language_model_loss(
    model: Transformer, tokens: Array, *, balance_weight: float = 0.01
) -> tuple[Array, dict[str, Array]]:
    """Next-token loss plus the mean load-balance loss of the layers.

    Args:
      model: the model to train.
      tokens: int32 [B, T], no padding.
      balance_weight: factor of the balance term.

    Returns:
      (scalar loss, {"nll": nats per token, "balance": mean balance loss, "idlest": the smallest
      share of tokens any expert got, relative to an even share}).
    """
    hidden, traces = model.hidden(tokens)
    logits = model.head(hidden[:, :-1])
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()
    routed = [trace for trace in traces if trace is not None]
    balance = jnp.stack([balance_loss(trace) for trace in routed]).mean()
    load = jnp.stack([_load(trace) for trace in routed])
    idlest = (load.min(axis=1) / load.mean(axis=1)).min()
    return nll + balance_weight * balance, {"nll": nll, "balance": balance, "idlest": idlest}


def _load(trace: MoETrace) -> Array:
    """Tokens of each expert of the layer, float32 [E]; where devices share them, the dispatch has
    those of one device."""
    experts = trace.logits.shape[1]
    chosen = jnp.where(trace.valid[:, None], trace.expert, experts)
    return jnp.bincount(chosen.reshape(-1), length=experts).astype(jnp.float32)
