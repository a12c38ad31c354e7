"""How alike the experts of a layer are, by what they make of a text and what is sent to them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from moe_jax.attention.context import Context
from moe_jax.experts.dispatch import sum_by_expert
from moe_jax.experts.moe import MoE
from moe_jax.transformer import DecoderLayer
from pruning.scores.details import all_rows
from pruning.scores.expert_sums import observe_experts

TOKENS = 2048  # which all experts are run on, routed there or not
STEP = 32  # of them at a time
KEPT = 4  # of a step whose hidden rows are kept
HIGHEST = jax.lax.Precision.HIGHEST


@dataclass(frozen=True, eq=False)
class Likeness:
    """What a text shows of the experts of a layer.

    Attributes:
      outputs: float64 [E, D], mean output of each expert over the same tokens.
      cosine: float64 [E, E], mean over these tokens of the cosine between two experts' outputs.
      routing: float64 [E, E], cosine between two experts' router logits, over the tokens.
      saliency: float64 [E], mean routing weight x norm of the output over an expert's own tokens,
        as of REAP, arXiv 2510.13999; 0 for one that no token goes to.
      hidden: float32 [E, F, S], what the channels make of some of the same tokens.
    """

    outputs: np.ndarray
    cosine: np.ndarray
    routing: np.ndarray
    saliency: np.ndarray
    hidden: np.ndarray


def likeness(
    layer: DecoderLayer, middle: Sequence[np.ndarray], places: Sequence[Context]
) -> Likeness:
    """How alike the experts of a layer are.

    What the router says is taken from all tokens; all experts are run on `TOKENS` of them, spread
    evenly over every batch.

    Args:
      layer: with dense experts.
      middle: per batch [b, T, D], behind the layer's attention.
      places: per batch, where its tokens stand.
    """
    sent, made, hidden = [], [], []
    for part, place in zip(middle, places, strict=True):
        sent.append(_sent(layer, jnp.asarray(part), place))
        rows = part.reshape(-1, part.shape[-1])
        for index, real in _steps(np.asarray(place.valid), -(-TOKENS // len(places))):
            sums, kept = _made(layer, jnp.asarray(rows[index]), jnp.asarray(real))
            made.append(sums)
            hidden.append(np.asarray(kept))
    gram, weighted, own = _totals(sent)
    outputs, cosine, count = _totals(made)
    norm = np.sqrt(np.diagonal(gram))
    return Likeness(
        outputs=outputs / count,
        cosine=cosine / count,
        routing=_quotient(gram, np.outer(norm, norm)),
        saliency=_quotient(weighted, own),
        hidden=np.concatenate(hidden, axis=2),
    )


def _totals(found: Sequence[tuple[Array, ...]]) -> list[np.ndarray]:
    """The float64 sums over batches of each of the arrays that every batch has."""
    each = zip(*found, strict=True)
    return [reduce(np.add, (np.asarray(one, np.float64) for one in parts)) for parts in each]


def _quotient(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _steps(valid: np.ndarray, most: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Places [`STEP`] of a batch's tokens, evenly spread, and which of these there are."""
    tokens = np.flatnonzero(valid)
    count = min(most, len(tokens))
    chosen = tokens[np.arange(count) * len(tokens) // max(count, 1)]
    missing = -count % STEP
    real = np.arange(count + missing) < count
    chosen = np.pad(chosen, (0, missing))
    return list(zip(chosen.reshape(-1, STEP), real.reshape(-1, STEP), strict=True))


@jax.jit
def _sent(layer: DecoderLayer, middle: Array, context: Context) -> tuple[Array, Array, Array]:
    """Of a batch: the products of experts' logits [E, E], the sums over each expert's tokens of
    routing weight x norm of the output [E], and how many these are [E]."""
    trace = layer.feed_forward(middle, context, observe_experts)[1]
    assert trace is not None
    logits = jnp.where(trace.valid[:, None], trace.logits, 0.0)
    gram = jnp.einsum("ne,nf->ef", logits, logits, precision=HIGHEST)
    weighted = trace.row_weight * jnp.sqrt(trace.kept.out_square)
    return gram, sum_by_expert(weighted, trace.dispatch), trace.dispatch.tokens


@jax.jit
def _made(
    layer: DecoderLayer, middle: Array, real: Array
) -> tuple[tuple[Array, Array, Array], Array]:
    """Of the tokens [S, D] that are `real`: the sums of all experts' outputs [E, D] and of the
    cosines between them [E, E], how many these tokens are; and hidden rows [E, F, `KEPT`]."""
    assert isinstance(layer.mlp, MoE)
    hidden, out = all_rows(layer, middle)
    there = real[None, :, None]
    out = jnp.where(there, out.astype(jnp.float32), 0.0)
    norm = jnp.linalg.norm(out, axis=2, keepdims=True)
    unit = jnp.where(norm > 0, out / jnp.where(norm > 0, norm, 1.0), 0.0)
    cosine = jnp.einsum("esd,fsd->ef", unit, unit, precision=HIGHEST)
    kept = jnp.where(there[:, :KEPT], hidden[:, :KEPT].astype(jnp.float32), 0.0)
    return (out.sum(axis=1), cosine, real.sum()), jnp.swapaxes(kept, 1, 2)
