"""What is said about texts and plans that are allowed and yet of little use."""

from convert.export_format import ExportFormat
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.stages.job import Job
from pruning.text.documents import WHOLE

PARTS = {
    "beginning": f"its first {WHOLE >> 20} MiB are read, because it is packed; unpacked, documents "
    "from all of it would be taken",
    "spread": "documents spread over all of it are taken",
}


def say_texts(job: Job, steps: Steps, *, evaluates: bool) -> None:
    """Say which calibration files are too large to be read whole, whether the calibration text is
    short for so many experts, and, if the run evaluates, whether it has nothing to evaluate on."""
    moe, text = job.base.config.moe, job.calibration
    for source in text.sources:
        if part := source.get("part"):
            steps.say(f"{source['path']}: more than {WHOLE >> 20} MiB; {PARTS[part]}")
    rows = text.total * moe.experts_per_token // moe.num_experts
    if text.total and rows < moe.d_expert:
        enough = -(-moe.d_expert * moe.num_experts // moe.experts_per_token)
        steps.say(
            f"{text.total:,} calibration tokens are little: an expert sees about {rows:,} of them "
            f"and has {moe.d_expert:,} channels, so scores are noisy; give {enough:,} or more "
            "(--calibration, --max-tokens)"
        )
    if evaluates and not job.evaluation:
        steps.say(
            "nothing is evaluated: there is no --evaluation text, and the calibration text has too "
            "few windows to set some aside; the report will not say what was lost"
        )


def say_nothing_saved(plan: PruningPlan, recipe: CompressionRecipe, steps: Steps) -> None:
    """Say which exports of a plan are as large as without pruning, and what makes them smaller."""
    widest = plan.counts.max(axis=1)  # [L]
    for form in map(ExportFormat, recipe.export):
        stored = widest.min() if form.is_layered else widest.max()
        if form.is_ragged or plan.keep.all() or stored < plan.keep.shape[2]:
            continue
        of, cure = ("every layer", "layer") if form.is_layered else ("the model", "uniform")
        steps.say(
            f"{form.name} is as large as without pruning: an expert of {of} keeps all "
            f"{plan.keep.shape[2]} channels, and padding makes the others as wide; export a ragged "
            f"format, or plan with --width {cure}"
        )
