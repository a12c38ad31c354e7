"""What single tokens show on their way through a model, for figures of distributions."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.moe import MoE
from moe_jax.experts.weights import row_expert
from moe_jax.stream import LayerSource, contexts, embed, layer_forward, pad_rows
from moe_jax.transformer import DecoderLayer
from pruning.scores.experts import observe_experts
from pruning.scores.states import row_slices

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
    see = lambda layer, slot, x, place: _view(layer, x, place)  # noqa: E731
    for seen in watch_layers(source, tokens, valid, see, batch=batch, dtype=dtype):
        every, real, norm, owner = (np.concatenate(part) for part in zip(*seen, strict=True))
        entropy.append(every[real])
        norms.append(tuple(norm[owner == e] for e in range(source.config.moe.num_experts)))
    return TokenView(np.array(entropy), tuple(norms))


def watch_layers(
    source: LayerSource, tokens: np.ndarray, valid: np.ndarray, see: See, *, batch: int, dtype
) -> Iterator[list]:
    """Run a model layer by layer and show the layers that have experts.

    Args:
      source: the model.
      tokens: int32 [B, T].
      valid: bool [B, T].
      see: runs one layer of experts on one batch and says what it saw.
      batch: sequences per step.
      dtype: of the activations.

    Yields:
      For each layer with experts, what was seen of every batch, as arrays on the host.
    """
    tokens, valid = pad_rows(tokens, batch), pad_rows(valid, batch)
    places = contexts(source, valid, batch)
    x = [embed(source, tokens[rows], dtype) for rows in row_slices(len(tokens), batch)]
    slot = 0
    for index in range(len(source)):
        layer, seen = source.layer(index), []
        for i, place in enumerate(places):
            if isinstance(layer.mlp, MoE):
                out, found = see(layer, slot, jnp.asarray(x[i]), place)
                seen.append(jax.tree.map(np.asarray, found))
            else:
                out = layer_forward(layer, jnp.asarray(x[i]), place)
            x[i] = np.asarray(out)
        if isinstance(layer.mlp, MoE):
            slot += 1
            yield seen


@jax.jit
def _view(layer: DecoderLayer, x: Array, context: Context) -> tuple[Array, tuple[Array, ...]]:
    """(output, (entropy [N], valid [N], norm of each row [P], its expert, -1 for padding))."""
    out, trace = layer.feed_forward(layer.attend(x, context)[0], context, observe_experts)
    assert trace is not None
    entropy = jnp.sum(jax.scipy.special.entr(trace.probability), axis=-1)
    real = trace.dispatch.row_copy < trace.expert.size
    owner = jnp.where(real, row_expert(trace.dispatch), -1)
    return out, (entropy, trace.valid, jnp.sqrt(trace.kept.out_square), owner)
