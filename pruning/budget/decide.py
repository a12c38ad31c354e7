"""From statistics and options to a pruning plan."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.errors import InputError, choose
from pruning.budget.alignment import best_channels, check_block, legal_minimum, of_groups
from pruning.budget.apportion import apportion
from pruning.budget.importance import PlannerOptions
from pruning.budget.optimum import SOLVERS
from pruning.budget.outliers import reserve, super_channels, with_super_channels
from pruning.budget.plan import PruningPlan
from pruning.budget.planners import PLANNERS
from pruning.budget.problem import Allocation, Limits, Planner, Problem
from pruning.budget.record import plan_record
from pruning.budget.whole_experts import replacement_vectors
from pruning.budget.widths import WIDTHS, with_layer_budgets
from pruning.kit.errors import BudgetError
from pruning.recipe.options import PlanOptions, part_of
from pruning.recipe.plan_options import AUTO
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.criteria import ChannelScores, channel_scores

if TYPE_CHECKING:
    from pruning.scores.statistics import ChannelStatistics


def plan_pruning(
    statistics: "ChannelStatistics",
    options: PlanOptions,
    *,
    experts_per_token: int,
    layer_indices: Sequence[int] | None = None,
    channels: int | None = None,
    limits: Limits | None = None,
    planner_options: PlannerOptions | None = None,
    notes: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Decide which channels of the routed experts stay.

    Args:
      statistics: sums of a calibration sweep.
      options: rate, criterion, planner and the rest; what is left open is criterion shapley,
        attribution ala, planner fair, width free, block 1 and one block as the minimum.
      experts_per_token: experts per layer that keep at least the minimum, so that every token
        finds its experts; those of largest attribution.
      layer_indices: the model's layer number of each MoE layer; default 0, 1, 2, ...
      channels: channels to keep in the whole model; for options without a rate, whose targets of
        bytes and parameters are not read.
      limits: what the plan may not choose.
      planner_options: fine print in place of that in `options`, for what a recipe cannot say.
      notes: more to record, for example model_hash, statistics_hash and calibration.

    Returns:
      The plan. Its provenance records the choices, the budget and the channels actually kept, and
      the coverage under the planner's weights before and after alignment and at the optimum.

    Raises:
      InputError: an option is out of range, unknown, or infeasible for this budget.
    """
    options = _filled(options)
    limits = limits or Limits()
    fine = planner_options or PlannerOptions.of(options)
    layers = len(statistics.hidden_square)
    indices = tuple(range(layers) if layer_indices is None else map(int, layer_indices))
    problem, outliers = _problem(statistics, options, fine, channels, experts_per_token, limits)
    widths = _allocation(problem, options, limits, indices, outliers)
    keep = best_channels(np.where(outliers, np.inf, problem.scores.channel), widths.counts)
    record = plan_record(
        statistics,
        options,
        problem,
        widths,
        outliers=outliers,
        keep=keep,
        indices=indices,
        experts_per_token=experts_per_token,
        budget=_budget(options, channels, keep.size),
    )
    constants = _constants(statistics, widths.counts, options.emptied)
    return PruningPlan(keep, indices, {**record, **(notes or {})}, constants)


def _filled(options: PlanOptions) -> PlanOptions:
    if options.planner == AUTO:
        raise InputError(
            f"planner={AUTO!r} runs the model on a text, which statistics do not hold; `compress` "
            "and `plan` measure rules, here name a planner"
        )
    block = options.block or options.grid or 1
    return dataclasses.replace(
        part_of(options, PlanOptions).fixed(),
        width=options.width or "free",
        block=block,
        minimum=options.minimum or block,
    )


def _problem(
    statistics: "ChannelStatistics",
    options: PlanOptions,
    fine: PlannerOptions,
    channels: int | None,
    experts_per_token: int,
    limits: Limits,
) -> tuple[Problem, np.ndarray]:
    """What the width policy reads, and the super-channels, bool [L, E, F]."""
    shape = layers, experts, d_expert = statistics.shape
    assert options.block and options.minimum and options.criterion
    grid = options.grid or 1
    check_block(options.block, d_expert)
    if options.block % grid:
        raise InputError(f"block={options.block} must be a multiple of grid={grid}")
    least = legal_minimum(options.minimum, options.block, d_expert)
    budget = _budget(options, channels, math.prod(shape))
    always = experts if options.keep_experts else experts_per_token
    _check_floor(always, shape, least, budget)
    planner = _planner(options)
    scores = _scores(statistics, options, grid)
    # The experts of largest attribution are reserved, ties to the lower index.
    rank = np.argsort(np.argsort(-scores.expert, axis=1, kind="stable"), axis=1)
    most = limits.most((layers, experts), d_expert)
    limits.check_experts((layers, experts), experts_per_token)
    outliers = _outliers(scores.channel, statistics, options.criterion)
    outliers = of_groups(outliers, grid) > 0  # a group goes as one
    reserved = reserve(
        rank < always,
        outliers & (most >= least)[:, :, None],
        (budget - layers * always * least) // least,
    )
    problem = Problem(
        scores=scores,
        # A larger plan may have left a few channels unspent, which the smaller cannot have either.
        budget=budget if limits.within is None else min(budget, int(most.sum())),
        floor=np.where(reserved, least, 0),
        most=most,
        planner=planner,
        least=least,
        block=options.block,
        options=fine,
        align=options.align,
        per_layer=options.per_layer,
        cap=options.cap,
        expert_rate=options.expert_rate,
        experts=limits.experts,
        seed=options.seed,
    )
    return problem, outliers


