"""What the stages that go through a pruned model layer by layer, into a folder, have in common."""

from typing import Any

from moe_jax.spread import ALONE, Spread
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.shrink.progress import LayerFolder
from pruning.stages.job import Job
from pruning.stages.score import without_paths


def provenance(job: Job, plan: PruningPlan) -> dict[str, Any]:
    """All that layers made of a plan on a job's calibration text depend on, but the stage's own.

    Raises:
      InputError: the plan is another model's.
    """
    plan.require_model(job.base.fingerprint)
    return {
        "model_hash": job.base.fingerprint,
        "plan": plan.content_hash,
        "window": job.recipe.window,
        "batch": job.recipe.batch,  # of another the sums differ in their last bits
        "tokens": job.calibration.total,
        "dtype": job.recipe.dtype,
        "sources": without_paths(job.calibration.sources),
    }


def already_made(
    files: LayerFolder, wanted: dict[str, Any], steps: Steps, spread: Spread = ALONE
) -> bool:
    """Whether an earlier run made all layers of this provenance; says so if it made others.

    Raises:
      InputError: not all processes were given the same plan and text.
    """
    spread.require_same({"plan or text": wanted})
    return spread.led(lambda: _already_made(files, wanted, steps))


def _already_made(files: LayerFolder, wanted: dict[str, Any], steps: Steps) -> bool:
    if fault := files.fault(**wanted):
        if files.is_closed:
            steps.say(f"{fault}; they are made again")
        return False
    files.drop_states()
    return True
