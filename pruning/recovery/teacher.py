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
STATES = 2 << 30  # bytes of hidden states in memory at once


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
    on_layer: Callable[[int, int], None] | None = None,
) -> None:
    """Run a model over a text and keep what it predicts; the file is complete or absent.

    Log-probabilities are normalised over the whole vocabulary, so that one minus their sum is the
    probability of all other tokens.

    Args:
      file: to write, a .npy file [B, T] of `prediction_type`.
      source: the dense model; each layer is read once for `STATES` bytes of hidden states.
      tokens: int32 [B, T].
      valid: bool [B, T].
      top: likeliest tokens that are kept of a position, at most the vocabulary.
      batch: windows per step.
      dtype: of the activations.
      on_layer: called with the layers done and the layers in all, of all parts of the text.
    """
    numbers = tokens.shape[1] * source.config.d_model
    rows = batch * max(1, STATES // (batch * numbers * np.dtype(dtype).itemsize))
    parts = [slice(start, start + rows) for start in range(0, len(tokens), rows)]

    def fill(partial_file: Path) -> None:
        kept = np.lib.format.open_memmap(
            partial_file, "w+", dtype=prediction_type(top), shape=tokens.shape
        )
        for number, part in enumerate(parts):
            hidden = forward_hidden(
                source, tokens[part], valid[part], batch=batch, dtype=dtype,
                on_layer=lambda i, n=number: on_layer
                and on_layer(n * len(source) + i + 1, len(parts) * len(source)),
            )  # fmt: skip
            _fill(kept[part].reshape(-1), source.head, hidden.reshape(-1, hidden.shape[-1]), top)
        kept.flush()

    replace_file(file, fill)


def _fill(kept: np.ndarray, head: Head, states: np.ndarray, top: int) -> None:
    for start in range(0, len(states), POSITIONS):
        part = states[start : start + POSITIONS]
        logp, token = _likeliest(head, jnp.asarray(pad_rows(part, POSITIONS)), top)
        kept["logp"][start : start + len(part)] = np.asarray(logp)[: len(part)]
        kept["token"][start : start + len(part)] = np.asarray(token)[: len(part)]


def read_predictions(file: Path) -> np.ndarray:
    """The file of `write_predictions`, on the disk until parts of it are read."""
    return np.load(file, mmap_mode="r")


@partial(jax.jit, static_argnames="top")
def _likeliest(head: Head, x: Array, top: int) -> tuple[Array, Array]:  # [P, D] -> [P, top] twice
    logits = head(x)
    likeliest, token = jax.lax.top_k(logits, top)
    return likeliest - jax.nn.logsumexp(logits, axis=-1, keepdims=True), token
