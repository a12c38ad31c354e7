"""What channels do to noise: the worth of a channel where no text is at hand.

In ordinary layers that beat chance, which products of weight norms did not.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.experts.dispatch import make_dispatch, sum_by_expert, tile_height
from moe_jax.experts.expert_rows import expert_rows
from moe_jax.experts.grouped_matmul import expand
from moe_jax.experts.moe import MoE
from moe_jax.linear import linear
from moe_jax.norm import rms_norm
from moe_jax.transformer import DecoderLayer

ROWS, SHARE = 2048, 8  # each expert meets one row of SHARE
ROWS_PER_EXPERT = ROWS // SHARE


def noise_rows(d_model: int) -> np.ndarray:
    """The same normal noise for every layer and every run, float32 [ROWS, D]."""
    return np.random.default_rng(0).standard_normal((ROWS, d_model)).astype(np.float32)


@jax.jit
def noise_worth(layer: DecoderLayer, noise: np.ndarray) -> Array:
    """What each channel adds along its expert's output, on noise as the expert would meet it.

    The noise goes through the layer's norm, and each expert gets the eighth of the rows that its
    router likes best. Biases of the router, added to every row alike, cannot change which those
    are; biases of the experts act as they do on tokens.

    Args:
      layer: with dense experts, or a group of one; weights of any kind.
      noise: float32 [N, D].

    Returns:
      float32 [E, F], the mean over an expert's rows of h <v, z>: the channel's hidden activation,
      its column of W_down and the expert's output. Negative where the channel works against it.
    """
    assert isinstance(layer.mlp, MoE)
    experts, sent = layer.mlp.experts, len(noise) // SHARE
    count, first = experts.count.shape[0], layer.mlp.first
    x = rms_norm(jnp.asarray(noise), layer.mlp_norm, layer.norm_eps)
    logits = linear(x, layer.mlp.router).T  # [E, N]
    if first is not None:
        logits = jax.lax.dynamic_slice_in_dim(logits, first, count)
    liked = jax.lax.top_k(logits, sent)[1]  # [E, sent]
    owner = jnp.repeat(jnp.arange(count, dtype=jnp.int32), sent)
    dispatch = make_dispatch(owner, count, tile_height(count * sent, count))
    weights, pool = experts.weights, experts.pool
    rows = expert_rows(x[liked.reshape(-1)], weights, dispatch, pool)
    pulled = expand(rows.out, weights.down, dispatch, pool)
    return sum_by_expert(rows.hidden * pulled, dispatch) / sent


def worthiest_on_noise(layer: DecoderLayer, width: int) -> np.ndarray:
    """The channels of largest `noise_worth`, of layers that no text reaches.

    Args:
      layer: with dense experts.
      width: channels to keep of each.

    Returns:
      int [E, width], ascending; ties go to the lower index.
    """
    worth = np.asarray(noise_worth(layer, noise_rows(layer.mlp_norm.shape[0])))
    return np.sort(np.argsort(-worth, axis=1, kind="stable")[:, :width], axis=1)
