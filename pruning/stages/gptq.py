"""The stage that chooses 4-bit codes by GPTQ, between the plan and the exports."""

from pathlib import Path

from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.shrink.gptq_errors import LayerErrors
from pruning.shrink.gptq_model import codes_in, quantize_model
from pruning.stages.export import codes_folder
from pruning.stages.job import Job
from pruning.stages.layers import already_made, provenance
from pruning.stages.made_by import repair_hash
from pruning.stages.repair import repaired_source
from pruning.stages.sizes import form_of


def quantize(job: Job, plan: PruningPlan, steps: Steps, repair: Path | None = None) -> Path | None:
    """Choose the codes of a plan, or find those an earlier run chose for the same one.

    Args:
      job: a resolved recipe with its model and calibration text.
      plan: what is kept.
      steps: where progress goes.
      repair: folder of repaired weights, which are what is rounded.

    Returns:
      The folder that `pruned_source` takes; None if the recipe rounds to nearest or
      exports no 4-bit format.
    """
    recipe, folder = job.recipe, codes_folder(job.recipe)
    packed = any(form_of(recipe, name).is_int4 for name in recipe.export)
    if folder is None or not packed:
        return None
    wanted = provenance(job, plan) | {"group_size": recipe.group_size}
    wanted |= {"repair": None if repair is None else repair_hash(repair)}
    if already_made(codes_in(folder), wanted, steps, job.spread):
        return folder
    with steps.bar("gptq") as on_step:
        errors = quantize_model(
            repaired_source(job.base, plan, repair),
            job.calibration.tokens,
            job.calibration.valid,
            folder,
            group_size=recipe.group_size,
            provenance=wanted,
            batch=recipe.batch,
            dtype=job.dtype,
            on_layer=lambda index: on_step(index + 1, len(job.base)),
            spread=job.spread.hosts,
            scratch=recipe.scratch_folder,
        )
    steps.say(summary_line(errors))
    return folder


def summary_line(errors: list[LayerErrors]) -> str:
    """What a run of GPTQ achieved, for people."""
    ratio = sum(e.gptq for e in errors) / max(sum(e.nearest for e in errors), 1e-30)
    failed, matrices = sum(e.fallbacks for e in errors), sum(e.matrices for e in errors)
    return (
        f"gptq: {ratio:.2f} x the output error of rounding to nearest on held-out text; {failed} "
        f"of {matrices} matrices had too little text and were rounded to nearest"
    )
