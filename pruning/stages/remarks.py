"""What is said about texts and plans that are allowed and yet of little use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.export_format import ExportFormat
from convert.side_files import left_out
from moe_jax.config import ModelConfig
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.stages.job import Job
from pruning.text.documents import WHOLE

PARTS = {
    "beginning": f"its first {WHOLE >> 20} MiB are read; of JSON lines that are not packed, "
    "documents from all of it would be taken",
    "spread": "documents spread over all of it are taken",
}


def say_texts(job: Job, steps: Steps, *, evaluates: bool) -> None:
    """Say what the given text files are, whether the calibration text is short for so many experts,
    and, if the run evaluates, whether it has nothing to evaluate on."""
    moe, text = job.base.config.moe, job.calibration
    if not job.recipe.weights_only:
        say_context(job.base.config, job.recipe.window, steps)
    for files, sources in ((job.recipe.calibration, text.sources),
                           (job.recipe.evaluation, job.evaluation_sources)):  # fmt: skip
        for source in sources if files else ():  # the texts of the demo are our own
            say_source(source, steps)
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


def say_context(config: ModelConfig, window: int, steps: Steps) -> None:
    """Say that windows are longer than what the model learned before its context was stretched."""
    rope = config.attention.rope
    if rope.original_max_position and window > rope.original_max_position:
        steps.say(
            f"windows of {window:,} tokens are longer than the {rope.original_max_position:,} that "
            f"the model was trained on before its context was stretched ({rope.kind}); --window "
            f"{rope.original_max_position} stays within them"
        )


def say_source(source: Mapping[str, Any], steps: Steps) -> None:
    """Say how a file was read (a `source_note`), what it lacks, and whether that is all of it."""
    what = "template" if source.get("options", "").startswith(":template") else "field"
    field = f", {what} {source['field']!r}" if "field" in source else ""
    documents = "1 document" if source["documents"] == 1 else f"{source['documents']:,} documents"
    lacking = f" ({source['lacking']})" if "lacking" in source else ""
    steps.say(
        f"{source['path']}: {source['format']}{field}, {documents} read{lacking}: "
        f"{source['begins']!r}"
    )
    if part := source.get("part"):
        steps.say(f"{source['path']}: more than {WHOLE >> 20} MiB; {PARTS[part]}")


def say_nothing_saved(plan: PruningPlan, recipe: CompressionRecipe, steps: Steps) -> None:
    """Say which exports of a plan are as large as without pruning, and what makes them smaller."""
    if plan.merged and plan.keep.all():
        steps.say(
            "the router stays, so every expert of a group is written with the merged weights: no "
            "export is smaller than without merging, but all programs load it"
        )
    widest = plan.counts.max(axis=1)  # [L]
    for form in map(ExportFormat, recipe.export):
        stored = widest.min() if form.is_layered else widest.max()
        if form.is_ragged or plan.keep.all() or plan.cut_router or stored < plan.keep.shape[2]:
            continue
        of, cure = ("every layer", "layer") if form.is_layered else ("the model", "uniform")
        steps.say(
            f"{form.name} is as large as without pruning: an expert of {of} keeps all "
            f"{plan.keep.shape[2]} channels, and padding makes the others as wide; export a ragged "
            f"format, or plan with --width {cure}"
        )


def say_left_out(base: Path, steps: Steps) -> None:
    """Name the files of a checkpoint that its exports will not have."""
    if names := left_out(base):
        steps.say(f"left in {base}, because no program needs it of an export: {', '.join(names)}")
