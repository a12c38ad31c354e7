"""Quality on held-out text: likelihood, and agreement with the dense model."""

import math
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.errors import InputError
from moe_jax.files import scratch_file
from moe_jax.groups import add_group, through_groups
from moe_jax.source import groups_of
from moe_jax.stream import LayerSource, in_batches, layer_forward, pad_rows, sweep
from moe_jax.transformer import DecoderLayer, Head
from pruning.kit.memory import trim_heap
from pruning.scores.states import InSlot, States, state_bytes, temporary_states
from pruning.text.windows import Windows

# Logits in memory at once; a whole window of them is gigabytes for large vocabularies.
POSITIONS = 256


@dataclass(frozen=True)
class Quality:
    """Likelihood of a text, and agreement with a reference model if there is one.

    Attributes:
      nll: nats per predicted token.
      perplexity: exp(nll).
      tokens: predicted tokens; every token but the first counts once.
      kl: mean KL divergence of the reference from this model, nats per token.
      top1: share of positions at which both models' most likely token agrees.
    """

    nll: float
    perplexity: float
    tokens: int
    kl: float | None = None
    top1: float | None = None

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


@jax.jit
def _loss(head: Head, x: Array, targets: Array) -> Array:  # [P, D], [P] -> [P]
    logp = jax.nn.log_softmax(head(x), axis=-1)
    return -jnp.take_along_axis(logp, targets[:, None], axis=-1)[:, 0]


