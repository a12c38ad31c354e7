"""Several budgets: plans whose kept channels contain each other, and the plan of a target size."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.errors import InputError
from pruning.budget.decide import plan_pruning
from pruning.budget.plan import PruningPlan
from pruning.budget.problem import Limits
from pruning.recipe.options import BUDGETS, PlanOptions, part_of

if TYPE_CHECKING:
    from pruning.scores.statistics import ChannelStatistics


def nested_plans(
    statistics: "ChannelStatistics",
    rates: Sequence[float],
    options: PlanOptions,
    *,
    limits: Limits | None = None,
    notes: Mapping[str, Any] | None = None,
    **model: Any,
) -> list[PruningPlan]:
    """Plan the largest budget first, and every further one within the one before.

    Without alignment the planners are nested by themselves and this changes nothing. Alignment is
    not: a larger budget can round an expert down that a smaller one rounds up. Then every plan but
    the largest may differ from the one its rate would get alone; its provenance says so.

    Args:
      statistics: sums of a calibration sweep.
      rates: prune rates, in any order.
      options: of `plan_pruning`; their own budget is not read.
      limits: of `plan_pruning`, without `within` and `experts`, which belong to one plan.
      notes: more to record.
      **model: `experts_per_token`, `layer_indices` and `planner_options` of `plan_pruning`.

    Returns:
      One plan per rate, in the order given. Each has `nested_in`, the next smaller rate (none for
      the smallest), and `nested_alike`, whether it equals the plan of its rate alone.

    Raises:
      InputError: no rate, a rate twice, options that are infeasible for one of the rates, or a
        limit that cannot be nested.
    """
    if not rates or len(set(rates)) != len(rates):
        raise InputError(f"rates={list(rates)} must be one or more different prune rates")
    limits = limits or Limits()
    for name in ("within", "experts"):
        if getattr(limits, name) is not None:
            raise InputError(f"{name} belongs to one plan; leave it to the sweep over rates")
    made: dict[float, PruningPlan] = {}
    larger: PruningPlan | None = None
    open_budget = dict.fromkeys(BUDGETS)
    for rate in sorted(rates):
        one = part_of(options, PlanOptions)
        one = dataclasses.replace(one, **{**open_budget, "prune_rate": rate})
        alone = plan_pruning(statistics, one, limits=limits, **model)
        plan = alone
        if larger is not None and (alone.counts > larger.counts).any():
            inside = dataclasses.replace(limits, within=larger.counts)
            plan = plan_pruning(statistics, one, limits=inside, **model)
        outer = None if larger is None else larger.provenance["prune_rate"]
        record = {"nested_in": outer, "nested_alike": plan is alone}
        provenance = {**plan.provenance, **record, **(notes or {})}
        larger = dataclasses.replace(plan, provenance=provenance)
        made[rate] = larger
    return [made[rate] for rate in rates]


def plan_for_target(
    plan: Callable[[int], PruningPlan],
    cost: Callable[[np.ndarray], float],
    target: float,
    *,
    channels: int,
    fewest: int,
    step: int = 1,
    unit: str = "bytes",
) -> PruningPlan:
    """The largest plan that costs at most the target.

    The cost grows with the budget by nearly the same amount per step, so the search guesses on a
    straight line and halves the interval where the guess is poor; a handful of plans is made.

    Args:
      plan: a budget of channels -> a plan for it, for example `plan_pruning` with everything else
        bound.
      cost: channels kept [L, E] -> bytes or parameters of what would be written.
      target: most it may cost, in the unit of `cost`.
      channels: all routed-expert channels of the model.
      fewest: the smallest budget that `plan` accepts.
      step: budgets tried are multiples of it (and `fewest`, and `channels`): the block.
      unit: for messages and provenance.

    Returns:
      A plan within the target whose budget cannot grow by a step; `target`, `target_unit` and
      `cost` are added to its provenance. The whole model if it costs no more than the target.

    Raises:
      InputError: the target is below the smallest plan; the message has the nearest feasible one.
    """
    if not math.isfinite(target) or not 0 < fewest <= channels or step < 1:
        raise InputError(
            f"target={target} must be finite, fewest={fewest} in [1, {channels}], step={step} >= 1"
        )
    lowest, highest = -(-fewest // step), -(-channels // step)

    def made(index: int) -> tuple[PruningPlan, float]:
        result = plan(min(max(index * step, fewest), channels))
        return result, float(cost(result.counts))

    best, low_cost = made(lowest)
    if low_cost > target:
        raise InputError(
            f"target={target:.0f} {unit} cannot be met: the smallest feasible plan takes "
            f"{low_cost:.0f}; raise the target or lower the minimum width"
        )
    top, high_cost = made(highest)
    if high_cost <= target:
        return _with_target(top, high_cost, target, unit)
    best, low_cost = _largest(made, (lowest, best, low_cost), (highest, high_cost), target)
    return _with_target(best, low_cost, target, unit)


def _largest(
    made: Callable[[int], tuple[PruningPlan, float]],
    below: tuple[int, PruningPlan, float],
    above: tuple[int, float],
    target: float,
) -> tuple[PruningPlan, float]:
    """The last plan at most the target and its cost, between an index below it and one above."""
    low, best, low_cost = below
    high, high_cost = above
    halve = False
    while high - low > 1:
        part = 0.5 if halve else (target - low_cost) / (high_cost - low_cost)
        middle = min(max(low + math.floor(part * (high - low)), low + 1), high - 1)
        result, cost = made(middle)
        width = high - low
        if cost <= target:
            low, best, low_cost = middle, result, cost
        else:
            high, high_cost = middle, cost
        # After a guess that left more than half, look next to it first, then in the middle.
        halve = not halve and high - low > width // 2
    return best, low_cost


def _with_target(plan: PruningPlan, cost: float, target: float, unit: str) -> PruningPlan:
    notes = {"target": target, "target_unit": unit, "cost": cost}
    return dataclasses.replace(plan, provenance={**plan.provenance, **notes})
