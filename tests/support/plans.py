"""Plans from options, limits and what the model decides given flat, as tests name them."""

from typing import Any

import numpy as np

from pruning.budget.decide import plan_pruning
from pruning.budget.importance import PlannerOptions
from pruning.budget.plan import PruningPlan
from pruning.budget.planners import PLANNERS
from pruning.budget.problem import Limits, Problem
from pruning.recipe.options import PlanOptions, fields_of

LIMITS = ("within", "experts", "layer_shares")


def planned(name, scores, budget, floor=None, most=None, *, seed=0, **options) -> np.ndarray:
    """Channels that a planner keeps [L, E], its options as those of `PlannerOptions`."""
    layers, experts, channels = scores.channel.shape
    problem = Problem(
        scores=scores,
        budget=budget,
        floor=np.zeros((layers, experts), np.int64) if floor is None else floor,
        most=np.full((layers, experts), channels) if most is None else most,
        planner=PLANNERS[name],
        options=PlannerOptions(**options),
        seed=seed,
    )
    return problem.planner(problem)


def arguments(**given: Any) -> dict[str, Any]:
    """Arguments of `plan_pruning` and `nested_plans`, all but the statistics.

    `layer_rates` is a mapping; what only another width understands is left out.
    """
    rates = given.pop("layer_rates", {})
    given["layer_rate"] = tuple(f"{layer}={rate}" for layer, rate in rates.items())
    for name, width in (("cap", "capped"), ("expert_rate", "combined")):
        if given.get("width") != width:
            given.pop(name, None)
    options = {name: given.pop(name) for name in fields_of(PlanOptions) if name in given}
    limits = {name: given.pop(name) for name in LIMITS if name in given}
    return {"options": PlanOptions(**options), "limits": Limits(**limits), **given}


def plan_of(statistics, **given: Any) -> PruningPlan:
    """`plan_pruning` of flat arguments."""
    return plan_pruning(statistics, **arguments(**given))
