"""Weight x gradient scores: a pass of their own, because the gradient must be whole before |.|."""

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import Dispatch
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.experts.run import run_experts
from moe_jax.experts.weights import ExpertWeights
from moe_jax.stream import (
    Batches,
    LayerSource,
    in_batches,
    layer_attend,
    layer_forward,
    sweep,
)
from moe_jax.transformer import DecoderLayer
from pruning.kit.progress import OnStep, counter
from pruning.scores.layer import layer_backward, loss_gradient
from pruning.scores.states import States, layer_slots, temporary_states


def weight_gradient_scores(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    counted: np.ndarray | None = None,
    *,
    batch: int = 8,
    dtype=jnp.float32,
    scratch: Path | None = None,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Sum over a channel's weights in the three matrices of |W dloss/dW|.

    Costs a forward and a backward sweep more than everything else, about five plain forwards, and
    keeps the hidden states of the whole text (in a scratch file if they are large).

    Args:
      source: the dense model.
      tokens: int32 [B, T].
      valid: bool [B, T].
      counted: bool [B, T], tokens whose prediction counts in the loss; default all.
      batch: sequences per step.
      dtype: of the activations.
      scratch: folder of that file; default the system's.
      on_step: receives (layer visits done, layer visits in all).

    Returns:
      float64 [L, E, F], in nats summed over the text.

    Raises:
      FullDiskError: there is no room for the file.
    """
    text = in_batches(source, tokens, valid, batch, counted)
    lowest = source.config.moe_layers[0]  # below it nothing is scored
    count = counter(2 * len(source) - lowest, on_step)
    shape = (*text.tokens.shape, source.config.d_model)
    with temporary_states(layer_slots(source.config), shape, dtype, scratch) as states:
        last = _push_up(source, text, states, dtype, count)
        gradient = loss_gradient(source.head, text, last)
        return _pull_back(source, text, gradient, states, count)


def _push_up(
    source: LayerSource, text: Batches, states: States, dtype, count: Callable[[int], None]
) -> list[np.ndarray]:
    """The last hidden states; those of every layer stay in `states`."""

    def up(index: int, layer: DecoderLayer, x: list[np.ndarray]) -> list[np.ndarray]:
        def run(x: Array, place: Context, rows: slice) -> Array:
            states.put(2 * index, rows, x)
            states.put(2 * index + 1, rows, layer_attend(layer, x, place))
            return layer_forward(layer, x, place)

        return text.each(x, run)

    return sweep(source, text.embedded(source, dtype), up, on_layer=lambda index: count(1))


def _pull_back(
    source: LayerSource,
    text: Batches,
    gradient: list[np.ndarray],
    states: States,
    count: Callable[[int], None],
) -> np.ndarray:
    """Scores [L, E, F] from the gradient at the last hidden states."""
    config = source.config
    lowest, moe = config.moe_layers[0], config.moe
    scores = np.zeros((len(config.moe_layers), moe.num_experts, moe.d_expert))

    def down(index: int, layer: DecoderLayer, gradient: list[np.ndarray]) -> list[np.ndarray]:
        whole = None

        def run(d_out: Array, place: Context, rows: slice) -> Array:
            nonlocal whole
            before, middle = (jnp.asarray(states.get(2 * index + half, rows)) for half in (0, 1))
            if index in config.moe_layers:
                part = _weight_gradient(layer, middle, place, d_out)
                whole = part if whole is None else _add(whole, part)
            return layer_backward(layer, before, middle, place, d_out) if index > lowest else d_out

        text.each(gradient, run)
        if whole is not None:
            slot = config.moe_layers.index(index)
            scores[slot] = np.asarray(_magnitude(layer, whole)).reshape(scores.shape[1:])
        return gradient

    layers = reversed(range(lowest, len(source)))
    sweep(source, gradient, down, layers=layers, on_layer=lambda index: count(1))
    return scores


_add = jax.jit(lambda whole, part: jax.tree.map(jnp.add, whole, part))


@jax.jit
def _weight_gradient(
    layer: DecoderLayer, middle: Array, context: Context, d_out: Array
) -> ExpertWeights:  # float32
    assert isinstance(layer.mlp, MoE)

    def half(weights: ExpertWeights) -> Array:
        def run(experts: Experts, x: Array, row_weight: Array, dispatch: Dispatch):
            return run_experts(experts, x, row_weight, dispatch, weights=weights)

        return layer.feed_forward(middle, context, run)[0]

    wide = jax.tree.map(lambda w: w.astype(jnp.float32), layer.mlp.experts.weights)
    return jax.vjp(half, wide)[1](d_out)[0]


@jax.jit
def _magnitude(layer: DecoderLayer, gradient: ExpertWeights) -> Array:  # [C]
    assert isinstance(layer.mlp, MoE)
    products = jax.tree.map(
        lambda w, d: jnp.sum(jnp.abs(w.astype(jnp.float32) * d), axis=-1),
        layer.mlp.experts.weights,
        gradient,
    )
    return products.gate + products.up + products.down
