"""What one plan of a comparison gives: made, repaired if asked for, and measured."""

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from convert.export_format import STORAGES
from moe_jax.errors import InputError
from moe_jax.stream import LayerSource, forward_hidden
from pruning.budget.merging import MERGES
from pruning.budget.plan import PruningPlan
from pruning.budget.rule import make_plan
from pruning.budget.rules import RULES
from pruning.kit.errors import BudgetError
from pruning.measure.quality import Reference, quality_of
from pruning.report.compared import AUTO, CHOSEN, MERGED, UNPRUNED, Result, bits_word
from pruning.runs.compared_sizes import written
from pruning.runs.compared_task import Task
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.prune import PrunedSource
from pruning.shrink.repair_model import LEAST_WINDOWS, Mode, repair_model, with_repair
from pruning.shrink.rounding import QuantizedSource
from pruning.stages.bit_curves import storages, whole_plan
from pruning.stages.choose import taken_candidate
from pruning.stages.job import Job
from pruning.stages.layers import provenance as of_plan
from pruning.stages.sizes import active_bytes, active_parameters
from pruning.text.windows import Windows

Kept = int | PruningPlan  # channels that a rule keeps for a task, or what is kept
Scored = tuple[ChannelStatistics, Mapping[str, Any]]  # sums, and what is noted beside them
FOLDER = "compare-repair"  # of the plan that is being repaired


def require_windows(job: Job, otherwise: str) -> None:
    """Raise InputError, `otherwise` its last cure, if there is too little text to repair on."""
    if (windows := len(job.calibration.tokens)) < LEAST_WINDOWS:
        raise InputError(
            f"repair takes {LEAST_WINDOWS} windows of calibration text, there are {windows}; give "
            f"more text, a shorter --window, or {otherwise}"
        )


def task_plan(
    job: Job,
    statistics: ChannelStatistics,
    provenance: Mapping[str, Any],
    task: Task,
    budget: Kept,
) -> PruningPlan:
    """The plan of a task.

    Raises:
      BudgetError: its rule cannot keep that many channels, or its plan takes too many bytes.
    """
    if task.rule == UNPRUNED:
        return whole_plan(job)
    if isinstance(budget, PruningPlan):
        return budget
    if not budget:
        raise BudgetError(f"no plan is as small in {bits_word(task.bits)} bits")
    if task.rule == CHOSEN:
        raise BudgetError("the rule that was chosen keeps another number of channels")
    rule, c = RULES[task.rule], job.base.config
    plan = make_plan(
        rule,
        statistics,
        budget=budget,
        block=job.recipe.block,
        experts_per_token=c.moe.experts_per_token,
        layer_indices=c.moe_layers,
        seed=job.recipe.seed + task.seed,
        notes={"model_hash": provenance["model_hash"], "tokens": provenance["tokens"]},
    )
    if task.cut:
        check_router(plan, c.moe.experts_per_token)
        plan = plan.with_cut_router()
    # Constants in the place of experts are not foreseen.
    if task.target and (size := written(job, plan, task.bits).nbytes) > task.target:
        raise BudgetError(f"its constants make it {size - task.target} bytes too large")
    return plan


def check_router(plan: PruningPlan, experts_per_token: int) -> None:
    """Raise BudgetError where a router without the rows of emptied experts has too few left."""
    if (fewest := int((plan.counts > 0).sum(axis=1).min())) < experts_per_token:
        raise BudgetError(
            f"a router without rows of dropped experts would know {fewest} in some layer, fewer "
            f"than the {experts_per_token} that a token goes to"
        )


def with_overlap(
    results: Sequence[Result],
    planned: Sequence[tuple[Task, PruningPlan]],
    job: Job,
    whole: Scored,
    budgets: Mapping[Task, Kept],
) -> list[Result]:
    """Results that say how far their plans keep what those of the whole text do.

    Args:
      results: of the plans.
      planned: the tasks of one draw or set, and their plans.
      job: with the dense model.
      whole: sums of the whole text.
      budgets: channels that each task keeps.
    """
    found = []
    for result, (task, plan) in zip(results, planned, strict=True):
        kept = (task_plan(job, *whole, task, budgets[task]) if task.is_of_other_text else plan).keep
        alike = (kept & plan.keep).sum() / (kept | plan.keep).sum()
        found.append(dataclasses.replace(result, overlap=float(alike)))
    return found


