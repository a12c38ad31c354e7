"""What one plan of a comparison gives: made, repaired if asked for, and measured."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.stream import forward_hidden
from pruning.budget.plan import PruningPlan
from pruning.budget.rule import make_plan
from pruning.budget.rules import RULES
from pruning.measure.quality import Reference, quality_of
from pruning.report.compared import Repaired, Result
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.prune import PrunedSource
from pruning.shrink.repair_model import LEAST_WINDOWS, Mode, repair_model, with_repair
from pruning.stages.job import Job
from pruning.stages.layers import provenance as of_plan
from pruning.text.windows import Windows

FOLDER = "compare-repair"  # of the plan that is being repaired


@dataclass(frozen=True)
class Task:
    """One rule at one rate with one seed, repaired or not."""

    rule: str
    rate: float
    seed: int
    repair: Repaired = ""


def require_windows(job: Job) -> None:
    """Raise InputError if there is too little calibration text to repair on."""
    if (windows := len(job.calibration.tokens)) < LEAST_WINDOWS:
        raise InputError(
            f"repair takes {LEAST_WINDOWS} windows of calibration text, there are {windows}; give "
            "more text, a shorter --window, or leave --repair away"
        )


def task_plan(
    job: Job,
    statistics: ChannelStatistics,
    provenance: Mapping[str, Any],
    task: Task,
    budget: int,
) -> PruningPlan:
    """The plan of a task.

    Raises:
      BudgetError: its rule cannot keep that many channels.
    """
    rule, c = RULES[task.rule], job.base.config
    return make_plan(
        rule,
        statistics,
        budget=budget,
        block=job.recipe.block,
        experts_per_token=c.moe.experts_per_token,
        layer_indices=c.moe_layers,
        seed=job.recipe.seed + task.seed,
        notes={"model_hash": provenance["model_hash"], "tokens": provenance["tokens"]},
    )


def joined(texts: Mapping[str, Windows]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 [B, T] and their mask bool [B, T] of all texts, one behind the other."""
    tokens, valid = (
        np.concatenate([getattr(windows, name) for windows in texts.values()])
        for name in ("tokens", "valid")
    )
    return tokens, valid


def repaired_hidden(
    job: Job,
    plan: PruningPlan,
    mode: Mode,
    text: tuple[np.ndarray, np.ndarray],
    on_layer: Callable[[int], None],
) -> np.ndarray:
    """Hidden states before the head of a pruned model that was repaired on the calibration text.

    The repaired weights lie in the output folder meanwhile, so that a killed repair goes on.

    Args:
      job: a resolved recipe with its model and calibration text.
      plan: what is kept.
      mode: of repair.
      text: tokens int32 [B, T] and their mask bool [B, T].
      on_layer: called with the index of each repaired layer.

    Returns:
      [B, T, D].
    """
    folder, how = job.output / FOLDER, {"batch": job.recipe.batch, "dtype": job.dtype}
    repair_model(
        job.base,
        plan,
        job.calibration.tokens,
        job.calibration.valid,
        folder,
        mode=mode,
        provenance=of_plan(job, plan) | {"mode": mode},
        on_layer=on_layer,
        **how,
    )
    hidden = forward_hidden(with_repair(PrunedSource(job.base, plan), folder), *text, **how)
    shutil.rmtree(folder)
    return hidden


def task_result(
    task: Task,
    plan: PruningPlan,
    job: Job,
    states: np.ndarray,
    texts: Mapping[str, Windows],
    references: Mapping[str, Reference],
) -> Result:
    """What a plan gives.

    Args:
      task: its task.
      plan: what is kept.
      job: with the dense model.
      states: [B, T, D], hidden states of all texts under the plan.
      texts: by name, in the order of the states.
      references: of the dense model, by text.
    """
    quality, start = {}, 0
    for name, windows in texts.items():
        rows = states[start : start + len(windows.tokens)]
        start += len(windows.tokens)
        found = quality_of(Reference(job.base.head, rows), windows, references[name])
        quality[name] = found.to_dict()
    return Result(
        task.rule,
        task.rate,
        task.seed,
        task.repair,
        kept=int(plan.keep.sum()),
        emptied=int((plan.counts == 0).sum()),
        quality=quality,
        family=RULES[task.rule].family,
        about=RULES[task.rule].about,
    )
