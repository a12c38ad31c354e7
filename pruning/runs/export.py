"""The exports of the plan in a folder."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from moe_jax.spread import Spread
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import Allowance
from pruning.kit.progress import Steps
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.runs.cap import capped
from pruning.runs.held import export_bytes
from pruning.runs.memory import Foretold
from pruning.runs.places import working
from pruning.runs.report import report
from pruning.stages import folder as output_folder
from pruning.stages import gptq as gptq_stage
from pruning.stages import preflight
from pruning.stages import repair as repair_stage
from pruning.stages.export import codes_folder, export
from pruning.stages.folder import BEGUN
from pruning.stages.job import open_job, resolved
from pruning.stages.repair import stored_repair
from pruning.stages.sizes import export_of, form_of
from pruning.stages.stored import stored_base, stored_recipe


def export_folder(
    folder: str | os.PathLike,
    *,
    overwrite: bool = False,
    steps: Steps | None = None,
    where: PlaceOptions | None = None,
    **options: Any,
) -> list[Path]:
    """Write the checkpoints of a plan.

    An interrupted call is repeated with the same arguments and goes on at the next of them.

    Args:
      folder: holds plan.json and recipe.yaml; gets exports/NAME.
      overwrite: replace exports that are there.
      steps: where progress goes; default stderr, of process 0.
      where: processes that share the layers, to the same bytes; default those of
        `jax.distributed` if that is initialized.
      options: `export`, `mtp` and `repair` of `ExportOptions`, and `memory_limit`, on top of the
        stored recipe; without `repair`, weights are repaired if they were for this plan. With
        `cut_router`, and `top_k`, the plan is changed so, and stored.

    Returns:
      The folders, in the order of the recipe.

    Raises:
      InputError: there is no plan, its widths do not fit a format, an export is in the way, the
        memory limit is too little, or another process writes there.
      OSError: the disk is too small.
      LostProcess: another process has ended; what is finished stays.
    """
    with working(folder, where, steps) as (spread, steps):
        return _export_folder(Path(folder), overwrite, steps, options, spread)


def _export_folder(
    folder: Path, overwrite: bool, steps: Steps, options: dict[str, Any], spread: Spread
) -> list[Path]:
    cuts = bool(options.get("cut_router"))
    if cuts:
        options = {"repair": "none", **options}
    recipe, plan = stored_recipe(folder, **options), PruningPlan.load(folder)
    if cuts:
        plan = plan.with_cut_router(options.get("top_k"))
    asked = {"plan": plan.content_hash, "export": list(recipe.export), "mtp": recipe.mtp}
    asked |= {"repair": options.get("repair")}
    spread.require_same({**asked, "overwrite": overwrite})
    if spread.leads:
        output_folder.clear_leftovers(folder)
    base = stored_base(recipe, steps, spread)
    exports, begun = folder / "exports", folder / BEGUN
    wanted = [exports / name for name in recipe.export]

    def missing() -> list[str]:
        # None of them was there when that command began, so those that are there are whole.
        resumed = not overwrite and _read_begun(begun) == asked
        return [path.name for path in wanted if not (resumed and path.exists())]

    if left := tuple(spread.led(missing)):
        recipe = dataclasses.replace(recipe, export=left)
        takes = _takes(base, plan, recipe, asked["repair"])
        with capped(base, recipe.memory_limit, takes, steps):
            _write(base, plan, recipe, wanted, begun, asked, steps, spread, overwrite=overwrite)
    if spread.leads:
        begun.unlink(missing_ok=True)
    return wanted


def _takes(
    base: Checkpoint, plan: PruningPlan, recipe: CompressionRecipe, mode: str | None
) -> Callable[[Allowance], dict[str, int]]:
    """What the stages take, by the allowance; arguments as of `_changed`."""
    if codes_folder(recipe) is None and mode in (None, "none"):
        by_group = not plan.merged
        forms = (form_of(recipe, name, plan) for name in recipe.export)
        by_group &= all(export_of(base.about, plan, form).by_group for form in forms)
        return lambda found: {"export": export_bytes(base.about, found, by_group)}
    whole = resolved(recipe, base.about)
    stages = ["export", "gptq", *["repair"] * (mode is not None)]
    foretold = Foretold(base.about, whole, plan=plan, alone=True)
    return lambda found: foretold.peaks(stages, found)


def _write(
    base: Checkpoint,
    plan: PruningPlan,
    recipe: CompressionRecipe,
    wanted: list[Path],
    begun: Path,
    asked: dict[str, Any],
    steps: Steps,
    spread: Spread,
    *,
    overwrite: bool,
) -> None:
    """Write the exports that a recipe names of all that are `wanted`; what was `asked` for lies in
    the file `begun` meanwhile."""
    exports = Path(recipe.output) / "exports"

    def begin() -> None:
        preflight.check_exports(base, plan, recipe, exports, steps, overwrite=overwrite)
        begun.unlink(missing_ok=True)
        _store(plan, Path(recipe.output), steps)
        if not overwrite:
            exports.mkdir(exist_ok=True)
            replace_text(begun, json.dumps(asked) + "\n")

    spread.led(begin)
    try:
        given = _changed(base, plan, recipe, asked["repair"], steps, spread)
        for name in recipe.export:
            form, target = form_of(recipe, name, plan), exports / name
            export(base, plan, form, target, steps, overwrite=overwrite, spread=spread, **given)
    finally:
        # Without any there is nothing to go on from.
        if spread.leads and not any(path.exists() for path in wanted):
            begun.unlink(missing_ok=True)


def _store(plan: PruningPlan, folder: Path, steps: Steps) -> None:
    """Make a plan that of the folder, if it is another; a report that is there says of which."""
    if PruningPlan.load(folder).content_hash == plan.content_hash:
        return
    plan.save(folder)
    steps.say(f"{folder}/plan.json removes the router's rows of emptied experts from now on")
    if (folder / "report.json").is_file():
        report(folder, steps)


def _changed(
    base: Checkpoint,
    plan: PruningPlan,
    recipe: CompressionRecipe,
    mode: str | None,
    steps: Steps,
    spread: Spread,
) -> dict[str, Path | None]:
    """Folders of repaired weights and 4-bit codes, as `export` takes them, made if need be.

    Args:
      base, plan, recipe: what is written.
      mode: of a repair that is asked for; None takes what there is.
      steps: where progress goes.
      spread: the processes that share the text.
    """
    repair = stored_repair(recipe, plan) if mode is None else None
    if codes_folder(recipe) is None and mode in (None, "none"):
        return {"codes": None, "repair": repair}
    job = dataclasses.replace(open_job(recipe), base=base, spread=spread)  # identified
    spread.led(lambda: preflight.check_changes(job, plan, repairs=mode is not None))
    if mode is not None:
        repair = repair_stage.repair(job, plan, steps)
    return {"codes": gptq_stage.quantize(job, plan, steps, repair), "repair": repair}


def _read_begun(begun: Path) -> dict[str, Any] | None:
    """What the command was that was interrupted here, if one was."""
    try:
        return read_json(begun)
    except (InputError, OSError):
        return None
