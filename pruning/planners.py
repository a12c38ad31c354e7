"""Budget allocation: how many channels each expert keeps.

Every planner is one priority per channel, non-decreasing along an expert's channels from best to
worst, and one shared selection that keeps the `total` smallest priorities exactly. Sorting and
prefix sums stay in numpy (sorting is 14 times faster than XLA's on a CPU, and compiling a long
prefix sum takes longer than running it); the priorities are jitted and see all layers and experts
at once, in float64.

Source: coverage maximisation of arXiv 2606.18304. Its bisection finds the level below which a
channel's covered-before share lies; that level is the budget-th smallest share, so a partial sort
finds it without a search, and exactly.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pruning.criteria import ChannelScores, choose

# (scores, budget, floor [L, E]) -> channels kept, int64 [L, E], summing to the budget.
Planner = Callable[[ChannelScores, int, np.ndarray], np.ndarray]
# (best [G, C] scores from best to worst, before [G, C] their sum before each channel,
# weights [G, 1]) -> [G, C]; the smaller is kept first.
Priority = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# scores -> [L, E]
Weights = Callable[[ChannelScores], np.ndarray]

# Smallest weight of an expert, as a share of the layer's mean weight.
WEIGHT_FLOOR = 1e-3
# Utility of coverage r is log(r + FAIR_OFFSET): finite for an empty expert.
FAIR_OFFSET = 1e-4

SMOOTHINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sqrt": np.sqrt,
    "identity": lambda loss: loss,
    "log5": lambda loss: np.log1p(5.0 * loss),
    "log20": lambda loss: np.log1p(20.0 * loss),
    "clip": lambda loss: _clip_to_spread(loss, 0.5),
}


def smooth_layer_loss(
    loss: np.ndarray,  # [L]
    how: str = "sqrt",
    passes: int = 1,
) -> np.ndarray:  # [L]
    """Compress the spread of the layer losses, so that no layer takes the whole budget.

    One pass applies the function, then clips to mean +- one sample standard deviation.

    Args:
      loss: non-negative loss per layer; its unit matters for the logarithms only.
      how: a name of `SMOOTHINGS`.
      passes: how often; 0 only normalises. The paper's curve is one pass, its release does four.

    Returns:
      Layer weights with mean 1; all ones when the losses do not differ.

    Raises:
      ValueError: the name is unknown or passes is negative.

    Source: arXiv 2606.18304, section 4.2.
    """
    if passes < 0:
        raise ValueError(f"passes={passes} must be 0 or more; the paper uses 1")
    compress = choose(SMOOTHINGS, how, "smoothing")
    loss = np.asarray(loss, np.float64)
    if loss.size < 2 or np.ptp(loss) == 0.0:
        return np.ones_like(loss)
    for _ in range(passes):
        loss = _clip_to_spread(compress(loss), 1.0)
    return loss / loss.mean()


def _clip_to_spread(loss: np.ndarray, deviations: float) -> np.ndarray:
    spread = deviations * loss.std(ddof=1)
    return np.clip(loss, loss.mean() - spread, loss.mean() + spread)


def share_weights(attribution: np.ndarray) -> np.ndarray:  # [L, E] -> [L, E]
    """Each expert's share of its layer, summing to 1 before a floor of 1e-3 / E.

    A layer without positive attribution gets equal shares.
    """
    experts = attribution.shape[1]
    total = attribution.sum(axis=1, keepdims=True)
    equal = np.full_like(attribution, 1.0 / experts)
    share = np.divide(attribution, total, out=equal, where=total > 0.0)
    return np.maximum(share, WEIGHT_FLOOR / experts)


def paper_weights(scores: ChannelScores) -> np.ndarray:  # [L, E]
    """Smoothed layer loss times the expert's share by square-root attribution."""
    return smooth_layer_loss(scores.layer)[:, None] * share_weights(np.sqrt(scores.expert))


def attribution_weights(scores: ChannelScores) -> np.ndarray:  # [L, E]
    """The attribution itself, floored inside its layer."""
    return scores.expert.sum(axis=1, keepdims=True) * share_weights(scores.expert)


def equal_weights(scores: ChannelScores) -> np.ndarray:  # [L, E]
    """Weight 1 for every expert."""
    return np.ones_like(scores.expert)


def inverse_layer_mean(scores: ChannelScores) -> np.ndarray:  # [L, E]
    """One over the layer's mean channel score: the paper's normalisation for pooled channels."""
    mean = scores.channel.mean(axis=(1, 2))[:, None]  # [L, 1]
    inverse = np.divide(1.0, mean, out=np.ones_like(mean), where=mean > 0.0)
    return np.broadcast_to(inverse, scores.expert.shape)


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


@jax.jit
def fair(best: jax.Array, before: jax.Array, weights: jax.Array) -> jax.Array:  # [G, C]
    """Weighted proportional fairness: the utility of an expert is the logarithm of its coverage."""
    covered, gain = _coverage(best, before)
    return _zeros_last(best, -weights * jnp.log1p(gain / (covered + FAIR_OFFSET)))


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
) -> np.ndarray:  # [G, C]
    """Sort each group's scores from best to worst and evaluate a priority in float64.

    Weights are raised to 1e-12 of the largest, so that a group of weight 0 comes last instead of
    dividing by it; without any positive weight all count the same.
    """
    top = weights.max()
    weights = np.maximum(weights / top, 1e-12) if top > 0.0 else np.ones_like(weights)
    best = -scores
    best.sort(axis=1)
    np.negative(best, out=best)
    before = np.zeros_like(best)
    np.cumsum(best[:, :-1], axis=1, out=before[:, 1:])
    with jax.enable_x64(True):
        arrays = jax.device_put((best, before, weights[:, None]))
        return np.asarray(priority(*arrays))


