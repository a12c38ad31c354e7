"""Weight x gradient scores: a pass of their own, because the gradient must be whole before |.|."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.moe import Experts, MoE
from moe_jax.experts.swiglu import no_score, routed_experts
from moe_jax.experts.weights import Weights
from moe_jax.stream import LayerSource, contexts, embed, layer_forward, pad_rows
from moe_jax.transformer import DecoderLayer
from pruning.scores.layer import layer_backward, loss_and_gradient
from pruning.scores.states import States, row_slices


def weight_gradient_scores(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    *,
    batch: int = 8,
    dtype=jnp.float32,
    on_step: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Sum over a channel's weights in the three matrices of |W dloss/dW|.

    Costs a forward and a backward sweep more than everything else, about five plain forwards, and
    keeps the hidden states of the whole text (in a temporary file if they are large).

    Args:
      source: the dense model.
      tokens: int32 [B, T].
      valid: bool [B, T].
      batch: sequences per step.
      dtype: of the activations.
      on_step: receives (layer visits done, layer visits in all).

    Returns:
      float64 [L, E, F], in nats summed over the text.
    """
    config = source.config
    tokens, valid = pad_rows(tokens, batch), pad_rows(valid, batch)
    places, parts = contexts(source, valid, batch), row_slices(len(tokens), batch)
    states = States(source, tokens.shape, dtype)
    x = [embed(source, tokens[rows], dtype) for rows in parts]
    lowest = config.moe_layers[0]  # below it nothing is scored
    total = 2 * len(source) - lowest
    for index in range(len(source)):
        layer = source.layer(index)
        for i, (rows, place) in enumerate(zip(parts, places, strict=True)):
            middle = _attend(layer, jnp.asarray(x[i]), place)
            states.put(index, rows, x[i], middle)
            x[i] = np.asarray(layer_forward(layer, jnp.asarray(x[i]), place))
        if on_step:
            on_step(index + 1, total)
    gradient = [
        loss_and_gradient(source.head, jnp.asarray(part), tokens[rows], valid[rows])[1]
        for part, rows in zip(x, parts, strict=True)
    ]
    scores = np.zeros((len(config.moe_layers), config.moe.num_experts, config.moe.d_expert))
    slots = {layer: slot for slot, layer in enumerate(config.moe_layers)}
    for index in reversed(range(lowest, len(source))):
        layer, whole = source.layer(index), None
        for i, (rows, place) in enumerate(zip(parts, places, strict=True)):
            before, middle = states.get(index, rows)
            if index in slots:
                part = _weight_gradient(layer, middle, place, gradient[i])
                whole = part if whole is None else _add(whole, part)
            if index > lowest:
                gradient[i] = layer_backward(layer, before, middle, place, gradient[i])
        if whole is not None:
            scores[slots[index]] = np.asarray(_magnitude(layer, whole)).reshape(scores.shape[1:])
        if on_step:
            on_step(2 * len(source) - index, total)
    return scores


_attend = jax.jit(lambda layer, x, context: layer.attend(x, context)[0])
_add = jax.jit(lambda whole, part: jax.tree.map(jnp.add, whole, part))


@jax.jit
def _weight_gradient(
    layer: DecoderLayer, middle: Array, context: Context, d_out: Array
) -> Weights:  # float32
    assert isinstance(layer.mlp, MoE)

    def half(weights: Weights) -> Array:
        def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
            probe = jnp.zeros((0, experts.count.shape[0], experts.width))
            pool = experts.pool
            return routed_experts(no_score, x, row_weight, weights, probe, dispatch, pool), None

        return layer.feed_forward(middle, context, run)[0]

    wide = jax.tree.map(lambda w: w.astype(jnp.float32), layer.mlp.experts.weights)
    return jax.vjp(half, wide)[1](d_out)[0]


@jax.jit
def _magnitude(layer: DecoderLayer, gradient: Weights) -> Array:  # [C]
    assert isinstance(layer.mlp, MoE)
    products = jax.tree.map(
        lambda w, d: jnp.sum(jnp.abs(w.astype(jnp.float32) * d), axis=-1),
        layer.mlp.experts.weights,
        gradient,
    )
    return products.gate + products.up + products.down
