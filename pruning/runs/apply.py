"""A plan made before or elsewhere, applied to the weights it was made for."""

import dataclasses
import math
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp

from convert.checkpoint import Checkpoint, open_checkpoint
from convert.export_format import MIXED, FormatName
from moe_jax.errors import InputError
from moe_jax.spread import Spread
from pruning.budget.plan import PruningPlan
from pruning.budget.record import recorded_options
from pruning.demo import model_folder
from pruning.kit.hub import pinned
from pruning.kit.memory import Allowance
from pruning.kit.progress import Steps
from pruning.recipe.options import BUDGETS, ExportOptions, fields_of
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe, load_recipe
from pruning.runs.cap import capped
from pruning.runs.memory import Foretold
from pruning.runs.places import working
from pruning.stages import folder as output_folder
from pruning.stages import preflight
from pruning.stages import repair as repair_stage
from pruning.stages.between_sizes import between_files
from pruning.stages.checks import Check, require_verified
from pruning.stages.export import export
from pruning.stages.job import open_job, resolved
from pruning.stages.model_record import remember
from pruning.stages.probe_windows import random_probe
from pruning.stages.remarks import say_left_out, say_nothing_saved
from pruning.stages.repair import repair_bytes
from pruning.stages.sizes import export_of, export_sizes, form_of
from pruning.stages.verify import verify_export

# How a plan's text was read, of what it says of its scoring.
READING = ("calibration_field", "max_tokens", "window", "dtype")


def apply_plan(
    plan: str | os.PathLike,
    model: str,
    output: str | os.PathLike,
    *,
    export: Sequence[FormatName] = (),
    bits: Literal[4, 8, 16, "auto"] = 4,
    group_size: int | None = None,
    requantize: bool = False,
    mtp: Literal["drop", "keep", "prune"] = "drop",
    calibration: Sequence[str] = (),
    repair: Literal["none", "expert", "layer"] | None = None,
    cut_router: bool = False,
    top_k: int | None = None,
    allow_other_model: bool = False,
    overwrite: bool = False,
    memory_limit: int | str | None = None,
    steps: Steps | None = None,
    where: PlaceOptions | None = None,
) -> list[Check]:
    """Export a model under a stored plan and verify every export.

    Nothing is scored or planned, and a text is read only to repeat the repair of the plan. The
    output folder gets `exports/`, the plan and a recipe that says how both came about. An
    interrupted run goes on when it is repeated.

    Args:
      plan: folder with plan.json and plan.safetensors, or plan.json.
      model: the dense checkpoint that the plan was made for, or "demo".
      output: folder to make.
      export: formats to write; default ragged-int4, ragged-bf16 where `bits` is 16, and padded-fp8
        where it is 8; ragged-mixed of a plan that has bits of its own for each layer.
      bits: 4, 8 or 16; weights in few bits are rounded to nearest. "auto" are those of the plan.
      group_size: weights per 4-bit scale; default as in a recipe.
      requantize, mtp: as in a recipe.
      calibration: text files to repair on, as in a recipe; without any, nothing is repaired.
      repair: how, as in a recipe; default as the plan says.
      cut_router, top_k: as in a recipe, of a plan that empties experts; default as the plan says.
      allow_other_model: apply it to another model of the same shape, such as the base of the one
        that it was made for; the exports' cards say so.
      overwrite, memory_limit: as in a recipe.
      steps: where progress goes; default stderr, of process 0.
      where: processes that share the layers, and the text of a repair; default those of
        `jax.distributed` if that is initialized.

    Returns:
      The checks of all exports, all passed.

    Raises:
      InputError: the plan is another model's, its widths do not fit the format or the memory limit,
        the output folder is in the way, or another process writes there; nothing was written.
      OSError: the plan is missing, or the disk is too small.
      VerificationError: an export differs from the model in memory; it is kept.
      LostProcess: another process has ended; what is finished stays.
    """
    given = {"model": pinned(model), "output": os.fspath(output), "export": tuple(export)}
    given |= {"bits": bits, "mtp": mtp, "overwrite": overwrite, "requantize": requantize}
    optional = {"group_size": group_size, "calibration": tuple(calibration), "repair": repair}
    optional |= {"memory_limit": memory_limit, "cut_router": cut_router, "top_k": top_k}
    given |= {name: value for name, value in optional.items() if value}
    with working(output, where, steps) as (spread, steps):
        return _apply(Path(plan), model, given, allow_other_model, steps, spread)


