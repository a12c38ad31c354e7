"""A comparison opened: its model, how plans are stored, its texts and sets of them."""

import dataclasses
from collections.abc import Mapping, Sequence

from moe_jax.spread import ALONE, Spread
from pruning.recipe.options import COMPARED_TOKENS
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs.calibration_sets import with_sets
from pruning.runs.compared_sizes import rounded_recipe
from pruning.runs.controls import Controls
from pruning.stages.bit_curves import require_kept_out
from pruning.stages.job import Job, open_job
from pruning.stages.measure import first_tokens
from pruning.text.calibration import TokenBatch
from pruning.text.kept_out import keep_out


def opened(
    recipe: CompressionRecipe, controls: Controls, spread: Spread = ALONE
) -> tuple[Job, Mapping[str, TokenBatch]]:
    """The job of a recipe, whose groups and blocks suit all of the bits, and the sets of text."""
    # Of 16-bit weights no group restricts the widths.
    plain = dataclasses.replace(recipe, bits=16, export=(), planner=recipe.used_planner,
                                repair="none")  # fmt: skip
    job, sets = _open(plain, controls.sets)
    job = dataclasses.replace(job, spread=spread)
    if controls.rounds:
        job = dataclasses.replace(job, recipe=rounded_recipe(job, plain, controls.stored))
    if controls.keeps_out:
        calibration, kept_out = keep_out(job.calibration)
        job = dataclasses.replace(job, calibration=calibration, kept_out=kept_out)
        require_kept_out(job)
    return job, sets


def _open(
    recipe: CompressionRecipe, files: Mapping[str, Sequence[str]]
) -> tuple[Job, Mapping[str, TokenBatch]]:
    """The job of a recipe, its texts ending with the window that has the last token wanted, and
    the sets of calibration text, by the files of each."""
    mix = bool(files) and not recipe.calibration
    if mix:
        every = tuple(file for own in files.values() for file in own)
        recipe = dataclasses.replace(recipe, calibration=every)
    wanted = recipe.evaluation_tokens or COMPARED_TOKENS
    read = wanted + (recipe.window or 2048)
    asked = dataclasses.replace(recipe, evaluation_tokens=read)
    job = open_job(asked, measures=not files)
    texts = {name: first_tokens(windows, wanted) for name, windows in job.evaluation.items()}
    stored = dataclasses.replace(job.recipe, evaluation_tokens=wanted)
    job = dataclasses.replace(job, recipe=stored, evaluation=texts)
    return with_sets(job, files, wanted, mix=mix) if files else (job, {})
