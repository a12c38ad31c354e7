"""Logits of a model on a few short sequences, for comparing models."""

import jax.numpy as jnp
import numpy as np

from moe_jax.stream import LayerSource, forward_hidden


def logits(
    source: LayerSource, tokens: np.ndarray, *, batch: int = 1, dtype=jnp.float32
) -> np.ndarray:  # float32 [B, T, V]
    hidden = forward_hidden(source, tokens, np.ones(tokens.shape, bool), batch=batch, dtype=dtype)
    head = source.head
    return np.stack([np.asarray(head(x)) for x in hidden])
