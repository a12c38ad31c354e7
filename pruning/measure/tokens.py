"""What single tokens show on their way through a model, for figures of distributions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.weights import row_expert
from moe_jax.stream import LayerSource, in_batches, layer_forward, sweep
from moe_jax.transformer import DecoderLayer
from pruning.scores.expert_sums import observe_experts

# (layer with experts, its place among these, input [B, T, D], context) -> (output, anything).
See = Callable[[DecoderLayer, int, Array, Context], tuple[Array, Any]]


@dataclass(frozen=True, eq=False)
class TokenView:
    """Values of single tokens, of which `ChannelStatistics` holds the sums.

    Attributes:
      entropy: [L, N] of the router's probabilities, nats, for the N valid tokens.
      norms: [L][E] arrays, the L2 norms of an expert's outputs for the tokens routed to it, before
        any routing weight; of different lengths.
    """

    entropy: np.ndarray
    norms: tuple[tuple[np.ndarray, ...], ...]


def view_tokens(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    *,
    batch: int = 8,
    dtype=jnp.float32,
) -> TokenView:
    """Run a dense model over a short text and keep what every router and expert did.

    Args:
      source: the model, in memory or on disk; each layer is read once.
      tokens: int32 [B, T]; a few thousand are enough for a distribution.
      valid: bool [B, T].
      batch: sequences per step.
      dtype: of the activations.

    Returns:
      The values of all valid tokens.
    """
    entropy, norms = [], []

    def see(layer: DecoderLayer, slot: int, x: Array, place: Context):
        return _view(layer, x, place)

    def keep(slot: int, seen: list) -> None:
        every, real, norm, owner = (np.concatenate(part) for part in zip(*seen, strict=True))
        entropy.append(every[real])
        norms.append(tuple(norm[owner == e] for e in range(source.config.moe.num_experts)))

    watch_layers(source, tokens, valid, see, keep, batch=batch, dtype=dtype)
    return TokenView(np.array(entropy), tuple(norms))


def watch_layers(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    see: See,
    keep: Callable[[int, list], None],
    *,
    batch: int,
    dtype,
) -> None:
    """Run a model layer by layer and show the layers that have experts.

    Args:
      source: the model.
      tokens: int32 [B, T].
      valid: bool [B, T].
      see: runs one layer of experts on one batch and says what it saw.
      keep: receives the place of each layer among those with experts, and what was seen of every
        batch there, as arrays on the host.
      batch: sequences per step.
      dtype: of the activations.
    """
    text, slots = in_batches(source, tokens, valid, batch), source.config.moe_layers

    def step(index: int, layer: DecoderLayer, x: list[np.ndarray]) -> list[np.ndarray]:
        if index not in slots:
            return text.each(x, lambda x, place, rows: layer_forward(layer, x, place))
        slot, seen = slots.index(index), []

        def run(x: Array, place: Context, rows: slice) -> Array:
            out, found = see(layer, slot, x, place)
            seen.append(jax.tree.map(np.asarray, found))
            return out

        text.each(x, run)
        keep(slot, seen)
        return x

    sweep(source, text.embedded(source, dtype), step)


@jax.jit
def _view(layer: DecoderLayer, x: Array, context: Context) -> tuple[Array, tuple[Array, ...]]:
    """(output, (entropy [N], valid [N], norm of each row [P], its expert, -1 for padding))."""
    out, trace = layer.feed_forward(layer.attend(x, context)[0], context, observe_experts)
    assert trace is not None
    entropy = jnp.sum(jax.scipy.special.entr(trace.probability), axis=-1)
    real = trace.dispatch.row_copy < trace.expert.size
    owner = jnp.where(real, row_expert(trace.dispatch), -1)
    return out, (entropy, trace.valid, jnp.sqrt(trace.kept.out_square), owner)
