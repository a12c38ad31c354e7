"""From statistics and options to a pruning plan."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.errors import InputError, choose
from pruning.budget.alignment import best_channels, check_block, legal_minimum
from pruning.budget.apportion import apportion
from pruning.budget.importance import PlannerOptions
from pruning.budget.optimum import SOLVERS
from pruning.budget.outliers import reserve, super_channels, with_super_channels
from pruning.budget.plan import PruningPlan
from pruning.budget.planners import DEFAULTS, OBJECTIVES, PLANNERS, Planner, random_counts
from pruning.budget.problem import Problem
from pruning.budget.record import coverage_record, expert_record, outlier_record, tool_version
from pruning.budget.whole_experts import replacement_vectors
from pruning.budget.widths import ALIGNMENTS, WIDTHS, with_layer_budgets
from pruning.scores.criteria import channel_scores
from pruning.scores.expert_criteria import expert_criterion

if TYPE_CHECKING:
    from pruning.scores.statistics import ChannelStatistics

__all__ = ["PruningPlan", "plan_pruning"]


def plan_pruning(
    statistics: "ChannelStatistics",
    *,
    prune_rate: float | None = None,
    channels: int | None = None,
    criterion: str = "shapley",
    attribution: str = "ala",
    planner: str = "fair",
    options: PlannerOptions = DEFAULTS,
    width: str = "free",
    cap: int | None = None,
    expert_rate: float = 0.0,
    experts: np.ndarray | None = None,  # [L, E]
    align: str = "paper",
    per_layer: bool = False,
    block: int = 1,
    minimum: int | None = None,
    layer_rates: Mapping[int, float] | None = None,
    layer_shares: np.ndarray | None = None,  # [L]
    within: np.ndarray | None = None,  # [L, E]
    emptied: str = "zero",
    experts_per_token: int,
    layer_indices: Sequence[int] | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Decide which channels of the routed experts stay.

    Args:
      statistics: sums of a calibration sweep.
      prune_rate: fraction of routed-expert channels to remove from the whole model, in [0, 1).
      channels: channels to keep instead of a rate.
      criterion: how channels are ranked, a name of `CHANNEL_CRITERIA`.
      attribution: how experts are weighted, a name of `EXPERT_CRITERIA`.
      planner: how the budget is allocated, a name of `PLANNERS`; unused by the widths "uniform"
        and "experts".
      options: the planner's fine print.
      width: a name of `WIDTHS`: "free" lets every expert have its own, "capped" up to `cap`,
        "layer" one per layer, "uniform" one for the model, "experts" keeps whole experts, and
        "combined" removes a fraction `expert_rate` of the experts and channels of the others.
      cap: widest expert of "capped".
      expert_rate: fraction of experts that "combined" removes, in [0, 1).
      experts: bool; experts that "experts" or "combined" keep, instead of those of largest
        attribution.
      align: how widths become multiples of the block, a name of `ALIGNMENTS`: the "paper"'s rule,
        its variant "paper_scores", or the optimum by "dp" (exact, slow over whole models) or
        "hull" (within one item of it).
      per_layer: alignment and the choice of whole experts keep to each layer's budget.
      block: widths are multiples of it; must divide the expert width.
      minimum: least width of a kept expert, rounded up to a block; default one block.
      layer_rates: prune rate of single layers, by the model's layer number; 0 leaves a layer
        alone. The other layers make up the rest of the model's budget.
      layer_shares: share of the budget of every layer, for example from `pruning.budget.clusters`.
      within: most channels of each expert, for example the counts of a larger plan.
      emptied: what experts without channels add: nothing for "zero" (but the output's bias where
        there is one), or for "mean" their mean output over the tokens routed to them, which needs
        the statistics' expert details.
      experts_per_token: experts per layer that keep at least `minimum` channels, so that every
        token finds its experts; those of largest attribution.
      layer_indices: the model's layer number of each MoE layer; default 0, 1, 2, ...
      seed: of criterion and planner "random".
      provenance: more to record, for example model_hash, statistics_hash and calibration.

    Returns:
      The plan. Its provenance records the choices, the budget and the channels actually kept, and
      the coverage under the planner's weights before and after alignment and at the optimum.

    Raises:
      InputError: an option is out of range, unknown, or infeasible for this budget.
    """
    shape = statistics.hidden_square.shape
    layers, experts_per_layer, d_expert = shape
    policy = choose(WIDTHS, width, "width")
    check_block(block, d_expert)
    least = legal_minimum(block if minimum is None else minimum, block, d_expert)
    budget = _budget(prune_rate, channels, math.prod(shape))
    _check_floor(experts_per_token, shape, least, budget)
    indices = tuple(range(layers) if layer_indices is None else map(int, layer_indices))
    allocate = _planner(planner, seed)
    objective = _objective(planner, align)
    scores = channel_scores(statistics, criterion=criterion, attribution=attribution, seed=seed)
    # The experts of largest attribution are reserved, ties to the lower index.
    rank = np.argsort(np.argsort(-scores.expert, axis=1, kind="stable"), axis=1)
    most = _most(within, (layers, experts_per_layer), d_expert)
    outliers = _outliers(scores.channel, statistics, criterion)
    problem = Problem(
        scores=scores,
        # A larger plan may have left a few channels unspent, which the smaller cannot have either.
        budget=budget if within is None else min(budget, int(most.sum())),
        reserved=reserve(
            rank < experts_per_token,
            outliers & (most >= least)[:, :, None],
            (budget - layers * experts_per_token * least) // least,
        ),
        most=most,
        least=least,
        block=block,
        planner=allocate,
        objective=objective,
        options=options,
        align=align,
        per_layer=per_layer,
        cap=cap,
        expert_rate=expert_rate,
        experts=_checked_choice(experts, (layers, experts_per_layer), experts_per_token),
    )
    fixed = _layer_budgets(problem, layer_rates, layer_shares, indices)
    widths = with_layer_budgets(problem, fixed, policy)
    if width in ("free", "capped", "combined"):
        widths = with_super_channels(problem, widths, outliers)
    keep = best_channels(np.where(outliers, np.inf, scores.channel), widths.counts)
    record = {
        "criterion": criterion,
        "attribution": attribution,
        "planner": None if width in ("uniform", "experts") else planner,
        "planner_options": dataclasses.asdict(options),
        "width": width,
        "cap": cap,
        "expert_rate": expert_rate if width == "combined" else None,
        "prune_rate": 1.0 - budget / math.prod(shape) if prune_rate is None else prune_rate,
        "align": align,
        "per_layer": per_layer,
        "block": block,
        "minimum": least,
        "layer_rates": {str(layer): rate for layer, rate in (layer_rates or {}).items()},
        "experts_per_token": experts_per_token,
        "emptied": emptied,
        "seed": seed,
        "budget": budget,
        "kept": int(widths.counts.sum()),
        "unspent": budget - int(widths.counts.sum()),
        **expert_record(statistics, expert_criterion(attribution)(statistics), widths, indices),
        **outlier_record(outliers, keep, indices),
        **coverage_record(problem, widths),
        "tool_version": tool_version(),
    }
    constants = _constants(statistics, widths.counts, emptied)
    return PruningPlan(keep, indices, {**record, **(provenance or {})}, constants)