@jax.jit
def _entropy(head: Head, x: Array) -> Array:  # [P, D] -> [P]
    logp = jax.nn.log_softmax(head(x), axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


@jax.jit
def _compare(
    head: Head, x: Array, targets: Array, reference: Head, r: Array
) -> tuple[Array, Array, Array]:  # [P, D], [P], [P, D] -> loss, KL divergence, agreement, each [P]
    expected, actual = (jax.nn.log_softmax(h(y), axis=-1) for h, y in ((reference, r), (head, x)))
    loss = -jnp.take_along_axis(actual, targets[:, None], axis=-1)[:, 0]
    kl = jnp.sum(jnp.exp(expected) * (expected - actual), axis=-1)
    return loss, kl, jnp.argmax(expected, axis=-1) == jnp.argmax(actual, axis=-1)


@dataclass(frozen=True)
class Reference:
    """The dense model's last hidden states on some windows, kept to compare variants with."""

    head: Head
    hidden: np.ndarray | States  # [B, T, D], or [1, B, T, D] in a file


def measure_quality(
    source: LayerSource,
    windows: Windows,
    *,
    reference: Reference | None = None,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
    scratch: Path | None = None,
) -> tuple[Quality, Reference]:
    """Score a model on windows, streaming its layers.

    Args:
      source: the model.
      windows: the text.
      reference: what an earlier call returned for the dense model.
      batch: windows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.
      scratch: folder of a file with the hidden states, gone with the reference; default in memory.

    Returns:
      (quality, this model's own reference for later comparisons).

    Raises:
      InputError: if the model's output is not finite.
      FullDiskError: there is no room in the scratch folder.
    """
    batch = min(batch, len(windows.tokens))  # a short text is not padded to a whole batch
    own = Reference(source.head, _hidden(source, windows, batch, dtype, on_layer, scratch))
    trim_heap()  # the layers go before the logits of a large vocabulary come
    return quality_of(own, windows, reference), own


def _hidden(
    source: LayerSource,
    windows: Windows,
    batch: int,
    dtype,
    on_layer: Callable[[int], None] | None,
    scratch: Path | None,
) -> States:
    """Hidden states before the head, those of padding to whole batches included."""
    text = in_batches(source, windows.tokens, windows.valid, batch)
    shape = (*text.tokens.shape, source.config.d_model)
    file = None if scratch is None else scratch_file(scratch, state_bytes(1, shape, dtype))
    states = States(1, shape, dtype, file)
    if file is not None:
        weakref.finalize(states, file.close)
    for rows in text.rows:
        states.put(0, rows, source.embedding(text.tokens[rows], dtype))

    def step(index: int, layer: DecoderLayer, _: None) -> None:
        for rows, place in zip(text.rows, text.places, strict=True):
            states.put(0, rows, layer_forward(layer, jnp.asarray(states.get(0, rows)), place))

    x = InSlot(states, 0, text.rows)
    grouped = any(groups_of(source, index) > 1 for index in range(len(source)))
    with temporary_states(2 if grouped else 0, shape, jnp.float32, scratch) as beside:
        between = InSlot(beside, 0, text.rows), InSlot(beside, 1, text.rows)

        def in_groups(index: int, _: None) -> None:
            through_groups(source, index, [(text, x, add_group)], lambda _: between)

        sweep(source, None, step, on_layer=on_layer, in_groups=in_groups)
    return states


def quality_of(model: Reference, windows: Windows, reference: Reference | None = None) -> Quality:
    """Score last hidden states.

    Args:
      model: the states and the head they go through.
      windows: the text they come from.
      reference: the dense model's.

    Raises:
      InputError: if the model's output is not finite.
    """
    head, rows, places = model.head, *np.nonzero(windows.scored)  # [P] each
    nll = kl = agree = 0.0
    for start in range(0, len(rows), POSITIONS):
        at = rows[start : start + POSITIONS], places[start : start + POSITIONS]
        count = len(at[0])
        x, y = _states_at(model, *at), _targets_at(windows, *at)
        if reference is None:
            nll += _total(_loss(head, x, y), count)
            continue
        r = _states_at(reference, *at)
        found = _compare(head, x, y, reference.head, r)
        nll, kl, agree = (
            total + _total(v, count) for total, v in zip((nll, kl, agree), found, strict=True)
        )
    count = int(windows.scored.sum())
    mean = nll / count
    if not math.isfinite(mean):
        raise InputError(f"the loss on the text is {mean}; the model's weights are broken")
    quality = Quality(mean, math.exp(min(mean, 700.0)), count)
    if reference is not None:
        quality = Quality(quality.nll, quality.perplexity, count, max(0.0, kl / count),
                          agree / count)  # fmt: skip
    return quality


def window_losses(model: Reference, windows: Windows) -> np.ndarray:
    """The loss of every window.

    Args:
      model: last hidden states, and the head they go through.
      windows: the text they come from.

    Returns:
      float64 [B], nats summed over the predictions that are scored.

    Raises:
      InputError: if the model's output is not finite.
    """
    rows, places = np.nonzero(windows.scored)
    found = np.zeros(len(rows))
    for start in range(0, len(rows), POSITIONS):
        part = slice(start, start + POSITIONS)
        at = rows[part], places[part]
        losses = _loss(model.head, _states_at(model, *at), _targets_at(windows, *at))
        found[part] = np.asarray(losses, np.float64)[: len(at[0])]
    if not np.isfinite(found).all():
        raise InputError("the loss on the text is not finite; the model's weights are broken")
    return np.bincount(rows, weights=found, minlength=len(windows.tokens))


def mean_entropy(model: Reference, windows: Windows) -> float:
    """Entropy of the predictions that are scored.

    Args:
      model: last hidden states, and the head they go through.
      windows: the text they come from.

    Returns:
      Nats, mean over the predictions.
    """
    rows, places = np.nonzero(windows.scored)
    total = 0.0
    for start in range(0, len(rows), POSITIONS):
        at = rows[start : start + POSITIONS], places[start : start + POSITIONS]
        total += _total(_entropy(model.head, _states_at(model, *at)), len(at[0]))
    return total / len(rows)


def _states_at(model: Reference, rows: np.ndarray, places: np.ndarray) -> Array:
    """States [POSITIONS, D] of some places in windows, zero beyond these; a window is read at a
    time, for where they lie in a file all of them may be more than memory holds."""
    found = [
        model.hidden[row : row + 1][0, places[rows == row]] for row in dict.fromkeys(rows.tolist())
    ]
    return jnp.asarray(pad_rows(np.concatenate(found), POSITIONS))


def _targets_at(windows: Windows, rows: np.ndarray, places: np.ndarray) -> Array:
    """The tokens [POSITIONS] that follow these places."""
    return jnp.asarray(pad_rows(windows.tokens[rows, places + 1], POSITIONS))


def _total(values: Array, count: int) -> float:
    return float(np.asarray(values, np.float64)[:count].sum())