def select(
    priority: np.ndarray,  # [P, G, C]
    totals: np.ndarray,  # [P]
    floor: np.ndarray,  # [P, G]
) -> np.ndarray:  # [P, G]
    """Keep exactly the `totals` smallest priorities of each of P independent problems.

    Ties go to the lower group index.

    Args:
      priority: float64, non-decreasing along the last axis.
      totals: channels to keep per problem, int.
      floor: channels each group keeps in any case, int in [0, C].

    Returns:
      Channels kept per group, int64; sums exactly to `totals`.

    Raises:
      ValueError: a total is below the sum of its floors or above the channels there are.
    """
    totals = np.asarray(totals, np.int64)
    least, most = floor.sum(axis=1), priority[0].size
    if (totals < least).any() or (totals > most).any():
        worst = int(np.argmax((totals < least) | (totals > most)))
        raise ValueError(
            f"budget {totals[worst]} must lie between the floors' sum {least[worst]} and the "
            f"{most} channels there are; lower the prune rate or the minimum width"
        )
    reserved = np.arange(priority.shape[2]) < floor[:, :, None]
    priority = np.where(reserved, -np.inf, priority)
    at = np.maximum(totals - 1, 0)
    flat = priority.reshape(len(totals), -1)
    level = np.array([np.partition(row, k)[k] for row, k in zip(flat, at, strict=True)])
    below = (priority < level[:, None, None]).sum(axis=2)  # [P, G]
    tied = (priority == level[:, None, None]).sum(axis=2)  # [P, G]
    left = (totals - below.sum(axis=1))[:, None]  # [P, 1]
    return below + np.clip(left - (np.cumsum(tied, axis=1) - tied), 0, tied)


def one_level(
    scores: ChannelScores,
    budget: int,
    floor: np.ndarray,  # [L, E]
    *,
    priority: Priority,
    weights: Weights,
) -> np.ndarray:  # [L, E]
    """Allocate over all experts of all layers at once."""
    layers, experts, channels = scores.channel.shape
    pool = scores.channel.reshape(-1, channels)
    value = prioritize(priority, pool, weights(scores).reshape(-1))
    counts = select(value[None], np.array([budget]), floor.reshape(1, -1))
    return counts.reshape(layers, experts)


def two_level(scores: ChannelScores, budget: int, floor: np.ndarray) -> np.ndarray:  # [L, E]
    """The paper's rule: max-min coverage over layers, then over the experts of each layer.

    A layer's group is all its channels pooled, its weight the smoothed layer loss; an expert's
    weight is its share by square-root attribution. Dividing the scores of a layer by their mean,
    as the paper does, changes nothing here: coverage is a ratio inside the layer.
    """
    layers, experts, channels = scores.channel.shape
    pool = scores.channel.reshape(layers, -1)
    value = prioritize(max_min, pool, smooth_layer_loss(scores.layer))
    layer_floor = floor.sum(axis=1, keepdims=True).T  # [1, L]
    totals = select(value[None], np.array([budget]), layer_floor)[0]
    weights = share_weights(np.sqrt(scores.expert)).reshape(-1)
    value = prioritize(max_min, scores.channel.reshape(-1, channels), weights)
    return select(value.reshape(layers, experts, channels), totals, floor)


def layer_topk(scores: ChannelScores, budget: int, floor: np.ndarray) -> np.ndarray:  # [L, E]
    """The best channels of each layer, every layer keeping the same number."""
    layers, experts, channels = scores.channel.shape
    totals = budget // layers + (np.arange(layers) < budget % layers)
    weights = equal_weights(scores).reshape(-1)
    value = prioritize(top_score, scores.channel.reshape(-1, channels), weights)
    return select(value.reshape(layers, experts, channels), totals, floor)


def random_counts(
    scores: ChannelScores, budget: int, floor: np.ndarray, *, seed: int = 0
) -> np.ndarray:  # [L, E]
    """Counts of a uniformly random choice of channels; with criterion "random", that choice."""
    layers, experts, channels = scores.channel.shape
    value = np.sort(np.random.default_rng(seed).random((1, layers * experts, channels)), axis=2)
    counts = select(value, np.array([budget]), floor.reshape(1, -1))
    return counts.reshape(layers, experts)


PLANNERS: dict[str, Planner] = {
    "paper": two_level,
    "maxmin": functools.partial(one_level, priority=max_min, weights=paper_weights),
    "fair": functools.partial(one_level, priority=fair, weights=attribution_weights),
    "linear": functools.partial(one_level, priority=linear, weights=attribution_weights),
    "uniform": functools.partial(one_level, priority=equal_width, weights=equal_weights),
    "random": random_counts,
    "global_topk": functools.partial(one_level, priority=top_score, weights=equal_weights),
    "normalized_topk": functools.partial(one_level, priority=top_score, weights=inverse_layer_mean),
    "layer_topk": layer_topk,
}