def _scores(statistics: "ChannelStatistics", options: PlanOptions, grid: int) -> ChannelScores:
    """Scores of channels, those of a group of `grid` neighbours alike, and of experts."""
    assert options.criterion and options.attribution
    scores = channel_scores(
        statistics,
        criterion=options.criterion,
        attribution=options.attribution,
        seed=options.seed,
    )
    return scores.replace(  # type: ignore[attr-defined]
        channel=of_groups(scores.channel, grid)
    )


def _allocation(
    problem: Problem,
    options: PlanOptions,
    limits: Limits,
    indices: tuple[int, ...],
    outliers: np.ndarray,  # [L, E, F]
) -> Allocation:
    assert options.width
    fixed = _layer_budgets(problem, options.layer_rates, limits.layer_shares, indices)
    widths = with_layer_budgets(problem, fixed, WIDTHS[options.width])
    if options.width in ("free", "capped", "combined"):
        return with_super_channels(problem, widths, outliers)
    return widths


def _outliers(
    channel: np.ndarray, statistics: "ChannelStatistics", criterion: str
) -> np.ndarray:  # [L, E, F] -> bool [L, E, F]
    # A criterion that does not see what a channel adds, such as the weights' size, must not lose
    # one that carries a layer. Chance is left alone: a baseline with a guard would be none.
    if CHANNEL_CRITERIA[criterion].chance:
        return np.zeros(channel.shape, bool)
    return super_channels(channel) | super_channels(statistics.energy)


def _constants(
    statistics: "ChannelStatistics", counts: np.ndarray, emptied: str
) -> tuple[np.ndarray, ...] | None:
    if emptied == "zero":
        return None
    if statistics.output_sum is None:
        raise InputError(
            "emptied='mean' needs the mean outputs of experts, which these statistics lack; score "
            "with --expert-details"
        )
    return replacement_vectors(statistics.output_sum, statistics.tokens, counts)


def _planner(options: PlanOptions) -> Planner:
    planner = choose(PLANNERS, options.used_planner, "planner")
    if options.align in SOLVERS and planner.objective is None:
        able = ", ".join(name for name, entry in PLANNERS.items() if entry.objective)
        raise InputError(
            f"align={options.align!r} maximises the planner's objective, "
            f"planner={options.planner!r} has none; choose align='paper', or one of the planners "
            f"{able}"
        )
    return planner


def _budget(options: PlanOptions, channels: int | None, available: int) -> int:
    rate = options.prune_rate
    if (rate is None) == (channels is None):
        raise InputError(f"give either prune_rate={rate} or channels={channels}")
    if rate is not None:
        return round((1.0 - rate) * available)
    assert channels is not None
    if not 0 < channels <= available:
        raise InputError(f"channels={channels} must lie in [1, {available}]")
    return int(channels)


def _check_floor(
    experts_per_token: int, shape: tuple[int, int, int], least: int, budget: int
) -> None:
    layers, experts, _ = shape
    if not 1 <= experts_per_token <= experts:
        raise InputError(
            f"experts_per_token={experts_per_token} must lie in [1, num_experts={experts}]"
        )
    needed = layers * experts_per_token * least
    if needed > budget:
        raise BudgetError(
            f"the budget of {budget} channels is below the {needed} that {experts_per_token} "
            f"experts of {least} channels in each of {layers} layers need; "
            "lower the prune rate, the minimum or the block"
        )


def _layer_budgets(
    problem: Problem,
    rates: Mapping[int, float],
    shares: np.ndarray | None,
    indices: tuple[int, ...],
) -> dict[int, int]:
    # Channels of the layers that do not compete, by position.
    if rates and shares is not None:
        raise InputError("give either layer_rates or layer_shares, not both")
    if shares is not None:
        needed = problem.floor.sum(axis=1) // problem.block
        room = problem.most.sum(axis=1) // problem.block
        blocks = apportion(shares, problem.budget // problem.block, needed, room)
        return dict(enumerate((problem.block * blocks).tolist()))
    unknown = sorted(set(rates) - set(indices))
    if unknown:
        raise InputError(f"layer_rates names layers {unknown}, those with experts are {indices}")
    size = problem.scores.channel[0].size
    return {indices.index(layer): round((1.0 - rate) * size) for layer, rate in rates.items()}
