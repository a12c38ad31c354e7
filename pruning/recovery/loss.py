"""What the student is told: the dense model's predictions, the next token, an even load."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array


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


def teacher_divergence(logits: Array, logp: Array, token: Array) -> Array:
    """KL divergence of a kept prediction from the student's, all other tokens as one outcome.

    Args:
      logits: float32 [..., V] of the student.
      logp: float32 [..., k], log-probabilities of the teacher's likeliest tokens, k < V.
      token: int32 [..., k], those tokens.

    Returns:
      float32 [...], nats; 0 where the student predicts the same.
    """
    total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    own = jnp.take_along_axis(logits, token, axis=-1) - total
    others = jnp.put_along_axis(logits, token, -jnp.inf, axis=-1, inplace=False)
    own_rest = jax.nn.logsumexp(others, axis=-1) - total[..., 0]
    probability = jnp.exp(logp)
    rest = jnp.maximum(1.0 - probability.sum(axis=-1), 0.0)  # of rounding, too little to matter
    kept = jnp.sum(probability * (logp - own), axis=-1)
    return kept + jax.scipy.special.xlogy(rest, rest) - rest * own_rest


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
