"""Tasks of lm-evaluation-harness under the plans of a comparison, each beside the dense model."""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from moe_jax.stream import LayerSource
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.measure.paired import compare_results
from pruning.recipe.task_options import TaskOptions
from pruning.report.compared import UNPRUNED, Result
from pruning.report.comparison import Comparison
from pruning.runs.asked_models import DENSE, AskedModel
from pruning.runs.compared import Kept, Scored, repaired, rounded, task_plan
from pruning.runs.compared_task import Task, task_of
from pruning.runs.merged import mergings
from pruning.runs.tasks import ask
from pruning.shrink.merge import MergedSource
from pruning.shrink.prune import PrunedSource
from pruning.stages.job import Job
from pruning.stages.judged import RESULTS


def ask_plans(
    job: Job,
    whole: Scored,
    budgets: Mapping[Task, Kept],
    found: Comparison,
    asked: TaskOptions,
    loaded: dict[str, Any],
    steps: Steps,
) -> Iterator[Comparison]:
    """Ask the dense model and that of every result that is no longer or never was asked this.

    Answers are kept as they come, so that a run that was killed asks nothing twice.

    Args:
      job: with the dense model; `repair` of a plan takes its calibration text again.
      whole: statistics of that text, and what is noted of them.
      budgets: channels that each task keeps; results of others are left as they are.
      found: what was measured.
      asked: names, examples and the most documents.
      loaded: the tasks, see `runs.tasks.open_tasks`.
      steps: where progress goes.

    Yields:
      The comparison after each model.
    """
    told = {"tasks": asked.names, "fewshot": asked.fewshot, "limit": asked.limit,
            "task_path": asked.task_path}  # fmt: skip
    if found.asked != told:
        bare = tuple(dataclasses.replace(result, tasks=[]) for result in found.results)
        found = dataclasses.replace(found, asked=told, results=bare)
    left = [one for one in found.results if task_of(one) in budgets and _is_open(one)]
    if not left:
        return
    recipe, folder = job.recipe, job.output / RESULTS
    how = {"window": None, "first_tokens": recipe.first_tokens, "batch": recipe.batch,
           "dtype": recipe.dtype}  # fmt: skip

    def results_of(name: str, source: LayerSource, what: str) -> Mapping[str, Any]:
        model = AskedModel(name, source, job.base, name, what)
        return ask(model, loaded, folder, asked, how, steps)["results"]

    dense = results_of(DENSE, job.base, "")
    for result in left:
        task = task_of(result)
        plan, model = _model_of(job, whole, task, budgets)
        what = f"{plan.content_hash} {task.bits} {recipe.group_size}"
        if how_made := task.rule if task.is_merged else task.repair:
            what += f" {how_made} {found.key['calibration']}"
        with model as made:
            source = rounded(made, job, plan, task.bits)
            rows = compare_results(dense, results_of(_name(result), source, what))
        found = found.with_tasks(result, [row.to_dict() for row in rows])
        yield found


def _is_open(result: Result) -> bool:
    """Whether a result is of a plan of the calibration text itself, and was not asked so far."""
    task = task_of(result)
    is_dense = task.rule == UNPRUNED and task.bits == 16
    return not (result.tasks or task.is_of_other_text or task.fewer or is_dense)


def _name(result: Result) -> str:
    seed = f" seed {result.seed}" if result.seed else ""
    return f"{result.name} at {result.place}{seed}"


def _model_of(
    job: Job, whole: Scored, task: Task, budgets: Mapping[Task, Kept]
) -> tuple[PruningPlan, AbstractContextManager[LayerSource]]:
    """What a folder would hold, and the model before rounding, repaired or merged anew."""
    if task.is_merged:
        merging = mergings(job, whole[0], [task], budgets)[0][task]
        return merging.plan, nullcontext(MergedSource(job.base, merging))
    plan = task_plan(job, *whole, task, budgets[task])
    if task.repair:
        return plan, repaired(job, plan, task.repair)
    return plan, nullcontext(PrunedSource(job.base, plan))
