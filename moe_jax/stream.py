"""Running a model layer by layer: one layer of weights in memory, whatever the model's size."""

from collections.abc import Callable, Iterator
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context, make_context
from moe_jax.config import ModelConfig
from moe_jax.transformer import DecoderLayer, Embedding, Head


class LayerSource(Protocol):
    """Where layers come from: a model in memory or a checkpoint on disk."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def embedding(self) -> Embedding:
        """The token embedding."""
        ...

    @property
    def head(self) -> Head:
        """The final norm and vocabulary projection."""
        ...

    def __len__(self) -> int: ...

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index`, freshly read or already resident."""
        ...


@jax.jit
def layer_forward(layer: DecoderLayer, x: Array, context: Context) -> Array:  # [B, T, D]
    """One layer; layers of equal shapes share one compilation."""
    return layer(x, context)


def embed(source: LayerSource, tokens: np.ndarray, dtype) -> np.ndarray:
    """First hidden states, [B, T, D] on the host."""
    return np.asarray(source.embedding(tokens, dtype))


def contexts(source: LayerSource, valid: np.ndarray, batch: int) -> list[Context]:
    """Contexts of consecutive batches of `batch` rows of `valid` [B, T]."""
    c = source.config
    return [
        make_context(c.attention, c.max_position, valid[i : i + batch])
        for i in range(0, len(valid), batch)
    ]


def pad_rows(values: np.ndarray, batch: int) -> np.ndarray:
    """Append zero rows until the row count is a multiple of `batch`: one shape, one compile."""
    missing = -len(values) % batch
    return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])


def forward_hidden(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    *,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Hidden states before the head, each layer read once and applied to every batch.

    Args:
      source: the model.
      tokens: int32 [B, T].
      valid: bool [B, T].
      batch: rows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      [B, T, D] on the host.
    """
    rows = len(tokens)
    tokens, valid = pad_rows(tokens, batch), pad_rows(valid, batch)
    places = contexts(source, valid, batch)
    x = [embed(source, part, dtype) for part in _parts(tokens, batch)]
    for index in range(len(source)):
        layer = source.layer(index)
        x = [
            np.asarray(layer_forward(layer, part, place))
            for part, place in zip(x, places, strict=True)
        ]
        if on_layer:
            on_layer(index)
    return np.concatenate(x)[:rows]


def _parts(values: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    for start in range(0, len(values), batch):
        yield values[start : start + batch]
