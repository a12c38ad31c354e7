"""Quality on held-out text: likelihood, and agreement with the dense model."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.errors import InputError
from moe_jax.stream import LayerSource, forward_hidden, pad_rows
from moe_jax.transformer import Head
from pruning.kit.memory import trim_heap
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
    hidden: np.ndarray  # [B, T, D]


def measure_quality(
    source: LayerSource,
    windows: Windows,
    *,
    reference: Reference | None = None,
    batch: int = 8,
    dtype=jnp.float32,
    on_layer: Callable[[int], None] | None = None,
) -> tuple[Quality, Reference]:
    """Score a model on windows, streaming its layers.

    Args:
      source: the model.
      windows: the text.
      reference: what an earlier call returned for the dense model.
      batch: windows per step.
      dtype: of the activations.
      on_layer: called with the index of each finished layer.

    Returns:
      (quality, this model's own reference for later comparisons).

    Raises:
      InputError: if the model's output is not finite.
    """
    batch = min(batch, len(windows.tokens))  # a short text is not padded to a whole batch
    hidden = forward_hidden(
        source, windows.tokens, windows.valid, batch=batch, dtype=dtype, on_layer=on_layer
    )
    own = Reference(source.head, hidden)
    trim_heap()  # the layers go before the logits of a large vocabulary come
    return quality_of(own, windows, reference), own


def quality_of(model: Reference, windows: Windows, reference: Reference | None = None) -> Quality:
    """Score last hidden states.

    Args:
      model: the states and the head they go through.
      windows: the text they come from.
      reference: the dense model's.

    Raises:
      InputError: if the model's output is not finite.
    """
    head, hidden, scored = model.head, model.hidden, windows.scored
    states, targets = hidden[:, :-1][scored], windows.tokens[:, 1:][scored]  # [P, D], [P]
    expected = None if reference is None else reference.hidden[:, :-1][scored]
    nll = kl = agree = 0.0
    for start in range(0, len(states), POSITIONS):
        part = slice(start, start + POSITIONS)
        count = len(targets[part])
        x, y = (jnp.asarray(pad_rows(v[part], POSITIONS)) for v in (states, targets))
        if reference is None or expected is None:
            nll += _total(_loss(head, x, y), count)
            continue
        r = jnp.asarray(pad_rows(expected[part], POSITIONS))
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
    scored = windows.scored
    states, targets = model.hidden[:, :-1][scored], windows.tokens[:, 1:][scored]
    found = np.zeros(len(targets))
    for start in range(0, len(targets), POSITIONS):
        part = slice(start, start + POSITIONS)
        x, y = (jnp.asarray(pad_rows(v[part], POSITIONS)) for v in (states, targets))
        found[part] = np.asarray(_loss(model.head, x, y), np.float64)[: len(targets[part])]
    if not np.isfinite(found).all():
        raise InputError("the loss on the text is not finite; the model's weights are broken")
    return np.bincount(np.nonzero(scored)[0], weights=found, minlength=len(windows.tokens))


def _total(values: Array, count: int) -> float:
    return float(np.asarray(values, np.float64)[:count].sum())
