"""The rows of a comparison whose layers have bits of their own: planned before any is measured."""

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from convert.export_format import STORAGES
from pruning.budget.plan import PruningPlan
from pruning.budget.rule import make_plan
from pruning.budget.rules import RULES
from pruning.kit.errors import BudgetError
from pruning.kit.progress import Steps
from pruning.report.compared import AUTO
from pruning.runs.compared_task import Task
from pruning.runs.controls import budget_step, formats, most_channels, written
from pruning.scores.statistics import ChannelStatistics
from pruning.stages.bit_curves import measured_curves
from pruning.stages.job import Job
from pruning.stages.joint_plan import joint_plan
from pruning.stages.plan import recorded_notes

PLANS = "auto"  # folder of their plans, which `apply` takes


def auto_plans(
    job: Job,
    statistics: ChannelStatistics,
    provenance: Mapping[str, Any],
    tasks: Iterable[Task],
    steps: Steps,
) -> dict[Task, PruningPlan]:
    """Channels and bits of every layer for the tasks that ask for both, by their sizes.

    Args:
      job: with the windows kept out of the statistics, which curves are measured on.
      statistics, provenance: of scoring.
      tasks: all that is compared.
      steps: where progress goes.

    Returns:
      The plan of each task with bits `AUTO`, which is in the output folder too; none where nothing
      is as small.

    Raises:
      InputError: no window was kept out.
    """
    asked = [task for task in tasks if task.bits == AUTO]
    return {
        task: plan
        for rule in dict.fromkeys(task.rule for task in asked)
        for task, plan in _of_rule(
            job, statistics, provenance, [one for one in asked if one.rule == rule], steps
        ).items()
    }


def _of_rule(
    job: Job,
    statistics: ChannelStatistics,
    provenance: Mapping[str, Any],
    tasks: list[Task],
    steps: Steps,
) -> dict[Task, PruningPlan]:
    rule, c = RULES[tasks[0].rule], job.base.config
    step = budget_step(job, rule)
    notes = recorded_notes(job.recipe, statistics, dict(provenance))

    @functools.cache  # sizes have most of their plans in common
    def plan_at(channels: int) -> PruningPlan:
        return make_plan(
            rule, statistics, budget=channels, block=job.recipe.block,
            experts_per_token=c.moe.experts_per_token, layer_indices=c.moe_layers,
            seed=job.recipe.seed, notes=notes,
        )  # fmt: skip

    curves = measured_curves(job, plan_at, step, steps)
    forms, found = formats(job, tuple(STORAGES)), {}
    for task in tasks:
        # Those of one number of bits throughout, so that each is among the choices.
        also = [most_channels(job, form, task.target, step) for form in forms.values()]
        try:
            found[task] = joint_plan(
                job, curves, plan_at, lambda plan: written(job, plan, AUTO), task.target, step,
                also=also, notes=notes,
            )  # fmt: skip
        except BudgetError:
            continue  # said where the task is to be measured
        found[task].save(job.output / PLANS / f"{task.rule}-{task.target}")
    return found
