"""Budget allocation: how many channels each expert keeps.

Every planner is one priority per channel (`pruning.budget.objectives`) and one shared selection
that keeps the `total` smallest priorities exactly. Sorting and prefix sums stay in numpy (sorting
is 14 times faster than XLA's on a CPU, and compiling a long prefix sum takes longer than running
it).

Source: coverage maximisation of arXiv 2606.18304. Its bisection finds the level below which a
channel's covered-before share lies; that level is the budget-th smallest share, so a partial sort
finds it without a search, and exactly.
"""

import dataclasses
import functools
from typing import Protocol

import numpy as np

from moe_jax.errors import InputError, choose
from pruning.budget.apportion import apportion
from pruning.budget.importance import (
    WEIGHTS,
    PlannerOptions,
    Weights,
    attribution_weights,
    equal_weights,
    inverse_layer_mean,
    layer_weights,
    paper_weights,
    share_weights,
)
from pruning.budget.objectives import (
    Priority,
    equal_width,
    fair,
    linear,
    max_min,
    prioritize,
    proportional,
    top_score,
)
from pruning.scores.criteria import ChannelScores

DEFAULTS = PlannerOptions()


class Planner(Protocol):
    """Decides the widths of all experts of a model."""

    def __call__(
        self,
        scores: ChannelScores,
        budget: int,
        floor: np.ndarray,  # [L, E]
        most: np.ndarray | None = None,  # [L, E]
        *,
        options: PlannerOptions = DEFAULTS,
    ) -> np.ndarray:  # [L, E]
        """Channels kept, int64, at least `floor`, at most `most`, summing to the budget."""
        ...


def select(
    priority: np.ndarray,  # [P, G, C]
    totals: np.ndarray,  # [P]
    floor: np.ndarray,  # [P, G]
    most: np.ndarray | None = None,  # [P, G]
) -> np.ndarray:  # [P, G]
    """Keep exactly the `totals` smallest priorities of each of P independent problems.

    Ties go to the lower group index.

    Args:
      priority: float64, non-decreasing along the last axis.
      totals: channels to keep per problem, int.
      floor: channels each group keeps in any case, int in [0, C].
      most: channels each group keeps at most, int in [floor, C]; default C.

    Returns:
      Channels kept per group, int64; sums exactly to `totals`.

    Raises:
      InputError: a total is below the sum of its floors or above the channels there are.
    """
    totals = np.asarray(totals, np.int64)
    channels = priority.shape[2]
    ceiling = np.full(floor.shape, channels) if most is None else most
    assert (floor <= ceiling).all(), "a floor above the ceiling"
    least, available = floor.sum(axis=1), ceiling.sum(axis=1)
    if (totals < least).any() or (totals > available).any():
        worst = int(np.argmax((totals < least) | (totals > available)))
        raise InputError(
            f"budget {totals[worst]} must lie between the floors' sum {least[worst]} and the "
            f"{available[worst]} channels there are; lower the prune rate or the minimum width"
        )
    place = np.arange(channels)
    priority = np.where(place < floor[:, :, None], -np.inf, priority)
    if most is not None:
        priority[place >= most[:, :, None]] = np.inf
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
    most: np.ndarray | None = None,  # [L, E]
    *,
    options: PlannerOptions = DEFAULTS,
    priority: Priority,
    weights: Weights,
) -> np.ndarray:  # [L, E]
    """Allocate over all experts of all layers at once."""
    if options.weights is not None:
        weights = choose(WEIGHTS, options.weights, "weights")
    layers, experts, channels = scores.channel.shape
    pool = scores.channel.reshape(-1, channels)
    value = prioritize(priority, pool, weights(scores, options).reshape(-1), options.rho_max)
    counts = select(value[None], np.array([budget]), *_flat(floor, most))
    return counts.reshape(layers, experts)


def two_level(
    scores: ChannelScores,
    budget: int,
    floor: np.ndarray,  # [L, E]
    most: np.ndarray | None = None,  # [L, E]
    *,
    options: PlannerOptions = DEFAULTS,
    priority: Priority = max_min,
) -> np.ndarray:  # [L, E]
    """The paper's rule: max-min coverage over layers, then over the experts of each layer.

    A layer's group is all its channels pooled, its weight the smoothed layer loss; an expert's
    weight is its share by square-root attribution. Dividing the scores of a layer by their mean,
    as the paper does, changes nothing here: coverage is a ratio inside the layer.
    """
    layers, experts, channels = scores.channel.shape
    pool = scores.channel.reshape(layers, -1)
    value = prioritize(priority, pool, layer_weights(scores, options), options.rho_max)
    ceiling = None if most is None else most.sum(axis=1)[None]
    totals = select(value[None], np.array([budget]), floor.sum(axis=1)[None], ceiling)[0]
    weights = share_weights(np.sqrt(scores.expert))
    if options.weights is not None:
        weights = choose(WEIGHTS, options.weights, "weights")(scores, options)
    pool = scores.channel.reshape(-1, channels)
    value = prioritize(priority, pool, weights.reshape(-1), options.rho_max)
    return select(value.reshape(layers, experts, channels), totals, floor, most)


