"""The exports of the plan in a folder."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.stages import folder as output_folder
from pruning.stages import gptq as gptq_stage
from pruning.stages import preflight
from pruning.stages import repair as repair_stage
from pruning.stages.export import codes_folder, export
from pruning.stages.job import open_job
from pruning.stages.repair import stored_repair
from pruning.stages.sizes import form_of
from pruning.stages.stored import stored_base, stored_recipe
from pruning.stages.writer import only_writer


def export_folder(
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    steps: Steps | None = None,
    **options: Any,
) -> list[Path]:
    """Write the checkpoints of a plan.

    Args:
      folder: holds plan.json and recipe.yaml; gets exports/NAME.
      overwrite: replace exports that are there.
      steps: where progress goes; default stderr.
      options: `export`, `mtp` and `repair` of `ExportOptions`, on top of the stored recipe; without
        `repair`, weights are repaired if they were for this plan.

    Returns:
      The folders, in the order of the recipe.

    Raises:
      InputError: there is no plan, its widths do not fit a format, an export is in the way, or
        another process writes there.
      OSError: the disk is too small.
    """
    with only_writer(folder):
        return _export_folder(Path(folder), overwrite, steps or Steps(), options)


def _export_folder(
    folder: Path, overwrite: bool, steps: Steps, options: dict[str, Any]
) -> list[Path]:
    recipe = stored_recipe(folder, **options)
    output_folder.clear_leftovers(folder)
    plan, base = PruningPlan.load(folder), stored_base(recipe, steps)
    exports = folder / "exports"
    preflight.check_exports(base, plan, recipe, exports, steps, overwrite=overwrite)
    asked = options.get("repair")
    codes, repair = None, stored_repair(recipe, plan) if asked is None else None
    if codes_folder(recipe) is not None or asked in ("expert", "layer"):
        job = dataclasses.replace(open_job(recipe), base=base)  # identified
        if asked is not None:
            windows = len(job.calibration.tokens)
            needed = repair_stage.repair_bytes(base.about, job.recipe, windows)
            preflight.require_space(folder, {"repair": needed})
            repair = repair_stage.repair(job, plan, steps)
        codes = gptq_stage.quantize(job, plan, steps, repair)
    for name in recipe.export:
        form, target = form_of(recipe, name, plan), exports / name
        given: dict[str, Any] = {"codes": codes, "repair": repair, "overwrite": overwrite}
        export(base, plan, form, target, steps, **given)
    return [exports / name for name in recipe.export]
