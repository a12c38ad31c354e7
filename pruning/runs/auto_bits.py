"""Plans whose layers have bits of their own: of a run, and of the rows of a comparison."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from convert.export_format import MIXED, STORAGES
from moe_jax.errors import InputError
from pruning.budget.decide import plan_pruning
from pruning.budget.plan import PruningPlan
from pruning.budget.rule import make_plan
from pruning.budget.rules import RULES
from pruning.kit.errors import BudgetError
from pruning.kit.progress import Steps
from pruning.recipe.options import BUDGETS, PlanOptions, part_of
from pruning.report.compared import AUTO
from pruning.runs.compared_sizes import budget_step, formats, most_channels, written
from pruning.runs.compared_task import Task
from pruning.scores.statistics import ChannelStatistics
from pruning.stages.bit_curves import (
    least_diverging,
    measured_curves,
    require_kept_out,
    whole_plan,
)
from pruning.stages.job import Job
from pruning.stages.joint_plan import even_plans, joint_plan
from pruning.stages.plan import budget_range, recorded_notes
from pruning.stages.sizes import export_of, foreseen_form

# Shares of its channels that a layer keeps at least in the plans that are measured: divergences of
# layers alone are noisy and do not add up where a few layers lose nearly all.
LEAST = (0.0, 0.5, 0.75)
PLANS = "auto"  # folder of a comparison's plans, which `apply` takes


def require_auto(job: Job) -> None:
    """Raise InputError if the text or the model of a run leaves no bits of layers to be chosen."""
    recipe, base = job.recipe, job.base.about
    if recipe.cut_router or recipe.top_k is not None:
        raise InputError(
            "bits='auto' keep the router as it is; leave --cut-router and --top-k out, or choose "
            "one number of --bits"
        )
    require_kept_out(job)
    if export_of(base, whole_plan(job), foreseen_form(recipe, MIXED, base)).native is not None:
        raise InputError(
            f"{base.folder} stores its weights in few bits already, whose codes {MIXED} takes "
            "over; leave --bits auto out"
        )


def recipe_plan(
    job: Job,
    plan: PruningPlan,
    statistics: ChannelStatistics,
    provenance: Mapping[str, Any],
    steps: Steps,
) -> PruningPlan:
    """Channels and bits of every layer of a run, within the bytes of its recipe.

    Args:
      job: one that `require_auto` lets pass, with the rule that was taken.
      plan: of that rule, all layers in 4 bits.
      statistics, provenance: of scoring.
      steps: where progress goes.

    Raises:
      BudgetError: nothing is as small.
    """
    recipe, c = job.recipe, job.base.config
    assert recipe.target_bytes is not None
    options = dataclasses.replace(part_of(recipe, PlanOptions), **dict.fromkeys(BUDGETS))
    notes = recorded_notes(recipe, statistics, dict(provenance))
    fewest, most, step = budget_range(recipe, job.base.about)

    @functools.cache
    def plan_at(channels: int) -> PruningPlan:
        if not fewest <= channels <= most:
            raise BudgetError(f"{channels} channels are not in [{fewest}, {most}]")
        return plan_pruning(
            statistics, options, experts_per_token=c.moe.experts_per_token,
            layer_indices=c.moe_layers, channels=channels, notes=notes,
        )  # fmt: skip

    (found,) = _joint(job, plan_at, step, [recipe.target_bytes], notes, steps).values()
    if found is None:
        raise BudgetError(
            f"target={recipe.target_bytes} bytes cannot be met, whatever channels and bits each "
            "layer has; raise the target"
        )
    chosen = {n: plan.provenance[n] for n in ("choice",) if n in plan.provenance}
    return dataclasses.replace(found, provenance={**found.provenance, **chosen})


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

    made = _joint(job, plan_at, step, [task.target for task in tasks], notes, steps)
    # Of those that have none the reason is said where the task is to be measured.
    found = {task: plan for task in tasks if (plan := made[task.target]) is not None}
    for task, plan in found.items():
        plan.save(job.output / PLANS / f"{task.rule}-{task.target}")
    return found


def _joint(
    job: Job,
    plan_at: Callable[[int], PruningPlan],
    step: int,
    targets: Iterable[int],
    notes: Mapping[str, Any],
    steps: Steps,
) -> dict[int, PruningPlan | None]:
    """The plan of each size; None where nothing is as small."""
    curves = measured_curves(job, plan_at, step, steps)
    forms = formats(job, tuple(STORAGES))
    found: dict[int, PruningPlan | None] = {}
    for target in targets:
        # Those of one number of bits throughout are among the choices, and measured beside.
        most = {bits: most_channels(job, form, target, step) for bits, form in forms.items()}
        given = (lambda plan: written(job, plan, AUTO)), target
        plans = []
        for least in LEAST:
            with contextlib.suppress(BudgetError):
                plans.append(joint_plan(
                    job, curves, plan_at, *given, step, also=list(most.values()), least=least,
                    notes=notes,
                ))  # fmt: skip
        plans += even_plans(job, plan_at, *given, most, notes=notes)
        found[target] = least_diverging(job, plans, steps) if plans else None
    return found