def _outliers(
    channel: np.ndarray, statistics: "ChannelStatistics", criterion: str
) -> np.ndarray:  # [L, E, F] -> bool [L, E, F]
    # A criterion that does not see what a channel adds, such as the weights' size, must not lose
    # one that carries a layer. Chance is left alone: a baseline with a guard would be none.
    if criterion == "random":
        return np.zeros(channel.shape, bool)
    return super_channels(channel) | super_channels(statistics.energy)


def _constants(
    statistics: "ChannelStatistics", counts: np.ndarray, emptied: str
) -> tuple[np.ndarray, ...] | None:
    choose({"zero": None, "mean": None}, emptied, "emptied")
    if emptied == "zero":
        return None
    if statistics.output_sum is None:
        raise InputError(
            "emptied='mean' needs the mean outputs of experts, which these statistics lack; score "
            "with --expert-details"
        )
    return replacement_vectors(statistics.output_sum, statistics.tokens, counts)


def _planner(name: str, seed: int) -> Planner:
    planner = choose(PLANNERS, name, "planner")
    return functools.partial(random_counts, seed=seed) if name == "random" else planner


def _objective(planner: str, align: str) -> tuple[float, str]:
    choose(ALIGNMENTS, align, "align")
    if align in SOLVERS and planner not in OBJECTIVES:
        raise InputError(
            f"align={align!r} maximises the planner's objective, planner={planner!r} has none; "
            f"choose align='paper', or one of the planners {', '.join(OBJECTIVES)}"
        )
    return OBJECTIVES.get(planner, (0.0, "equal"))


