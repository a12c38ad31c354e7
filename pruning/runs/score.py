"""Scoring alone: the statistics of a model, from which plans of every size are made."""

from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs.cap import capped_recipe
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.job import Job, open_job
from pruning.stages.model_record import identify
from pruning.stages.sizes import folder_bytes
from pruning.stages.writer import only_writer


def score(recipe: CompressionRecipe, steps: Steps | None = None) -> ChannelStatistics:
    """Collect the statistics of a model on calibration text, or find those of an earlier run.

    The output folder gets statistics.safetensors and the recipe, which `plan` and `export` read.
    An interrupted run is repeated with the same recipe and goes on after its last part.

    Args:
      recipe: what to do; its planner options decide when the kept set counts as stable, and
        planner auto keeps windows out of the statistics, for `plan` to measure rules on.
      steps: where progress goes; default stderr.

    Returns:
      The statistics, which are also in the output folder.

    Raises:
      InputError: bad input, before any expensive work, or another process writes there.
      FullDiskError: the disk is full; what is finished stays.
    """
    with only_writer(recipe.output):
        return _score(recipe, steps or Steps())


def _score(recipe: CompressionRecipe, steps: Steps) -> ChannelStatistics:
    job = open_for(recipe, steps)
    with capped_recipe(job.base, job.recipe, steps, ["scoring"]):
        preflight.prepare(job, steps, exports=False, last="statistics.json")
        statistics, _ = scoring.score(job, steps)
    return statistics


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
