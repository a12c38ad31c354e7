"""What pruning one expert further and further does to its layer's output, measured."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import gather_rows, sum_by_expert
from moe_jax.experts.grouped_matmul import contract
from moe_jax.experts.moe import MoE
from moe_jax.experts.run import gated_experts
from moe_jax.experts.weights import row_expert
from moe_jax.quant import dequantize
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer
from pruning.measure.tokens import watch_layers
from pruning.scores.layer import EPS


def expert_loss_curves(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    scores: np.ndarray,
    *,
    points: int = 9,
    batch: int = 8,
    dtype=jnp.float32,
) -> tuple[np.ndarray, np.ndarray]:
    """Loss of a layer's output when one of its experts is pruned and nothing else.

    The loss is the squared error of the output over its squared norm, mean over all valid tokens;
    routing and all other experts stay as they are. At rate 1 it is the expert's `kappa` per token
    (of an expert with an output bias: without what the bias adds, which is no channel's).

    Args:
      source: the dense model; each layer is read once.
      tokens: int32 [B, T]; a few thousand are enough.
      valid: bool [B, T].
      scores: channel scores [L, E, F]; the lowest go first.
      points: prune rates from 0 to 1, ends included.
      batch: sequences per step.
      dtype: of the activations.

    Returns:
      (prune rates [K], losses [L, E, K]).

    Source: figure 4b and the loss of arXiv 2606.18304.
    """
    channels = scores.shape[2]
    removed = np.rint(np.linspace(0, 1, points) * channels).astype(np.int32)
    # Rank 0 is the channel that goes first.
    rank = np.argsort(np.argsort(scores, axis=2, kind="stable"), axis=2).astype(np.int32)
    sums = []

    def see(layer: DecoderLayer, slot: int, x: Array, place: Context) -> tuple[Array, Array]:
        return _losses(layer, x, place, rank[slot], removed)

    def keep(slot: int, losses: list) -> None:
        sums.append(np.sum(losses, axis=0, dtype=np.float64).T)

    watch_layers(source, tokens, valid, see, keep, batch=batch, dtype=dtype)
    return removed / channels, np.array(sums) / valid.sum()


@jax.jit
def _losses(
    layer: DecoderLayer, x: Array, context: Context, rank: Array, removed: Array
) -> tuple[Array, Array]:  # ..., [E, F], [K] -> [B, T, D], [K, E]
    """Output of a layer, and its summed losses without so many channels of each expert."""
    assert isinstance(layer.mlp, MoE)
    keep_all = gated_experts(lambda hidden, dispatch: hidden)
    out, trace = layer.feed_forward(layer.attend(x, context)[0], context, keep_all)
    assert trace is not None
    d, pool = trace.dispatch, layer.mlp.experts.pool
    square = jnp.sum(jnp.square(out.reshape(-1, out.shape[-1]).astype(jnp.float32)), axis=-1)
    q = gather_rows(trace.valid.astype(jnp.float32) / (square + EPS), d, d.copies)
    down = dequantize(layer.mlp.experts.w_down)
    order, weight = rank[row_expert(d)], q * jnp.square(trace.row_weight)

    def lost(count: Array) -> Array:
        hidden = trace.kept.hidden
        gone = contract(jnp.where(order < count, hidden, jnp.zeros_like(hidden)), down, d, pool)
        return sum_by_expert(weight * jnp.sum(jnp.square(gone.astype(jnp.float32)), axis=-1), d)

    return out, jax.lax.map(lost, removed)