def _budget(prune_rate: float | None, channels: int | None, available: int) -> int:
    if (prune_rate is None) == (channels is None):
        raise InputError(f"give either prune_rate={prune_rate} or channels={channels}")
    if channels is not None:
        if not 0 < channels <= available:
            raise InputError(f"channels={channels} must lie in [1, {available}]")
        return int(channels)
    assert prune_rate is not None
    return round((1.0 - _checked_rate(prune_rate, "prune_rate")) * available)


def _checked_rate(rate: float, name: str) -> float:
    if not 0.0 <= rate < 1.0:
        raise InputError(f"{name}={rate} must lie in [0, 1); choose e.g. 0.25")
    return rate


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
        raise InputError(
            f"the budget of {budget} channels is below the {needed} that {experts_per_token} "
            f"experts of {least} channels in each of {layers} layers need; "
            "lower the prune rate, the minimum or the block"
        )


def _most(within: np.ndarray | None, shape: tuple[int, int], d_expert: int) -> np.ndarray:
    if within is None:
        return np.full(shape, d_expert)
    if within.shape != shape or within.min() < 0 or within.max() > d_expert:
        raise InputError(
            f"within is {list(within.shape)} in [{within.min()}, {within.max()}], expected "
            f"{list(shape)} in [0, {d_expert}]; take the counts of a plan of this model"
        )
    return within.astype(np.int64)


def _checked_choice(
    experts: np.ndarray | None, shape: tuple[int, int], experts_per_token: int
) -> np.ndarray | None:
    if experts is None:
        return None
    if experts.shape != shape or experts.dtype != np.bool_:
        raise InputError(f"experts is {experts.dtype}{list(experts.shape)}, expected bool{shape}")
    fewest = int(experts.sum(axis=1).min())
    if fewest < experts_per_token:
        raise InputError(
            f"experts keeps {fewest} in one layer, every token needs {experts_per_token}; keep more"
        )
    return experts


def _layer_budgets(
    problem: Problem,
    rates: Mapping[int, float] | None,
    shares: np.ndarray | None,
    indices: tuple[int, ...],
) -> dict[int, int]:
    # Channels of the layers that do not compete, by position.
    if rates and shares is not None:
        raise InputError("give either layer_rates or layer_shares, not both")
    if shares is not None:
        needed = problem.reserved.sum(axis=1) * problem.least // problem.block
        room = problem.most.sum(axis=1) // problem.block
        blocks = apportion(shares, problem.budget // problem.block, needed, room)
        return dict(enumerate((problem.block * blocks).tolist()))
    unknown = sorted(set(rates or {}) - set(indices))
    if unknown:
        raise InputError(f"layer_rates names layers {unknown}, those with experts are {indices}")
    size = problem.scores.channel[0].size
    return {
        indices.index(layer): round((1.0 - _checked_rate(rate, f"layer_rates[{layer}]")) * size)
        for layer, rate in (rates or {}).items()
    }
