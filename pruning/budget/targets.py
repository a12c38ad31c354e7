"""From a size on disk, or a number of parameters, to a budget of channels."""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan


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
    low, high, found = lowest, highest, low_cost
    halve = False
    while high - low > 1:
        part = 0.5 if halve else (target - low_cost) / (high_cost - low_cost)
        middle = min(max(low + math.floor(part * (high - low)), low + 1), high - 1)
        result, middle_cost = made(middle)
        width = high - low
        if middle_cost <= target:
            low, low_cost, best, found = middle, middle_cost, result, middle_cost
        else:
            high, high_cost = middle, middle_cost
        # After a guess that left more than half, look next to it first, then in the middle.
        halve = not halve and high - low > width // 2
    return _with_target(best, found, target, unit)


def _with_target(plan: PruningPlan, cost: float, target: float, unit: str) -> PruningPlan:
    notes = {"target": target, "target_unit": unit, "cost": cost}
    return dataclasses.replace(plan, provenance={**plan.provenance, **notes})
