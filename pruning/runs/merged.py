"""Merged experts as rows of a comparison: planned on calibration text, measured like rules."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from convert.export_format import STORAGES
from moe_jax.errors import InputError
from pruning.budget.merging import MERGES, check_counts
from pruning.kit.errors import BudgetError
from pruning.measure.quality import Reference
from pruning.report.compared import Result
from pruning.runs.compared import Kept, joined, task_result
from pruning.runs.compared_task import Task
from pruning.scores.grams import sampled
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.merge import Merging
from pruning.shrink.merge_model import merged_hidden, plan_merges
from pruning.stages.job import Job
from pruning.text.windows import Windows

PLANS = "merged"  # folder of the plans, which `apply` takes
SAMPLE = 1 << 15  # tokens of the calibration text, about, by which experts are compared


def require_tokens(job: Job) -> None:
    """Raise InputError if there is too little calibration text to compare experts by."""
    tokens, experts = int(job.calibration.valid.sum()), job.base.config.moe.num_experts
    if tokens < experts:
        raise InputError(
            f"merging compares {experts} experts by what they do on at least as many tokens, there "
            f"are {tokens}; give more --calibration text, a larger --max-tokens, or leave --merge "
            "away"
        )


def mergings(
    job: Job,
    statistics: ChannelStatistics,
    tasks: Sequence[Task],
    budgets: Mapping[Task, Kept],
    on_layer: Callable[[int], None] | None = None,
) -> tuple[dict[Task, Merging], list[Result]]:
    """How the experts are merged for tasks; all of them are planned in one reading of the weights.

    Args:
      job: a resolved recipe with its model and calibration text.
      statistics: of that text.
      tasks: of rules that merge.
      budgets: channels that each task keeps, of whole experts.
      on_layer: called with the index of each finished layer.

    Returns:
      (the mergings, those with a reason why there is none).
    """
    c, counts, refused = job.base.config, {}, []
    for task in tasks:
        rule, plain = MERGES[task.rule], dataclasses.replace(task, bits=16)
        channels = budgets[task]
        assert isinstance(channels, int)  # a plan is of channels, which no merging removes
        found = rule.counts(statistics.tokens, channels // c.moe.d_expert)
        try:
            check_counts(rule, found, c.moe.experts_per_token)
            counts[plain] = found
        except BudgetError as error:
            refused.append(Result(**dataclasses.asdict(task), reason=str(error)))
    if not counts:
        return {}, refused
    text = job.calibration
    tokens, valid = sampled(text.tokens, text.valid, min(1.0, SAMPLE / text.tokens.size))
    planned = plan_merges(
        job.base, [(MERGES[task.rule], found) for task, found in counts.items()],
        statistics.tokens, tokens, valid, batch=min(job.recipe.batch, len(tokens)),
        dtype=job.dtype, on_layer=on_layer,
    )  # fmt: skip
    known = dict(zip(counts, planned, strict=True))
    plain = {task: dataclasses.replace(task, bits=16) for task in tasks}
    return {task: known[one] for task, one in plain.items() if one in known}, refused


def run_merges(
    job: Job,
    statistics: ChannelStatistics,
    tasks: Sequence[Task],
    budgets: Mapping[Task, Kept],
    texts: Mapping[str, Windows],
    references: Mapping[str, Reference],
    on_layer: Callable[[int], None],
) -> tuple[list[Result], list[Result]]:
    """Plan and measure merged models in two readings of the weights.

    Args:
      job, statistics, tasks, budgets: as of `mergings`.
      texts: that all are measured on.
      references: the dense model on each of them.
      on_layer: called with a layer's index when about so much of the work is done.

    Returns:
      (results, tasks that are refused with the reason).
    """
    layers = len(job.base)
    given = (job, statistics, tasks, budgets)
    planned, refused = mergings(*given, lambda layer: on_layer((layer - 1) // 2))
    if not planned:
        return [], refused
    _save(job, statistics, planned)
    text, met = joined(texts), np.zeros(len(planned))
    hidden = merged_hidden(
        job.base, *text, list(planned.values()), storages=[STORAGES[task.bits] for task in planned],
        met=met, group_size=job.recipe.group_size, batch=min(job.recipe.batch, len(text[0])),
        dtype=job.dtype, on_layer=lambda layer: on_layer((layers + layer) // 2),
    )  # fmt: skip
    results = []
    for (task, merging), states, count in zip(planned.items(), hidden, met, strict=True):
        plan = merging.plan
        leads = plan.keep.any(axis=2)  # [L, E]
        shares = leads * (count / text[1].sum() / leads.sum())
        results.append(task_result(task, plan, job, states, texts, references, shares))
    return results, refused


def _save(job: Job, statistics: ChannelStatistics, planned: Mapping[Task, Merging]) -> None:
    """Keep how experts are merged as plans for `apply`, one for all bits of a rule at a rate."""
    for task, merging in planned.items():
        notes = {
            "merge": task.rule, "prune_rate": task.rate, "planner": None, "repair": "none",
            "model_hash": job.base.fingerprint, "tokens": int(statistics.total_tokens),
        }  # fmt: skip
        merging.written(notes).save(job.output / PLANS / f"{task.rule}-{task.rate}")
