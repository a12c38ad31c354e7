"""First plus half the second derivative of the loss at an expert's gate, for models in memory."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import make_context
from moe_jax.errors import InputError
from moe_jax.stream import LayerSource, pad_rows, row_slices
from moe_jax.transformer import Transformer, next_token_loss
from pruning.kit.progress import OnStep
from pruning.scores.end_to_end import gated


def nll_grad2(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    counted: np.ndarray | None = None,
    *,
    batch: int = 8,
    dtype=jnp.float32,
    on_step: OnStep | None = None,
) -> np.ndarray:
    """Second-order estimate of the loss increase when an expert's output is zeroed.

    At gates of 1, minus the gradient plus half the diagonal of the Hessian. The diagonal costs a
    Hessian-vector product per expert, each about four passes through the whole model.

    Args:
      source: a `Transformer`.
      tokens: int32 [B, T].
      valid: bool [B, T].
      counted: bool [B, T], tokens whose prediction counts in the loss; default all.
      batch: sequences per step.
      dtype: of the activations.
      on_step: receives (Hessian-vector products done, products in all).

    Returns:
      float64 [L, E], in nats summed over the text.

    Raises:
      InputError: the source is not a model in memory.
    """
    if not isinstance(source, Transformer):
        raise InputError(
            f"nll_grad2 differentiates the whole model twice and needs it in memory, but got a "
            f"{type(source).__name__}; load it with convert.checkpoint.load_model, or use nll_ig, "
            "which streams the layers"
        )
    words = [None if one is None else pad_rows(one, batch) for one in (tokens, valid, counted)]
    parts = row_slices(-(-len(tokens) // batch) * batch, batch)
    shape = (len(source.config.moe_layers), source.config.moe.num_experts)
    sums, size = np.zeros(shape), shape[0] * shape[1]
    zero = jnp.zeros((), dtype)
    for i, rows in enumerate(parts):
        text = [None if one is None else jnp.asarray(one[rows]) for one in words]
        for number, (slot, expert) in enumerate(np.ndindex(shape)):
            direction = np.zeros(shape, np.float32)
            direction[slot, expert] = 1.0
            d_gate, product = _products(source, *text, jnp.asarray(direction), zero)
            sums[slot, expert] += 0.5 * float(product[slot, expert])
            if number == 0:
                sums -= np.asarray(d_gate, np.float64)
            if on_step:
                on_step(i * size + number + 1, len(parts) * size)
    return sums


def gated_loss(
    model: Transformer, tokens: Array, valid: Array, counted: Array | None, gates: Array, dtype
) -> Array:  # [B, T], [B, T], [B, T], [L, E]
    """Summed next-token loss with the output of every expert multiplied by its gate."""
    c = model.config
    context = make_context(c.attention, c.max_position, valid)
    x, slot = model.embedding(tokens, dtype), 0
    for index, layer in enumerate(model.layers):
        if index not in c.moe_layers:
            x = layer(x, context)
            continue
        x, slot = layer(x, context, gated(gates[slot])), slot + 1
    loss = jax.checkpoint(
        lambda row: next_token_loss(model.head, *row)
    )  # logits are the largest array
    return jax.lax.map(loss, (x, tokens, valid, counted)).sum()


@jax.jit
def _products(
    model: Transformer,
    tokens: Array,
    valid: Array,
    counted: Array | None,
    direction: Array,
    dtype_of: Array,
) -> tuple[Array, Array]:
    """Gradient at gates of 1, and the Hessian times `direction`; both [L, E]."""
    gradient = jax.grad(
        lambda gates: gated_loss(model, tokens, valid, counted, gates, dtype_of.dtype)
    )
    return jax.jvp(gradient, (jnp.ones_like(direction),), (direction,))
