"""Plans from the statistics in a folder: one, or one for every prune rate."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from moe_jax.errors import InputError
from moe_jax.files import replace_text
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.options import BUDGETS
from pruning.recipe.recipe import ResolvedRecipe
from pruning.report import rates_page
from pruning.runs.cap import capped_recipe
from pruning.runs.rates import sweep_of
from pruning.runs.report import report
from pruning.scores.statistics import ChannelStatistics
from pruning.stages.folder import clear_leftovers
from pruning.stages.job import resolved
from pruning.stages.model_record import remember
from pruning.stages.stored import stored_base, stored_plans, stored_recipe
from pruning.stages.writer import only_writer


def plan_folder(
    folder: str | os.PathLike,
    rates: Sequence[float] = (),
    *,
    steps: Steps | None = None,
    **options: Any,
) -> list[tuple[Path, PruningPlan]]:
    """Choose the channels to keep, from the statistics that `score` or `compress` left.

    Args:
      folder: their output folder; gets plan.json, or with several rates plans/RATE/plan.json,
        sweep.csv and sweep.html. recipe.yaml stays that of the run: plan.json states its own
        options. Exports and a report that are there stay, marked if of an older plan.
      rates: prune rates; default the budget of the stored recipe or of `options`.
      steps: where progress goes; default stderr.
      options: of `PlanOptions`, and `memory_limit`, on top of the stored recipe. With planner auto
        the rules are measured at every rate by itself, for which the model is read; else one rule
        plans all rates within each other.

    Returns:
      (folder of the plan, plan) per rate, in the order of `rates`.

    Raises:
      InputError: nothing was scored there, no plan satisfies the options, the memory limit is too
        little, or another process writes there.
    """
    with only_writer(folder):
        return _plan_folder(Path(folder), rates, steps or Steps(), options)


def _plan_folder(
    folder: Path, rates: Sequence[float], steps: Steps, options: dict[str, Any]
) -> list[tuple[Path, PruningPlan]]:
    if asked := [name for name in BUDGETS if rates and options.get(name) is not None]:
        raise InputError(f"{asked[0]} and prune rates exclude each other; give one of them")
    recipe = stored_recipe(folder, **options)
    clear_leftovers(folder)
    base = stored_base(recipe, steps)
    whole = resolved(recipe, base.about)
    with capped_recipe(base, whole, steps, ["planning", "choice"], max(1, len(rates))):
        plans, statistics = stored_plans(folder, recipe, base, rates, steps)
    single, made = len(plans) == 1, []
    for one, plan in plans:
        target = folder if single else folder / f"plans/{one.prune_rate}"
        plan.save(target)
        if not single:
            # `export` and `verify` take the plans of a sweep like any other folder.
            stored = dataclasses.replace(one, output=str(target)).placed()
            replace_text(target / "recipe.yaml", stored.to_yaml())
            remember(base, target)
        if (target / "report.json").is_file():
            report(target, steps)
        made.append((target, plan))
    if not single:
        save_sweep(folder, base, plans, statistics)
    return made


def save_sweep(
    folder: Path,
    base: Checkpoint,
    plans: Sequence[tuple[ResolvedRecipe, PruningPlan]],
    statistics: ChannelStatistics,
    quality: Mapping[float | None, dict] | None = None,
) -> None:
    """Write sweep.csv and sweep.html for the plans of several rates; `quality` as in `sweep_of`."""
    rates = [one.prune_rate for one, _ in plans if one.prune_rate is not None]
    made = [plan for _, plan in plans]
    recipe = plans[0][0]
    if len({(one.criterion, one.attribution) for one, _ in plans}) > 1:
        # Planner auto took unlike rules: the usual score shows them all, whichever rate is first.
        recipe = dataclasses.replace(recipe, criterion=None, attribution=None)
    found = sweep_of(recipe, rates, made, statistics, base, quality)
    found.save(folder)
    rates_page.save(found, folder)