def layer_topk(
    scores: ChannelScores,
    budget: int,
    floor: np.ndarray,  # [L, E]
    most: np.ndarray | None = None,  # [L, E]
    *,
    options: PlannerOptions = DEFAULTS,
) -> np.ndarray:  # [L, E]
    """The best channels of each layer, every layer keeping the same number."""
    layers, experts, channels = scores.channel.shape
    ceiling = experts * channels if most is None else most.sum(axis=1)
    totals = apportion(np.ones(layers), budget, floor.sum(axis=1), ceiling)
    weights = equal_weights(scores, options).reshape(-1)
    pool = scores.channel.reshape(-1, channels)
    value = prioritize(top_score, pool, weights, options.rho_max)
    return select(value.reshape(layers, experts, channels), totals, floor, most)


def random_counts(
    scores: ChannelScores,
    budget: int,
    floor: np.ndarray,  # [L, E]
    most: np.ndarray | None = None,  # [L, E]
    *,
    options: PlannerOptions = DEFAULTS,
    seed: int = 0,
) -> np.ndarray:  # [L, E]
    """Counts of a uniformly random choice of channels; with criterion "random", that choice."""
    del options
    layers, experts, channels = scores.channel.shape
    value = np.sort(np.random.default_rng(seed).random((1, layers * experts, channels)), axis=2)
    counts = select(value, np.array([budget]), *_flat(floor, most))
    return counts.reshape(layers, experts)


def moe_i2(
    scores: ChannelScores,
    budget: int,
    floor: np.ndarray,  # [L, E]
    most: np.ndarray | None = None,  # [L, E]
    *,
    options: PlannerOptions = DEFAULTS,
) -> np.ndarray:  # [L, E]
    """Widths in proportion to importance: of the layer, then of the expert inside it.

    The layer's importance is the sum of its experts'; nothing is smoothed.

    Source: our reading of MoE-I2, arXiv 2411.01016, with channels in place of ranks.
    """
    options = dataclasses.replace(
        options, layer_loss="attribution", passes=0, rho_max=1.0, weights="attribution"
    )
    return two_level(scores, budget, floor, most, options=options, priority=proportional)


def cd_moe(
    scores: ChannelScores,
    budget: int,
    floor: np.ndarray,  # [L, E]
    most: np.ndarray | None = None,  # [L, E]
    *,
    options: PlannerOptions = DEFAULTS,
) -> np.ndarray:  # [L, E]
    """Whole layers condensed to their always-on experts, the least divergent layers first.

    A layer's divergence is its loss without routed experts, its always-on experts are those with a
    floor. The layer, and in it the expert, that meets the end of the budget is cut.

    Source: our reading of CD-MoE, arXiv 2412.00069. It measures the divergence again after each
    layer; where losses add up, that greedy choice is this order.
    """
    del options
    experts, channels = scores.channel.shape[1:]
    layer_rank = np.argsort(np.argsort(-scores.layer, kind="stable"), kind="stable")
    expert_rank = np.argsort(np.argsort(-scores.expert, axis=1, kind="stable"), axis=1)
    order = np.where(floor > 0, -1.0, layer_rank[:, None] * experts + expert_rank)
    value = np.repeat(order.reshape(1, -1, 1), channels, axis=2)
    return select(value, np.array([budget]), *_flat(floor, most))[0].reshape(floor.shape)


def _flat(floor: np.ndarray, most: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    return floor.reshape(1, -1), None if most is None else most.reshape(1, -1)


def _fair(degree: float) -> Priority:
    return functools.partial(fair, degree=degree)


def _one_level(priority: Priority, weights: Weights) -> Planner:
    return functools.partial(one_level, priority=priority, weights=weights)


PLANNERS: dict[str, Planner] = {
    "paper": two_level,
    "fair_two_level": functools.partial(two_level, priority=fair),
    "linear_two_level": functools.partial(two_level, priority=linear),
    "maxmin": _one_level(max_min, paper_weights),
    "fair": _one_level(fair, attribution_weights),
    "fair0.5": _one_level(_fair(0.5), attribution_weights),
    "fair2": _one_level(_fair(2.0), attribution_weights),
    "linear": _one_level(linear, attribution_weights),
    "uniform": _one_level(equal_width, equal_weights),
    "random": random_counts,
    "global_topk": _one_level(top_score, equal_weights),
    "normalized_topk": _one_level(top_score, inverse_layer_mean),
    "layer_topk": layer_topk,
    "moe_i2": moe_i2,
    "cd_moe": cd_moe,
}

# What a planner would maximise if it could choose among aligned widths: the degree of fairness and
# the name of its weights. The max-min rules count by the coverage they are reported in. The others
# have no such sum.
OBJECTIVES: dict[str, tuple[float, str]] = {
    "paper": (0.0, "paper"),
    "fair_two_level": (1.0, "paper"),
    "linear_two_level": (0.0, "paper"),
    "maxmin": (0.0, "paper"),
    "fair": (1.0, "attribution"),
    "fair0.5": (0.5, "attribution"),
    "fair2": (2.0, "attribution"),
    "linear": (0.0, "attribution"),
    "global_topk": (0.0, "mass"),
    "normalized_topk": (0.0, "normalized_mass"),
}
