"""The row of a comparison that planner auto decides: at each rate the rule that loses least."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.plan_options import AUTO
from pruning.report.compared import CHOSEN, Repaired
from pruning.runs.compared import Kept
from pruning.runs.compared_task import Task
from pruning.scores.statistics import ChannelStatistics
from pruning.stages.choose import choose
from pruning.stages.job import Job


def chosen_plans(
    job: Job,
    statistics: ChannelStatistics,
    provenance: Mapping[str, Any],
    budgets: Mapping[Task, Kept],
    tasks: Iterable[Task],
    repair: Repaired,
    steps: Steps,
) -> dict[Task, PruningPlan]:
    """The plans that planner auto takes for the tasks that leave the rule to it.

    Losses are remembered in choice.json of the output folder, as those of `plan` are.

    Args:
      job: with the windows kept out of the statistics, which rules are measured on.
      statistics, provenance: of scoring.
      budgets: channels that each task keeps.
      tasks: all that is compared.
      repair: of plans; with one, rules are measured as it begins.
      steps: where progress goes.

    Returns:
      The plan of each task with rule `CHOSEN`, its provenance with the table of all rules; none
      where the rule that is taken keeps another number of channels.
    """
    asked = [task for task in tasks if task.rule == CHOSEN]
    kept: dict[float, int] = {}
    for task in asked:
        budget = budgets[task]
        kept[task.rate] = budget.keep.sum() if isinstance(budget, PruningPlan) else budget
    if not kept:
        return {}
    c = job.base.config
    channels = len(c.moe_layers) * c.moe.num_experts * c.moe.d_expert
    recipes = [
        dataclasses.replace(
            job.recipe, planner=AUTO, criterion=None, attribution=None, repair=repair or "none",
            prune_rate=1.0 - budget / channels,
        )
        for budget in kept.values()
    ]  # fmt: skip
    found = choose(recipes, statistics, dict(provenance), job.base, lambda: job, steps)
    plans = dict(zip(kept, (plan for _, plan in found), strict=True))
    return {
        task: plans[task.rate] for task in asked if plans[task.rate].keep.sum() == kept[task.rate]
    }
