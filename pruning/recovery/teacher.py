"""The dense model's predictions on the training text, in a file: it runs once, layer by layer."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.files import replace_file
from moe_jax.stream import LayerSource, forward_hidden, pad_rows
from moe_jax.transformer import Head

POSITIONS = 256  # whose logits are in memory at once


def prediction_type(top: int) -> np.dtype:
    """What is kept of a position: the `top` likeliest tokens and their log-probabilities."""
    return np.dtype([("logp", np.float32, (top,)), ("token", np.int32, (top,))])


def prediction_bytes(windows: int, length: int, top: int) -> int:
    """Bytes of the file of `write_predictions`, but for its short header."""
    return windows * length * prediction_type(top).itemsize


def write_predictions(
    file: Path,
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    top: int,
    *,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
) -> None:
    """Run a model over a text and keep what it predicts; the file is complete or absent.

    Log-probabilities are normalised over the whole vocabulary, so that one minus their sum is the
    probability of all other tokens.

    Args:
      file: to write, a .npy file [B, T] of `prediction_type`.
      source: the dense model; each layer is read once.
      tokens: int32 [B, T].
      valid: bool [B, T].
      top: likeliest tokens that are kept of a position, at most the vocabulary.
      batch: windows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.
    """
    hidden = forward_hidden(source, tokens, valid, batch=batch, dtype=dtype, on_layer=on_layer)
    head, states = source.head, hidden.reshape(-1, hidden.shape[-1])

    def fill(partial_file: Path) -> None:
        kept = np.lib.format.open_memmap(
            partial_file, "w+", dtype=prediction_type(top), shape=tokens.shape
        )
        flat = kept.reshape(-1)
        for start in range(0, len(states), POSITIONS):
            part = states[start : start + POSITIONS]
            logp, token = _likeliest(head, jnp.asarray(pad_rows(part, POSITIONS)), top)
            flat["logp"][start : start + len(part)] = np.asarray(logp)[: len(part)]
            flat["token"][start : start + len(part)] = np.asarray(token)[: len(part)]
        kept.flush()

    replace_file(file, fill)


def read_predictions(file: Path) -> np.ndarray:
    """The file of `write_predictions`, on the disk until parts of it are read."""
    return np.load(file, mmap_mode="r")


@partial(jax.jit, static_argnames="top")
def _likeliest(head: Head, x: Array, top: int) -> tuple[Array, Array]:  # [P, D] -> [P, top] twice
    return jax.lax.top_k(jax.nn.log_softmax(head(x), axis=-1), top)
