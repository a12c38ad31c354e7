"""The exports of the plan in a folder."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.stages import folder as output_folder
from pruning.stages import gptq as gptq_stage
from pruning.stages import preflight
from pruning.stages.export import codes_folder, export
from pruning.stages.folder import BEGUN
from pruning.stages.job import open_job
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

    An interrupted call is repeated with the same arguments and goes on at the next of them.

    Args:
      folder: holds plan.json and recipe.yaml; gets exports/NAME.
      overwrite: replace exports that are there.
      steps: where progress goes; default stderr.
      options: `export` and `mtp` of `ExportOptions`, on top of the stored recipe.

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
    exports, begun = folder / "exports", folder / BEGUN
    asked = {"plan": plan.content_hash, "export": list(recipe.export), "mtp": recipe.mtp}
    wanted = [exports / name for name in recipe.export]
    # None of them was there when that command began, so those that are there are whole.
    resumed = not overwrite and _read_begun(begun) == asked
    left = tuple(path.name for path in wanted if not (resumed and path.exists()))
    if left:
        recipe = dataclasses.replace(recipe, export=left)
        preflight.check_exports(base, plan, recipe, exports, steps, overwrite=overwrite)
        exports.mkdir(exist_ok=True)
        begun.unlink(missing_ok=True)
        if not overwrite:
            replace_text(begun, json.dumps(asked) + "\n")
    codes = None
    if left and codes_folder(recipe) is not None:
        job = dataclasses.replace(open_job(recipe), base=base)  # identified
        codes = gptq_stage.quantize(job, plan, steps)
    for name in left:
        form, target = form_of(recipe, name, plan), exports / name
        export(base, plan, form, target, steps, codes=codes, overwrite=overwrite)
    begun.unlink(missing_ok=True)
    return wanted


def _read_begun(begun: Path) -> dict[str, Any] | None:
    """What the command was that was interrupted here, if one was."""
    try:
        return read_json(begun)
    except (InputError, OSError):
        return None
