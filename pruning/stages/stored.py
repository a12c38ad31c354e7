"""An output folder opened again: its recipe, its model, and plans from its statistics."""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from convert.checkpoint import Checkpoint, open_checkpoint
from moe_jax.errors import InputError
from moe_jax.spread import ALONE, Spread
from pruning.budget.plan import PruningPlan
from pruning.demo import model_folder
from pruning.kit.progress import Steps
from pruning.recipe.options import BUDGETS
from pruning.recipe.plan_options import AUTO, RULE
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe, load_recipe
from pruning.recipe.values import check_rate
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import plan as planning
from pruning.stages import score as scoring
from pruning.stages.choose import choose, measurable
from pruning.stages.job import Job, open_job, resolved
from pruning.stages.model_record import identify_in_all


def stored_recipe(folder: Path, **given: Any) -> CompressionRecipe:
    """The recipe stored in an output folder, with the given options on top."""
    if not (folder / "recipe.yaml").is_file():
        raise InputError(f"{folder}/recipe.yaml does not exist; run `moe-compress score` first")
    # The folder may have moved since the recipe was written.
    recipe = load_recipe(folder / "recipe.yaml", **{"output": str(folder), **given})
    # As on the command line of `compress`: who names a rule gets it, and measures none.
    is_named = any(given.get(name) is not None for name in RULE) and not given.get("planner")
    return recipe.fixed() if is_named else recipe


def stored_base(recipe: CompressionRecipe, steps: Steps, spread: Spread = ALONE) -> Checkpoint:
    """The dense model that a stored recipe names, its weights read in 16 bits.

    Where processes share the work, process 0 tells all what identifies it.

    Raises:
      InputError: it is not there any more, or damaged.
    """
    folder = model_folder(recipe.model)
    if not folder.is_dir():
        raise InputError(
            f"{recipe.output}/recipe.yaml names the model {folder}, which is not there; if it has "
            "moved, give `score` its new place and the same options: nothing is measured again"
        )
    base = open_checkpoint(folder, dtype=jnp.bfloat16)
    identify_in_all(base, Path(recipe.output), steps, spread)
    return base


def stored_plans(
    folder: Path, recipe: CompressionRecipe, base: Checkpoint, rates: Sequence[float], steps: Steps
) -> tuple[list[tuple[ResolvedRecipe, PruningPlan]], ChannelStatistics]:
    """A plan for every prune rate, or for the recipe's own budget, from stored statistics.

    Plans of one rule lie within each other; planner auto takes a rule for every rate by itself.

    Returns:
      (recipe resolved, plan) per rate, and the statistics.
    """
    if recipe.bits == "auto":
        raise InputError(
            f"{folder} chooses bits of each layer with its channels, which `moe-compress compress` "
            "does: give it its options again with another --target-bytes and another --output"
        )
    for rate in rates:
        check_rate("prune_rate", rate)
    one = dataclasses.replace(recipe, **dict.fromkeys(BUDGETS)) if rates else recipe
    one = resolved(one, base.about)
    statistics, provenance = scoring.stored_statistics(folder, base)
    one = measurable(one, provenance, steps)
    if one.planner == AUTO:
        open_recipes = [dataclasses.replace(one, prune_rate=rate) for rate in rates] or [one]
        texts = functools.partial(_calibration, recipe)
        return choose(open_recipes, statistics, provenance, base, texts, steps), statistics
    if not rates:
        return [(one, planning.plan(one, statistics, provenance, base.about))], statistics
    plans = planning.plans_of_rates(one, list(rates), statistics, provenance, base.about)
    recipes = [dataclasses.replace(one, prune_rate=rate) for rate in rates]
    return list(zip(recipes, plans, strict=True)), statistics


def _calibration(recipe: CompressionRecipe) -> Job:
    """The calibration text as scoring had it, with the windows that it kept out."""
    # Evaluation texts decide only that no further windows were set aside for measuring.
    calibration = dataclasses.replace(recipe, evaluation=())
    return open_job(calibration, measures=not recipe.evaluation)