def _apply(
    source: Path,
    model: str,
    given: dict[str, Any],
    allow_other_model: bool,
    steps: Steps,
    spread: Spread,
) -> list[Check]:
    with steps.bar("open"):
        found = PruningPlan.load(source)
        if given.get("cut_router"):
            found = found.with_cut_router(given.get("top_k"))
        # 16-bit weights, as in every other stage: the exports store these.
        base = open_checkpoint(model_folder(model), dtype=jnp.bfloat16)
        _require_shape(found, base)
    if allow_other_model:  # before any folder is compared with the plan
        with steps.bar("identify the model") as on_step:
            base.weights_hash = spread.led(partial(base.hash_weights, on_step))
        found = found.moved_to(base.fingerprint)
    if given["bits"] == "auto":
        if not found.layer_bits:
            raise InputError(
                "bits='auto' are those that a plan says of each layer, and this one says none; "
                "choose among 4, 8, 16"
            )
        given = given | {"bits": 4}  # of the layer with the fewest, as of the format
    if found.layer_bits and not given["export"]:
        given = given | {"export": (MIXED,)}
    recipe = _recipe(source, found, base, given)
    same = repr([(name, getattr(recipe, name)) for name in fields_of(ExportOptions)])
    spread.require_same({"plan": found.content_hash, "recipe": same})
    foretold = Foretold(base.about, recipe, plan=found)

    def takes(some: Allowance) -> dict[str, int]:
        return foretold.peaks(("repair", "export", "verify"), some)

    with capped(base, recipe.memory_limit, takes, steps):
        missing = spread.led(partial(_prepare, recipe, found, source, base, steps))
        base.weights_hash = spread.led(base.hash_weights)
        preflight.say_mtp(base.about, recipe, steps)
        if spread.leads:
            found.save(recipe.output)
        repair = _repair(base, found, recipe, steps, spread)
        checks = _write(base, found, recipe, missing, repair, steps, spread)
    require_verified(checks)
    return checks


def _write(
    base: Checkpoint,
    plan: PruningPlan,
    recipe: ResolvedRecipe,
    missing: list[str],
    repair: Path | None,
    steps: Steps,
    spread: Spread,
) -> list[Check]:
    """Write the missing exports; checks of all."""
    checks = []
    for name in recipe.export:
        form, target = form_of(recipe, name, plan), Path(recipe.output) / "exports" / name
        if name in missing:
            export(base, plan, form, target, steps, repair=repair, spread=spread)
        with steps.bar(f"verify {name}"):
            given = {"repair": repair, "spread": spread}
            checks += verify_export(base, plan, form, target, random_probe(base), **given)
    return checks


def _repair(
    base: Checkpoint, plan: PruningPlan, recipe: ResolvedRecipe, steps: Steps, spread: Spread
) -> Path | None:
    """Repeat the repair of a plan on the text that is given, or say that there is none."""
    said = plan.provenance
    if recipe.repair == "none":
        if said.get("repair") in ("expert", "layer"):
            steps.say(
                f"not repaired: the plan names repair={said['repair']!r}, which needs its "
                "calibration text; give it with --calibration"
            )
        return None
    # As when the plan was made: with texts to measure on, all windows were read.
    job = open_job(recipe, measures=not said.get("evaluation"))
    texts = {source["sha256"] for source in job.calibration.sources}
    if texts != {source.get("sha256") for source in said.get("sources") or ()}:
        steps.say("the text is not the one that the plan was made on, so neither is the repair")
    return repair_stage.repair(dataclasses.replace(job, base=base, spread=spread), plan, steps)


apply = apply_plan  # its name on the command line


def _require_model(plan: PruningPlan, base: Checkpoint) -> None:
    """Raise InputError unless the plan names this model."""
    try:
        plan.require_model(base.fingerprint)
    except InputError as error:
        cure = "or, if it has the same shape, apply the plan with --allow-other-model"
        raise InputError(f"{error}, {cure}") from None