def joined(texts: Mapping[str, Windows]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [B, T] and their mask bool [B, T] of all texts, one behind the other."""
    tokens, valid = (
        np.concatenate([getattr(windows, name) for windows in texts.values()])
        for name in ("tokens", "valid")
    )
    return tokens, valid


@contextmanager
def repaired(
    job: Job, plan: PruningPlan, mode: Mode, on_layer: Callable[[int], None] | None = None
) -> Iterator[LayerSource]:
    """A pruned model that is repaired on the calibration text.

    The repaired weights lie in the output folder meanwhile, so that a killed repair goes on.

    Args:
      job: a resolved recipe with its model and calibration text.
      plan: what is kept.
      mode: of repair.
      on_layer: called with the index of each repaired layer.
    """
    folder = job.output / FOLDER
    repair_model(
        job.base,
        plan,
        job.calibration.tokens,
        job.calibration.valid,
        folder,
        mode=mode,
        provenance=of_plan(job, plan) | {"mode": mode},
        on_layer=on_layer,
        batch=job.recipe.batch,
        dtype=job.dtype,
    )
    yield with_repair(PrunedSource(job.base, plan), plan, folder)
    shutil.rmtree(folder)


def rounded(source: LayerSource, job: Job, plan: PruningPlan, bits: int) -> LayerSource:
    """A model under a plan with its weights in so many bits, as an export rounds them, unless the
    plan says it of each layer; 16 changes nothing."""
    how = storages(plan, bits)
    return source if how == STORAGES[16] else QuantizedSource(source, job.recipe.group_size, how)


def repaired_hidden(
    job: Job,
    plan: PruningPlan,
    mode: Mode,
    bits: Sequence[int],
    text: tuple[np.ndarray, np.ndarray],
    on_layer: Callable[[int], None],
) -> list[np.ndarray]:
    """Hidden states before the head of a model that is `repaired`.

    Args:
      job, plan, mode, on_layer: as of `repaired`.
      bits: of the weights; a model for each of them comes of the one repair.
      text: tokens int32 [B, T] and their mask bool [B, T].

    Returns:
      [B, T, D] for each of `bits`.
    """
    how: dict[str, Any] = {"batch": job.recipe.batch, "dtype": job.dtype}
    with repaired(job, plan, mode, on_layer) as model:
        return [forward_hidden(rounded(model, job, plan, one), *text, **how) for one in bits]


def task_result(
    task: Task,
    plan: PruningPlan,
    job: Job,
    states: np.ndarray,
    texts: Mapping[str, Windows],
    references: Mapping[str, Reference],
    shares: np.ndarray,
) -> Result:
    """What a plan gives.

    Args:
      task: its task.
      plan: what is kept.
      job: with the dense model.
      states: [B, T, D], hidden states of all texts under the plan.
      texts: by name, in the order of the states.
      references: of the dense model, by text.
      shares: [L, E], of the tokens that go to each expert.
    """
    quality, start = {}, 0
    for name, windows in texts.items():
        rows = states[start : start + len(windows.tokens)]
        start += len(windows.tokens)
        found = quality_of(Reference(job.base.head, rows), windows, references[name])
        quality[name] = found.to_dict()
    family, about = _described(task, plan)
    found = Result(
        **dataclasses.asdict(task),
        kept=int(plan.keep.sum()),
        emptied=int((plan.counts == 0).sum()),
        quality=quality,
        family=family,
        about=about,
        layer_bits=list(plan.layer_bits),
        layer_shares=_shares(plan),
    )
    if task.bits == AUTO:
        found = dataclasses.replace(found, rate=round(1.0 - plan.keep.mean().item(), 6))
    return dataclasses.replace(found, **_sizes(job, plan, task.bits, shares))


def _described(task: Task, plan: PruningPlan) -> tuple[str, str]:
    """Family and one line of what is measured."""
    if task.rule == CHOSEN:
        taken = taken_candidate(plan)["rule"]
        return "chosen", f"{taken}, which loses least on calibration windows kept out"
    if rule := RULES.get(task.rule):
        return rule.family, rule.about
    if merge := MERGES.get(task.rule):
        return MERGED, merge.about
    if task.skip_below:
        return "fewer experts", "experts of little weight skipped, after arXiv 2402.14800"
    if task.top_k:
        return "fewer experts", "each token's best experts, nothing removed"
    return "bits alone", "rounded to nearest, nothing removed" if task.bits < 16 else "as it is"


def _shares(plan: PruningPlan) -> list[float]:
    """Of each layer's channels, those kept, if the plan gives layers bits of their own."""
    found = [1.0] * len(plan.layer_bits)
    if found:
        for index, keep in zip(plan.layer_indices, plan.keep, strict=True):
            found[index] = round(keep.mean().item(), 6)
    return found


def _sizes(job: Job, plan: PruningPlan, bits: int, shares: np.ndarray) -> dict[str, int]:
    """What a plan takes in all and for each token, as fields of a result."""
    export = written(job, plan, bits)
    return {
        "bytes": export.nbytes,
        "parameters": export.parameters - export.mtp_parameters,
        "active": active_parameters(job.base.about, plan.counts, shares),
        "active_bytes": active_bytes(export, shares),
    }
