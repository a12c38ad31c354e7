"""Running a model layer by layer: one layer of weights in memory, whatever the model's size.

`sweep` is the one loop over layers. Everything that runs a text through a model (hidden states,
statistics, gradients on their way back, masks, GPTQ) says what happens in a layer and leaves the
padding to whole batches, the positions, the order and the transfers to it. A layer that does not
fit is taken in groups of its experts by what can (`moe_jax.groups`).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context, make_context
from moe_jax.config import ModelConfig
from moe_jax.programs import free_programs
from moe_jax.source import LayerSource, group_of, groups_of
from moe_jax.transformer import DecoderLayer, Embedding, Head

# --- one layer on one batch; layers of equal shapes share one compilation ---


@jax.jit
def layer_forward(layer: DecoderLayer, x: Array, context: Context) -> Array:  # [B, T, D]
    """One layer."""
    return layer(x, context)


@jax.jit
def layer_attend(layer: DecoderLayer, x: Array, context: Context) -> Array:  # [B, T, D]
    """The first half of a layer: its attention and the residual."""
    return layer.attend(x, context)[0]


@jax.jit
def layer_feed_forward(layer: DecoderLayer, middle: Array, context: Context) -> Array:  # [B, T, D]
    """The second half of a layer, from what `layer_attend` returned."""
    return layer.feed_forward(middle, context)[0]


# --- a text in batches ---

# Tokens of padding that take longer than the compilation of another shape.
WORTH_A_SHAPE = 1024


class PerBatch(Protocol):
    """An array of each batch of a text, such as a list of them, wherever they lie."""

    def __getitem__(self, batch: int, /) -> np.ndarray: ...

    def __setitem__(self, batch: int, value: np.ndarray, /) -> None: ...


Held = TypeVar("Held", bound=PerBatch)


@dataclass(frozen=True, eq=False)
class Batches:
    """A text as batches of one shape, on the host: one shape is one compilation.

    Attributes:
      tokens: int32 [B, T]; B is a multiple of the batch, rows beyond the text's are zero.
      valid: bool [B, T], False in those rows.
      counted: bool [B, T], tokens whose prediction counts in a loss; None for all.
      rows: which rows are each batch's.
      places: where each batch's tokens stand.
    """

    tokens: np.ndarray
    valid: np.ndarray
    rows: tuple[slice, ...]
    places: tuple[Context, ...]
    counted: np.ndarray | None = None

    def embedded(self, source: LayerSource, dtype) -> list[np.ndarray]:
        """First hidden states of each batch, [b, T, D]."""
        return [np.asarray(source.embedding(self.tokens[rows], dtype)) for rows in self.rows]

    def each(self, x: Held, run: Callable[[Array, Context, slice], Array]) -> Held:
        """Replace what every batch holds by what `run` makes of it.

        Args:
          x: an array per batch; changed in place, so that a text is held once.
          run: (a batch's array, where its tokens stand, its rows) -> the new array.

        Returns:
          `x`.
        """
        for i, (rows, place) in enumerate(zip(self.rows, self.places, strict=True)):
            x[i] = np.asarray(run(jnp.asarray(x[i]), place, rows))
        return x

    def joined(self, x: list[np.ndarray], out: np.ndarray) -> np.ndarray:
        """Put what the batches hold together, without the rows of padding.

        Args:
          x: an array per batch; emptied on the way, so that a text is held once.
          out: [B, ...] where it goes.

        Returns:
          `out`.
        """
        for rows in self.rows:
            part = x.pop(0)
            out[rows] = part[: len(out) - rows.start]
        return out


def in_batches(
    source: LayerSource,
    tokens: np.ndarray,
    valid: np.ndarray,
    batch: int,
    counted: np.ndarray | None = None,
    stride: int = 1,
) -> Batches:
    """Cut a text into batches.

    Args:
      source: the model that will run it.
      tokens: int32 [B, T].
      valid: bool [B, T]; other positions are padding.
      batch: rows per batch at most; fewer, alike in all, where that saves much padding.
      counted: bool [B, T], tokens whose prediction counts in a loss; default all.
      stride: positions from a token to the next in rotations, as of `make_context`.

    Returns:
      The batches; the last is filled with rows of padding.
    """
    chex.assert_rank(tokens, 2)
    chex.assert_equal_shape([tokens, valid])
    if -len(tokens) % batch * tokens.shape[1] > WORTH_A_SHAPE:
        batch = even_batch(len(tokens), batch)
    tokens, valid = pad_rows(tokens, batch), pad_rows(valid, batch)
    rows = row_slices(len(tokens), batch)
    c = source.config
    places = tuple(
        make_context(c.attention, c.max_position, valid[part], stride=stride) for part in rows
    )
    counted = None if counted is None else pad_rows(counted, batch)
    return Batches(tokens, valid, rows, places, counted)


def pad_rows(values: np.ndarray, batch: int) -> np.ndarray:
    """Append zero rows until the row count is a multiple of `batch`."""
    missing = -len(values) % batch
    return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])


def even_batch(count: int, most: int) -> int:
    """Rows of each of the fewest batches for so many rows, so that few are padding."""
    return -(-count // -(-count // most))


def row_slices(count: int, batch: int) -> tuple[slice, ...]:
    """Consecutive batches of `count` rows."""
    return tuple(slice(start, start + batch) for start in range(0, count, batch))


# --- through the layers ---

X = TypeVar("X")


def sweep(
    source: LayerSource,
    x: X,
    step: Callable[[int, DecoderLayer, X], X],
    *,
    layers: Iterable[int] | None = None,
    on_layer: Callable[[int], None] | None = None,
    in_groups: Callable[[int, X], X] | None = None,
) -> X:
    """Read each layer once and apply it to every batch.

    Args:
      source: the model; one of its layers is held at a time.
      x: what enters, as a rule an array per batch: `Batches.embedded` on the way up, gradients on
        the way down.
      step: what happens in a layer, (its index, the layer, x) -> x, as a rule `Batches.each` of a
        function of one batch.
      layers: which layers, in this order; default all, upwards.
      on_layer: called with the index of each finished layer.
      in_groups: what happens instead in a layer that the source wants to be taken in groups, (its
        index, x) -> x; None if all layers are needed whole.

    Returns:
      What the last step returned.
    """
    free_programs()  # comparisons and audits sweep thousands of times, each with shapes of its own
    for index in range(len(source)) if layers is None else layers:
        if in_groups is not None and groups_of(source, index) > 1:
            x = in_groups(index, x)
        else:
            x = step(index, source.layer(index), x)
        if on_layer:
            on_layer(index)
    return x


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
    text = in_batches(source, tokens, valid, batch)

    def step(index: int, layer: DecoderLayer, x: list[np.ndarray]) -> list[np.ndarray]:
        return text.each(x, lambda part, place, rows: layer_forward(layer, part, place))

    x = sweep(source, text.embedded(source, dtype), step, on_layer=on_layer)
    return text.joined(x, np.empty((*tokens.shape, source.config.d_model), dtype))


# --- sources made of others ---


@dataclass(frozen=True)
class _Mapped:
    base: LayerSource
    change: Callable[[int, DecoderLayer], DecoderLayer]
    by_group: bool

    @property
    def config(self) -> ModelConfig:
        return self.base.config

    @property
    def embedding(self) -> Embedding:
        return self.base.embedding

    @property
    def head(self) -> Head:
        return self.base.head

    def __len__(self) -> int:
        return len(self.base)

    def layer(self, index: int) -> DecoderLayer:
        return self.change(index, self.base.layer(index))

    def groups(self, index: int) -> int:
        return groups_of(self.base, index) if self.by_group else 1

    def group(self, index: int, number: int) -> DecoderLayer:
        if not self.by_group:
            return self.layer(index)
        return self.change(index, group_of(self.base, index, number))


def mapped(
    source: LayerSource,
    change: Callable[[int, DecoderLayer], DecoderLayer],
    by_group: bool = False,
) -> LayerSource:
    """A model whose layers are changed as they are read.

    Args:
      source: the model to change.
      change: (index, layer) -> the layer in its place.
      by_group: whether `change` also takes a group of a layer; otherwise layers are read whole.

    Returns:
      A source with the config, embedding and head of `source`.
    """
    return _Mapped(source, change, by_group)
