"""The coverage rule and its kin: how many channels each expert keeps.

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

import numpy as np

from pruning.budget.apportion import apportion
from pruning.budget.importance import (
    IMPORTANCE,
    Importance,
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
from pruning.budget.problem import Counts, Objective, Planner, Problem
from pruning.kit.errors import BudgetError


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
        raise BudgetError(
            f"budget {totals[worst]} must lie between the floors' sum {least[worst]} and the "
            f"{available[worst]} channels there are; lower the prune rate or the minimum width"
        )
    place = np.arange(channels)
    priority = np.where(place < floor[:, :, None], -np.inf, priority)
    if (ceiling < channels).any():
        priority[place >= ceiling[:, :, None]] = np.inf
    at = np.maximum(totals - 1, 0)
    flat = priority.reshape(len(totals), -1)
    level = np.array([np.partition(row, k)[k] for row, k in zip(flat, at, strict=True)])
    below = (priority < level[:, None, None]).sum(axis=2)  # [P, G]
    tied = (priority == level[:, None, None]).sum(axis=2)  # [P, G]
    left = (totals - below.sum(axis=1))[:, None]  # [P, 1]
    return below + np.clip(left - (np.cumsum(tied, axis=1) - tied), 0, tied)


def one_level(problem: Problem, *, priority: Priority, weights: Importance) -> Counts:
    """Allocate over all experts of all layers at once."""
    options = problem.options
    weights = IMPORTANCE[options.weights] if options.weights else weights
    weight = weights(problem.scores, options).reshape(-1)
    return _of_all(problem, prioritize(priority, _pool(problem), weight, options.rho_max))


def two_level(problem: Problem, *, priority: Priority = max_min) -> Counts:
    """The paper's rule: max-min coverage over layers, then over the experts of each layer.

    A layer's group is all its channels pooled, its weight the smoothed layer loss; an expert's
    weight is its share by square-root attribution. Dividing the scores of a layer by their mean,
    as the paper does, changes nothing here: coverage is a ratio inside the layer.
    """
    scores, options = problem.scores, problem.options
    pool = scores.channel.reshape(len(scores.channel), -1)
    value = prioritize(priority, pool, layer_weights(scores, options), options.rho_max)
    floor, most = problem.floor.sum(axis=1), problem.most.sum(axis=1)
    totals = select(value[None], np.array([problem.budget]), floor[None], most[None])[0]
    weights = share_weights(np.sqrt(scores.expert))
    if options.weights:
        weights = IMPORTANCE[options.weights](scores, options)
    return _of_layers(problem, totals, priority, weights)


def layer_topk(problem: Problem) -> Counts:
    """The best channels of each layer, every layer keeping the same number."""
    floor, most = problem.floor.sum(axis=1), problem.most.sum(axis=1)
    totals = apportion(np.ones(len(floor)), problem.budget, floor, most)
    weights = equal_weights(problem.scores, problem.options)
    return _of_layers(problem, totals, top_score, weights)


def random_counts(problem: Problem) -> Counts:
    """Counts of a uniformly random choice of channels; with criterion "random", that choice."""
    draws = np.random.default_rng(problem.seed).random((1, *_pool(problem).shape))
    return _of_all(problem, np.sort(draws, axis=2)[0])


def moe_i2(problem: Problem) -> Counts:
    """Widths in proportion to importance: of the layer, then of the expert inside it.

    The layer's importance is the sum of its experts'; nothing is smoothed.

    Source: our reading of MoE-I2, arXiv 2411.01016, with channels in place of ranks.
    """
    options = dataclasses.replace(
        problem.options, layer_loss="attribution", passes=0, rho_max=1.0, weights="attribution"
    )
    return two_level(dataclasses.replace(problem, options=options), priority=proportional)


def cd_moe(problem: Problem) -> Counts:
    """Whole layers condensed to their always-on experts, the least divergent layers first.

    A layer's divergence is its loss without routed experts, its always-on experts are those with a
    floor. The layer, and in it the expert, that meets the end of the budget is cut.

    Source: our reading of CD-MoE, arXiv 2412.00069. It measures the divergence again after each
    layer; where losses add up, that greedy choice is this order.
    """
    scores = problem.scores
    experts, channels = scores.channel.shape[1:]
    layer_rank = np.argsort(np.argsort(-scores.layer, kind="stable"), kind="stable")
    expert_rank = np.argsort(np.argsort(-scores.expert, axis=1, kind="stable"), axis=1)
    # Where no expert may go, none is always on in the sense of the rule.
    always_on = problem.reserved & ~problem.reserved.all()
    order = np.where(always_on, -1.0, layer_rank[:, None] * experts + expert_rank)
    return _of_all(problem, np.repeat(order.reshape(-1, 1), channels, axis=1))


def _pool(problem: Problem) -> np.ndarray:  # [L E, F]
    channel = problem.scores.channel
    return channel.reshape(-1, channel.shape[2])


def _of_all(problem: Problem, priority: np.ndarray) -> Counts:  # [L E, F]
    bounds = (bound.reshape(1, -1) for bound in (problem.floor, problem.most))
    counts = select(priority[None], np.array([problem.budget]), *bounds)
    return counts.reshape(problem.floor.shape)


def _of_layers(
    problem: Problem,
    totals: np.ndarray,  # [L]
    priority: Priority,
    weights: np.ndarray,  # [L, E]
) -> Counts:
    # Each layer spends its own total.
    value = prioritize(priority, _pool(problem), weights.reshape(-1), problem.options.rho_max)
    value = value.reshape(problem.scores.channel.shape)
    return select(value, totals, problem.floor, problem.most)


def _one_level(
    priority: Priority, weights: Importance, objective: Objective | None, about: str
) -> Planner:
    return Planner(
        functools.partial(one_level, priority=priority, weights=weights), objective, about
    )


def _fair(degree: float) -> Planner:
    return _one_level(
        functools.partial(fair, degree=degree),
        attribution_weights,
        Objective(degree, "attribution"),
        f"coverage of fairness {degree:g}, weighted by attribution, ours",
    )


# The max-min rules count by the coverage they are reported in.
PLANNERS: dict[str, Planner] = {
    "paper": Planner(
        two_level,
        Objective(0.0, "paper"),
        "max-min coverage over layers, then over their experts, arXiv 2606.18304",
    ),
    "fair_two_level": Planner(
        functools.partial(two_level, priority=fair),
        Objective(1.0, "paper"),
        "coverage of fairness 1 over layers, then over their experts, ours",
    ),
    "linear_two_level": Planner(
        functools.partial(two_level, priority=linear),
        Objective(0.0, "paper"),
        "sum of coverages over layers, then over their experts, ours",
    ),
    "maxmin": _one_level(
        max_min, paper_weights, Objective(0.0, "paper"), "max-min coverage in one level, ours"
    ),
    "fair": _fair(1.0),
    "fair0.5": _fair(0.5),
    "fair2": _fair(2.0),
    "linear": _one_level(
        linear,
        attribution_weights,
        Objective(0.0, "attribution"),
        "sum of coverages, weighted by attribution, ours",
    ),
    "uniform": _one_level(equal_width, equal_weights, None, "one width for all experts"),
    "random": Planner(random_counts, about="chance, which every planner must beat"),
    "global_topk": _one_level(
        top_score, equal_weights, Objective(0.0, "mass"), "best channels of the model"
    ),
    "normalized_topk": _one_level(
        top_score,
        inverse_layer_mean,
        Objective(0.0, "normalized_mass"),
        "best channels of the model, scores over their layer's mean",
    ),
    "layer_topk": Planner(layer_topk, about="best channels of each layer, as many in each"),
    "moe_i2": Planner(moe_i2, about="widths in proportion to attribution, after arXiv 2411.01016"),
    "cd_moe": Planner(
        cd_moe, about="whole layers condensed to always-on experts, after arXiv 2412.00069"
    ),
}
