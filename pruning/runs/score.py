"""Scoring alone: the statistics of a model, from which plans of every size are made."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from moe_jax.spread import ALONE, Spread
from pruning.kit.progress import Steps
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs.cap import capped_recipe
from pruning.runs.places import check_places, say_places, working
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.job import Job, open_job
from pruning.stages.model_record import identify
from pruning.stages.parts import help_collect
from pruning.stages.sizes import folder_bytes


def score(
    recipe: CompressionRecipe, steps: Steps | None = None, where: PlaceOptions | None = None
) -> ChannelStatistics:
    """Collect the statistics of a model on calibration text, or find those of an earlier run.

    The output folder gets statistics.safetensors and the recipe, which `plan` and `export` read.
    An interrupted run is repeated with the same recipe and goes on after its last part.

    Args:
      recipe: what to do; its planner options decide when the kept set counts as stable, and
        planner auto keeps windows out of the statistics, for `plan` to measure rules on.
      steps: where progress goes; default stderr, of process 0.
      where: devices and processes that share the sweep over the text; default one device, and the
        processes of `jax.distributed` if that is initialized. What needs a sweep of its own
        (weight gradients, nll; obs where it is added afterwards, with `until_stable` or where
        devices share the experts of a layer) process 0 does on one device, and the others wait.

    Returns:
      The statistics, in every process; they are also in the output folder.

    Raises:
      InputError: bad input, before any expensive work, or another process writes there.
      FullDiskError: the disk is full; what is finished stays.
      LostProcess: another process has ended; what is finished stays.
    """
    with working(recipe.output, where, steps) as (spread, steps):
        return _score(recipe, steps, spread)


def _score(recipe: CompressionRecipe, steps: Steps, spread: Spread) -> ChannelStatistics:
    job = open_for(recipe, steps, spread)

    def prepare() -> None:
        preflight.prepare(job, steps, exports=False, last="statistics.json")

    with capped_recipe(job.base, job.recipe, steps, ["scoring"]):
        statistics, _ = scored(job, steps, prepare)
    return statistics


def scored(
    job: Job, steps: Steps, prepare: Callable[[], None], more: Mapping[str, Any] | None = None
) -> tuple[ChannelStatistics, dict[str, Any]]:
    """The statistics of a job in every process, and what is noted beside them.

    Args:
      job: opened in all processes alike.
      steps: where progress goes.
      prepare: what process 0 does before any work; what it refuses ends all.
      more: what else processes must agree in, by name.

    Raises:
      InputError: not all were given the same, there is nothing to deal, or as of `prepare`.
    """
    spread = job.spread
    check_places(job.recipe, spread, job.base.config.moe.num_experts)
    say_places(spread, steps)
    spread.require_same({**scoring.facts(job), **(more or {})})

    def begin() -> bool:
        prepare()
        known = scoring.find_statistics(job) or scoring.lacking_obs(job)
        return spread.processes > 1 and known is None

    if spread.led(begin) and not spread.leads:
        help_collect(job, steps)
    if spread.processes == 1:
        return scoring.score(job, steps)
    arrays, noted = {}, {}
    if spread.leads:
        statistics, noted = scoring.score(job, steps)
        arrays = {name: np.asarray(value) for name, value in statistics.arrays().items()}
    job.base.weights_hash = spread.led(job.base.hash_weights)
    noted = spread.led(lambda: noted)
    return ChannelStatistics.from_arrays(spread.sent_arrays(arrays)), noted


def open_for(recipe: CompressionRecipe, steps: Steps, spread: Spread = ALONE) -> Job:
    """Open what a recipe needs, as a step that says what was read."""
    with steps.bar("open"):
        job = dataclasses.replace(open_job(recipe), spread=spread)
    if spread.leads:
        identify(job.base, job.output, steps)
    about = job.base.about
    gigabytes = folder_bytes(about.folder) / 1e9
    steps.detail(f"  model: {about.folder}, {about.family.model_type}, {gigabytes:,.3f} GB")
    shape = f"{len(job.calibration.tokens):,} windows of {job.recipe.window:,}"
    steps.detail(f"  calibration: {job.calibration.total:,} tokens in {shape}")
    for name, windows in job.evaluation.items():
        steps.detail(f"  evaluation {name}: {int(windows.scored.sum()):,} tokens to predict")
    return job
