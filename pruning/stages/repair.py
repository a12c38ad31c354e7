"""The stage that repairs without training, between the plan and whatever rounds and writes it."""

from pathlib import Path
from typing import Any, TypedDict

from convert.description import Description
from moe_jax.errors import InputError
from moe_jax.stream import LayerSource
from pruning.budget.plan import PruningPlan
from pruning.kit.fitting import misfits
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.report.phrases import repair_words
from pruning.shrink.gptq_model import progress_bytes
from pruning.shrink.merge import MergedSource, Merging
from pruning.shrink.prune import PrunedSource
from pruning.shrink.repair_choice import RepairedLayer
from pruning.shrink.repair_model import LEAST_WINDOWS, repair_model, repaired_in, with_repair
from pruning.stages.job import Job
from pruning.stages.layers import already_made, provenance
from pruning.stages.size_bounds import mean_width

FOLDER = "repair"


class Said(TypedDict):
    """What a repair says of itself, as far as reports and cards rely on it."""

    mode: str
    tokens: int


def repair(job: Job, plan: PruningPlan, steps: Steps) -> Path | None:
    """Repair a plan as the recipe says, or find what an earlier run made of the same one.

    Args:
      job: a resolved recipe with its model and calibration text.
      plan: what is kept.
      steps: where progress goes.

    Returns:
      The folder that `repaired_source` takes; None if the recipe asks for no repair, nothing was
      removed, or there are too few windows to tell whether it helps.
    """
    recipe, folder = job.recipe, repair_folder(job.recipe)
    if recipe.repair == "none" and job.base.about.native is not None and not recipe.requantize:
        steps.say(
            "not repaired: the model's 4-bit codes are taken over as they are; --requantize "
            "--repair layer changes weights and rounds them a second time"
        )
    if folder is None or plan.keep.all():
        return None
    if plan.cut_router:
        raise InputError(
            f"repair={recipe.repair!r} reckons with each token's experts as they were, and the "
            "plan has another router; leave --repair away"
        )
    if (windows := len(job.calibration.tokens)) < LEAST_WINDOWS:
        steps.say(
            f"not repaired: that takes {LEAST_WINDOWS} windows of calibration text, there are "
            f"{windows}; give more text or a shorter --window"
        )
        return None
    mode = recipe.repair
    assert mode == "expert" or mode == "layer"
    wanted = provenance(job, plan) | {"mode": mode}
    if already_made(repaired_in(folder), wanted, steps, job.spread):
        return folder
    with steps.bar("repair") as on_step:
        repair_model(
            job.base,
            plan,
            job.calibration.tokens,
            job.calibration.valid,
            folder,
            mode=mode,
            provenance=wanted,
            batch=recipe.batch,
            dtype=job.dtype,
            on_layer=lambda index: on_step(index + 1, len(job.base)),
            spread=job.spread.hosts,
            scratch=recipe.scratch_folder,
        )
    steps.say(repair_words(repair_facts(folder)))
    return folder


def repair_folder(recipe: CompressionRecipe) -> Path | None:
    """Where a recipe's repaired weights lie; None if it asks for none."""
    return Path(recipe.output) / FOLDER if recipe.repair in ("expert", "layer") else None


def stored_repair(recipe: CompressionRecipe, plan: PruningPlan) -> Path | None:
    """The folder of repaired weights in an output folder, if there are some of this plan.

    Raises:
      InputError: they are damaged.
    """
    files = repaired_in(Path(recipe.output) / FOLDER)
    found = files.read_summary()
    if found is None or found["provenance"].get("plan") != plan.content_hash:
        return None
    fault = files.fault()
    if wrong := misfits(Said, found["provenance"]):
        fault = f"{', '.join(wrong)} in {files.path / files.summary} hold something else"
    if fault:
        raise InputError(
            f"{fault}; `moe-compress export --overwrite --repair layer` repairs again, --repair "
            "none leaves it out"
        )
    return files.path


def repaired_source(base: LayerSource, plan: PruningPlan, repair: Path | None) -> LayerSource:
    """The pruned model, its experts merged before if the plan says so, and repaired if there is a
    folder of `repair`, before any rounding."""
    merging = Merging(dict(zip(plan.layer_indices, plan.merged, strict=bool(plan.merged))))
    pruned = PrunedSource(MergedSource(base, merging) if plan.merged else base, plan)
    return pruned if repair is None else with_repair(pruned, plan, repair)


def repair_bytes(base: Description, recipe: ResolvedRecipe, windows: int) -> int:
    """Most bytes of the folder of a repair, while at work; 0 if there is none.

    Args:
      base: the dense model.
      recipe: a resolved one.
      windows: of calibration text.
    """
    if recipe.repair == "none" or windows < LEAST_WINDOWS:
        return 0
    c = base.config
    experts = len(c.moe_layers) * c.moe.num_experts
    weights = 2 * experts * (mean_width(base, recipe) + c.moe.expert_bias) * c.d_model
    text = windows, recipe.window
    # The states of the dense and of the pruned model.
    return weights + 2 * progress_bytes(c, text, recipe.batch, recipe.dtype)


def repair_facts(repair: Path | None) -> dict[str, Any]:
    """What a repair did, as report and card have it; {} without one.

    mode and tokens; experts that keep something, how many of them changed and starved; layers, and
    of how many the experts' repair (`expert`) or that of the whole layer (`layer`) was taken.
    """
    summary = None if repair is None else repaired_in(repair).read_summary()
    if summary is None:
        return {}
    layers = [one for each in summary["layers"] if (one := RepairedLayer(**each)).errors]
    taken = {name: sum(one.choice == name for one in layers) for name in ("expert", "layer")}
    said = summary["provenance"]
    return {
        "mode": said["mode"],
        "tokens": said["tokens"],
        "experts": sum(one.experts for one in layers),
        "changed": sum(one.changed for one in layers),
        "starved": sum(one.starved for one in layers),
        "layers": len(layers),
        **taken,
    }
