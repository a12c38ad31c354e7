"""Scoring alone: the statistics of a model, from which plans of every size are made."""

import dataclasses

import numpy as np
import safetensors.numpy

from moe_jax.spread import Spread
from pruning.kit.progress import Steps
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs.cap import capped_recipe
from pruning.runs.places import check_places, places, say_places
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.job import Job, open_job
from pruning.stages.model_record import identify
from pruning.stages.parts import help_collect
from pruning.stages.sizes import folder_bytes
from pruning.stages.writer import only_writer


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
        (weight gradients, obs, nll) process 0 does on one device, and the others wait.

    Returns:
      The statistics, in every process; they are also in the output folder.

    Raises:
      InputError: bad input, before any expensive work, or another process writes there.
      FullDiskError: the disk is full; what is finished stays.
      LostProcess: another process has ended; what is finished stays.
    """
    steps = steps or Steps()
    spread = places(where or PlaceOptions(), steps)
    check_places(recipe, spread)
    if not spread.leads:
        return _help_score(recipe, spread)
    with only_writer(recipe.output):
        return _score(recipe, steps, spread)


def _score(recipe: CompressionRecipe, steps: Steps, spread: Spread) -> ChannelStatistics:
    job = dataclasses.replace(open_for(recipe, steps), spread=spread)
    say_places(spread, steps)
    spread.require_same(scoring.facts(job))

    def prepare() -> bool:
        preflight.prepare(job, steps, exports=False, last="statistics.json")
        return scoring.find_statistics(job) is None

    with capped_recipe(job.base, job.recipe, steps, ["scoring"]):
        spread.led(prepare)
        statistics, _ = scoring.score(job, steps)
    if spread.processes > 1:
        arrays = {name: np.asarray(value) for name, value in statistics.arrays().items()}
        spread.sent(safetensors.numpy.save(arrays))
    return statistics


def _help_score(recipe: CompressionRecipe, spread: Spread) -> ChannelStatistics:
    """What a process other than the first does: its windows."""
    steps = Steps(quiet=True)
    job = dataclasses.replace(open_job(recipe), spread=spread)
    spread.require_same(scoring.facts(job))
    with capped_recipe(job.base, job.recipe, steps, ["scoring"]):
        if spread.led(lambda: False):  # process 0 says whether there is something to do
            help_collect(job, steps)
    return ChannelStatistics.from_arrays(safetensors.numpy.load(spread.sent(b"")))


def open_for(recipe: CompressionRecipe, steps: Steps) -> Job:
    """Open what a recipe needs, as a step that says what was read."""
    with steps.bar("open"):
        job = open_job(recipe)
    identify(job.base, job.output, steps)
    about = job.base.about
    gigabytes = folder_bytes(about.folder) / 1e9
    steps.detail(f"  model: {about.folder}, {about.family.model_type}, {gigabytes:,.3f} GB")
    shape = f"{len(job.calibration.tokens):,} windows of {job.recipe.window:,}"
    steps.detail(f"  calibration: {job.calibration.total:,} tokens in {shape}")
    for name, windows in job.evaluation.items():
        steps.detail(f"  evaluation {name}: {int(windows.scored.sum()):,} tokens to predict")
    return job
