"""What a channel is worth next: one priority per channel, the smaller is kept first.

A priority is non-decreasing along an expert's channels from best to worst. Coverage of an expert
is the share of its score that its kept channels hold; the objectives differ in what they make of
it. They are jitted and see all groups at once, in float64.

Source: arXiv 2606.18304; that a sort solves the separable ones exactly is Proposition 4 of the
design.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

# (best [G, C] scores from best to worst, before [G, C] their sum before each channel,
# weights [G, 1]) -> [G, C].
Priority = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

# Fairness of degree 1 and more is infinitely unhappy with an empty expert; this share of coverage
# added to all keeps it finite.
FAIR_OFFSET = 1e-4


@jax.jit
def max_min(best: jax.Array, before: jax.Array, weights: jax.Array) -> jax.Array:  # [G, C]
    """Weighted max-min coverage: the share covered before the channel, over the weight.

    Nothing is covered before any group's first channel; those rank by what they gain.

    Source: Algorithm 1 of arXiv 2606.18304.
    """
    covered, gain = _coverage(best, before)
    level = covered * (weights.min() / weights)
    level = level.at[:, 0].set(-gain[:, 0] * weights[:, 0])
    return _zeros_last(best, level)


@jax.jit
def linear(best: jax.Array, before: jax.Array, weights: jax.Array) -> jax.Array:  # [G, C]
    """Weighted sum of coverages: the gain of a channel is its normalised score."""
    _, gain = _coverage(best, before)
    return _zeros_last(best, -weights * gain)


@functools.partial(jax.jit, static_argnames="degree")
def fair(
    best: jax.Array, before: jax.Array, weights: jax.Array, *, degree: float = 1.0
) -> jax.Array:  # [G, C]
    """Weighted fairness of a degree k: the utility of coverage r is r^(1-k) / (1-k), or log r.

    Degree 0 is `linear`, 1 proportional fairness; the higher, the nearer to max-min.
    """
    covered, gain = _coverage(best, before)
    if degree >= 1.0:
        covered = covered + FAIR_OFFSET
    # Not as a difference of two utilities, which for small gains would be rounding error.
    growth = jnp.log1p(gain / jnp.where(covered > 0.0, covered, 1.0))
    if degree == 1.0:
        return _zeros_last(best, -weights * growth)
    power = 1.0 - degree
    gained = covered**power * jnp.expm1(power * growth) / power
    from_nothing = gain**power / power if degree < 1.0 else gained
    return _zeros_last(best, -weights * jnp.where(covered > 0.0, gained, from_nothing))


@jax.jit
def top_score(best: jax.Array, before: jax.Array, weights: jax.Array) -> jax.Array:  # [G, C]
    """Weighted score: the best channels of the pool, whichever expert they belong to."""
    del before
    return _zeros_last(best, -weights * best)


@jax.jit
def equal_width(best: jax.Array, before: jax.Array, weights: jax.Array) -> jax.Array:  # [G, C]
    """Rank inside the expert: every expert keeps the same number of channels."""
    del before, weights
    return _rank_share(best)


@jax.jit
def proportional(best: jax.Array, before: jax.Array, weights: jax.Array) -> jax.Array:  # [G, C]
    """Rank over weight: every group's width is in proportion to its weight, whatever its scores.

    Half a channel is added to the rank, so that widths are rounded to the nearest.
    """
    del before
    half = 0.5 / best.shape[1]
    return (_rank_share(best) + half) * (weights.min() / weights)


def utility(coverage: np.ndarray, degree: float) -> np.ndarray:
    """Fairness utility of coverage, as the priorities `linear` and `fair` maximise it.

    Args:
      coverage: in [0, 1].
      degree: 0 (the coverage itself) or more.

    Returns:
      Float64 of the same shape, non-decreasing and concave in the coverage.
    """
    shifted = np.asarray(coverage, np.float64) + (FAIR_OFFSET if degree >= 1.0 else 0.0)
    return np.log(shifted) if degree == 1.0 else shifted ** (1.0 - degree) / (1.0 - degree)


def _coverage(best: jax.Array, before: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The share covered before each channel, and the share it adds.
    total = before[:, -1:] + best[:, -1:]
    total = jnp.where(total > 0.0, total, 1.0)
    return before / total, best / total


def _rank_share(best: jax.Array) -> jax.Array:
    return jax.lax.broadcasted_iota(best.dtype, best.shape, 1) / best.shape[1]


def _zeros_last(best: jax.Array, priority: jax.Array) -> jax.Array:
    # Every priority above is at most 1. A channel of score 0 adds no coverage, so it comes after
    # all others, and a group without any score fills at the same pace as its peers.
    return jnp.where(best > 0.0, priority, 2.0 + _rank_share(best))


def prioritize(
    priority: Priority,
    scores: np.ndarray,  # [G, C]
    weights: np.ndarray,  # [G]
    rho_max: float = 1.0,
) -> np.ndarray:  # [G, C]
    """Sort each group's scores from best to worst and evaluate a priority in float64.

    Weights are raised to 1e-12 of the largest, so that a group of weight 0 comes last instead of
    dividing by it; without any positive weight all count the same.

    Args:
      priority: the objective.
      scores: non-negative.
      weights: non-negative.
      rho_max: coverage at which a group is satisfied: the score beyond it counts nothing, and
        coverage is measured in units of it.
    """
    top = weights.max()
    weights = np.maximum(weights / top, 1e-12) if top > 0.0 else np.ones_like(weights)
    best = -scores
    best.sort(axis=1)
    np.negative(best, out=best)
    before = np.zeros_like(best)
    np.cumsum(best[:, :-1], axis=1, out=before[:, 1:])
    scored = best > 0.0 if rho_max < 1.0 else None
    if rho_max < 1.0:
        enough = rho_max * (before[:, -1:] + best[:, -1:])
        before = np.minimum(before, enough)
        best = np.minimum(best, enough - before)
    with jax.enable_x64(True):
        arrays = jax.device_put((best, before, weights[:, None]))
        value = np.asarray(priority(*arrays))
    if scored is None:
        return value
    # Beyond satisfaction, but before the channels that have no score at all.
    return np.where(scored & (best <= 0.0) & (value >= 2.0), 0.5 + 0.5 * value, value)
