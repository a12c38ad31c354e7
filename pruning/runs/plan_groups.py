"""Plans that are measured together: masked ones share readings of the model."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from pruning.budget.plan import PruningPlan
from pruning.kit.errors import BudgetError
from pruning.kit.progress import OnStep
from pruning.measure.quality import Reference
from pruning.report.compared import Result
from pruning.runs.compared import (
    Kept,
    Scored,
    joined,
    repaired_hidden,
    task_plan,
    task_result,
    with_overlap,
)
from pruning.runs.compared_task import Task
from pruning.runs.merged import run_merges
from pruning.shrink.masked import masked_hidden
from pruning.stages.bit_curves import storages
from pruning.stages.job import Job
from pruning.stages.sizes import shares_among_kept, token_shares
from pruning.text.windows import Windows

STATE_BYTES = 1 << 30  # hidden states of a group of plans on the host
GROUP = 16  # plans per group at most: results are saved after each


def run_groups(
    job: Job,
    own: Scored,
    whole: Scored,
    tasks: Sequence[Task],
    budgets: Mapping[Task, Kept],
    texts: Mapping[str, Windows],
    references: Mapping[str, Reference],
    on_step: OnStep,
) -> Iterator[tuple[list[Result], list[Result]]]:
    """Plan and measure tasks, one group after the other, shared out to processes.

    Args:
      job: model, how it is run, and the processes.
      own: statistics and what is noted of them, by which the tasks are planned.
      whole: those of the whole calibration text, if they are of a draw.
      tasks: of one draw.
      budgets: channels that each task keeps, and what else it is compared with.
      texts: that all are measured on.
      references: the dense model on each of them.
      on_step: told of layers done and of how many there are.

    Yields:
      Results, and tasks that are refused with the reason.
    """
    done, total = 0, len(tasks) * len(job.base)
    share = -(-len(tasks) // job.spread.processes)

    def measured(group: list[Task]) -> list[list[dict[str, Any]]]:
        given = (job, own, whole, group, budgets, texts, references)
        both = _run_group(*given, lambda layer: on_step(done + (layer + 1) * len(group), total))
        return [[dataclasses.asdict(result) for result in results] for results in both]

    groups = _groups(tasks, min(_group_size(job, texts), share))
    for group, both in job.spread.shared_out(groups, measured):
        done += len(group) * len(job.base)
        results, refused = ([Result(**values) for values in one] for one in both)
        yield results, refused


def _groups(tasks: Sequence[Task], size: int) -> list[list[Task]]:
    """Tasks that run together: masked ones share readings of the model, merged ones others, and a
    repair is that of one plan, whatever its bits."""
    merged = [task for task in tasks if task.is_merged]
    masked = [task for task in tasks if not task.repair and not task.is_merged]
    groups = [
        kind[start : start + size]
        for kind in (masked, merged)
        for start in range(0, len(kind), size)
    ]
    repairs: dict[Task, list[Task]] = {}
    for task in (task for task in tasks if task.repair):
        repairs.setdefault(dataclasses.replace(task, bits=16), []).append(task)
    return groups + list(repairs.values())


def _group_size(job: Job, texts: Mapping[str, Windows]) -> int:
    states = sum(w.tokens.size for w in texts.values()) * job.base.config.d_model
    return max(1, min(GROUP, STATE_BYTES // (states * np.dtype(job.dtype).itemsize)))


def _run_group(
    job: Job,
    scored: Scored,
    whole: Scored,
    group: Sequence[Task],
    budgets: Mapping[Task, Kept],
    texts: Mapping[str, Windows],
    references: Mapping[str, Reference],
    on_layer: Callable[[int], None],
) -> tuple[list[Result], list[Result]]:
    if group[0].is_merged:
        return run_merges(job, scored[0], group, budgets, texts, references, on_layer)
    planned: list[tuple[Task, PruningPlan]] = []
    refused = []
    for task in group:
        try:
            plan = task_plan(job, *scored, task, budgets[task])
            planned.append((task, plan))
        except BudgetError as error:
            # It may be too small for whole experts: the other rules go on.
            refused.append(Result(**dataclasses.asdict(task), reason=str(error)))
    if not planned:
        return [], refused
    plans, text = [plan for _, plan in planned], joined(texts)
    bits = [task.bits for task, _ in planned]
    shares = [token_shares(job.base.about, scored[0])] * len(planned)
    if group[0].repair:
        hidden = repaired_hidden(job, plans[0], group[0].repair, bits, text, on_layer)
    else:
        fewer = [task.fewer for task, _ in planned]
        routed = np.zeros(len(plans))
        hidden = masked_hidden(
            job.base, *text, plans,
            storages=[storages(plan, task.bits) for task, plan in planned], fewer=fewer,
            routed=routed, group_size=job.recipe.group_size, dtype=job.dtype,
            batch=min(job.recipe.batch, len(text[0])), on_layer=on_layer,
        )  # fmt: skip
        shares = [
            usual if one is None else np.full(usual.shape, count / text[1].sum() / usual.size)
            for usual, one, count in zip(shares, fewer, routed, strict=True)
        ]
        per_token = job.base.config.moe.experts_per_token
        shares = [
            shares_among_kept(plan, per_token) if plan.cut_router else own
            for plan, own in zip(plans, shares, strict=True)
        ]
    results = [
        task_result(task, plan, job, states, texts, references, own)
        for (task, plan), states, own in zip(planned, hidden, shares, strict=True)
    ]
    return with_overlap(results, planned, job, whole, budgets), refused