def _require_shape(plan: PruningPlan, base: Checkpoint) -> None:
    """Raise InputError unless the plan has the shape of this model."""
    c = base.config
    wanted = (c.moe_layers, c.moe.num_experts, c.moe.d_expert)
    if (plan.layer_indices, *plan.keep.shape[1:]) != wanted:
        raise InputError(
            f"the plan is for layers {plan.layer_indices} of {plan.keep.shape[1]} experts with "
            f"{plan.keep.shape[2]} channels, {base.about.folder} has layers {wanted[0]} of "
            f"{wanted[1]} experts with {wanted[2]}; give the model that the plan was made for"
        )
    if not plan.keep.any():
        raise InputError("the plan keeps no channel at all; make one with a lower prune rate")


def _recipe(
    source: Path, plan: PruningPlan, base: Checkpoint, given: dict[str, Any]
) -> ResolvedRecipe:
    """The recipe beside the plan, with what the plan says of itself and what is given on top."""
    said = plan.provenance
    told = recorded_options(said)
    told |= {"planner": said.get("planner") or "fair"}  # nothing is measured here
    told |= {"skip_layers": (), "prune_rate": said.get("prune_rate", 1.0 - plan.keep.mean().item())}
    # Codes chosen on text do not travel with a plan, and blocks follow the group size given now.
    told |= {"quantizer": "rtn", "block": None, "minimum": None, "repair": "none"}
    if given.get("calibration"):
        told |= {n: v for n, v in (said.get("scoring") or {}).items() if n in READING}
        repairs = said.get("repair") in ("expert", "layer") and not plan.cut_router
        told |= {"repair": said["repair"] if repairs else None}
    elif given.get("repair") in ("expert", "layer"):
        raise InputError(
            f"repair={given['repair']!r} needs text; give that of the plan with --calibration"
        )
    beside = (source if source.is_dir() else source.parent) / output_folder.RECIPE
    fields = {**told, **given}
    asked = load_recipe(beside, **fields) if beside.is_file() else CompressionRecipe(**fields)
    recipe = resolved(asked, base.about)
    assert all(getattr(recipe, name) is None for name in BUDGETS if name != "prune_rate")
    block = said.get("block")
    forms = [form_of(recipe, name) for name in recipe.export]
    if block and not any(form.is_packed and block % form.step for form in forms):
        recipe = dataclasses.replace(recipe, block=block, minimum=said.get("minimum") or block)
    return recipe


def _prepare(
    recipe: ResolvedRecipe, plan: PruningPlan, source: Path, base: Checkpoint, steps: Steps
) -> list[str]:
    """Check all that can be checked, make the output folder; returns the exports to write."""
    output = Path(recipe.output)
    resumed = output_folder.may_resume(
        recipe, (base.about.folder, source), lambda: _is_unfinished(recipe, plan)
    )
    missing = [n for n in recipe.export if not (resumed and (output / "exports" / n).exists())]
    for name in missing:
        export_of(base.about, plan, form_of(recipe, name, plan)).check()
    wanted = dataclasses.replace(recipe, export=missing)
    sizes = export_sizes(base.about, plan, wanted)
    replaced = 0 if resumed else output_folder.replaced_bytes(output)
    parts = {n: size["bytes"] for n, size in sizes.items()}
    windows = math.ceil(recipe.max_tokens / recipe.window)
    if needed := repair_bytes(base.about, recipe, windows):
        parts["repair"] = max(0, needed - output_folder.written_there(output, ("repair",)))
    if needed := between_files(base.about, recipe, windows, int(plan.counts.sum(axis=1).max())):
        parts[preflight.SCRATCH] = needed
    preflight.require_both(recipe, parts, replaced)
    preflight.say_sizes(sizes, steps)
    say_nothing_saved(plan, wanted, steps)
    say_left_out(base.about.folder, steps)
    with steps.bar("check weights") as on_step:
        base.check_finite(on_step, mtp=recipe.mtp != "drop")
    _require_model(plan, base)
    output_folder.make_output(recipe, resumed=resumed)
    remember(base, output)
    return missing


def _is_unfinished(recipe: ResolvedRecipe, plan: PruningPlan) -> bool:
    """Whether the output folder holds no other plan, and lacks an export if it may be replaced."""
    output = Path(recipe.output)
    if recipe.overwrite and all((output / "exports" / name).exists() for name in recipe.export):
        return False
    try:
        return PruningPlan.load(output).is_same(plan)
    except FileNotFoundError:  # killed before the plan was whole
        return True
    except InputError:
        return False
