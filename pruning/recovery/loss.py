"""What the student is told: the dense model's predictions, the next token, an even load."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

LEAST = 1e-37  # of a mass whose logarithm is taken


def predicted(valid: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Positions whose prediction counts in a loss, bool [B, T]; what follows the last is unknown.

    Args:
      valid: bool [B, T]; padding is False.
      counted: bool [B, T], tokens whose prediction counts, such as those of answers; default all.
    """
    wanted = np.zeros(valid.shape, bool)
    wanted[:, :-1] = valid[:, :-1] & valid[:, 1:]
    if counted is not None:
        wanted[:, :-1] &= counted[:, 1:]
    return wanted


@jax.custom_vjp
def prediction_losses(
    logits: Array, following: Array, logp: Array, token: Array
) -> tuple[Array, Array]:
    """What the student spends on the next token, and its divergence from the teacher.

    The latter is the KL divergence of a kept prediction from the student's, all other tokens as one
    outcome. The vocabulary is gone through once for both, and once for their gradient.

    Args:
      logits: float32 [..., V] of the student; they alone have a gradient.
      following: int32 [...], the next token.
      logp: float32 [..., k], log-probabilities of the teacher's likeliest tokens, k < V.
      token: int32 [..., k], those tokens.

    Returns:
      float32 [...] twice, nats; the divergence is 0 where the student predicts the same.
    """
    return _with_masses(logits, following, logp, token)[0]


def _with_masses(logits: Array, following: Array, logp: Array, token: Array):
    top = logits.max(axis=-1, keepdims=True)
    kept = jnp.take_along_axis(logits, token, axis=-1)
    mass = jnp.exp(kept - top)
    others = jnp.put_along_axis(jnp.exp(logits - top), token, 0.0, axis=-1, inplace=False)
    left = jnp.maximum(others.sum(axis=-1, keepdims=True), LEAST)
    total = left + mass.sum(axis=-1, keepdims=True)
    norm, probability = jnp.log(total) + top, jnp.exp(logp)
    rest = jnp.maximum(1.0 - probability.sum(axis=-1, keepdims=True), 0.0)  # of rounding
    nll = norm - jnp.take_along_axis(logits, following[..., None], axis=-1)
    kl = jnp.sum(probability * (logp - kept + norm), axis=-1, keepdims=True)
    kl += jax.scipy.special.xlogy(rest, rest) - rest * jnp.log(left / total)
    saved = following, token, probability, rest, others, mass, left, total
    return (nll[..., 0], kl[..., 0]), saved


def _prediction_losses_backward(saved, pulled):
    following, token, probability, rest, others, mass, left, total = saved
    d_nll, d_kl = (one[..., None] for one in pulled)
    told = probability.sum(axis=-1, keepdims=True) + rest
    each = (d_nll + d_kl * told) / total
    gradient = others * (each - d_kl * rest / left)
    gradient = jnp.put_along_axis(
        gradient, token, mass * each - d_kl * probability, axis=-1, inplace=False
    )
    one_less = jnp.take_along_axis(gradient, following[..., None], axis=-1) - d_nll
    gradient = jnp.put_along_axis(gradient, following[..., None], one_less, axis=-1, inplace=False)
    return gradient, None, None, None


prediction_losses.defvjp(_with_masses, _prediction_losses_backward)


def next_token_loss(logits: Array, tokens: Array) -> Array:
    """Nats that each position spends on the token after it.

    Args:
      logits: float32 [B, T, V].
      tokens: int32 [B, T].

    Returns:
      float32 [B, T]; 0 at the last position, which has no next token.
    """
    logp = jax.nn.log_softmax(logits[:, :-1], axis=-1)
    spent = -jnp.take_along_axis(logp, tokens[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(spent, ((0, 0), (0, 1)))
