"""The whole story: score, plan, repair, export, verify, evaluate, report."""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import open_checkpoint
from moe_jax.errors import InputError
from moe_jax.spread import Spread
from moe_jax.stream import LayerSource
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import allowance
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference
from pruning.recipe.options import ExportOptions, PlanOptions, fields_of
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.report import compression_page
from pruning.report.compression import CompressionReport
from pruning.runs.assemble import Outcome, Qualities, assemble
from pruning.runs.auto_bits import recipe_plan, require_auto
from pruning.runs.cap import capped_recipe
from pruning.runs.places import working
from pruning.runs.samples import continued
from pruning.runs.score import open_for, scored
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import choose as choosing
from pruning.stages import folder as output_folder
from pruning.stages import gptq as gptq_stage
from pruning.stages import plan as planning
from pruning.stages import preflight
from pruning.stages import repair as repair_stage
from pruning.stages.card import write_card
from pruning.stages.checks import Check, require_verified
from pruning.stages.export import export, pruned_source
from pruning.stages.job import Job
from pruning.stages.measure import measure
from pruning.stages.probe_windows import text_probe
from pruning.stages.remarks import say_left_out, say_nothing_saved
from pruning.stages.repair import repaired_source
from pruning.stages.sizes import export_sizes, form_of
from pruning.stages.verify import verify_export

RANDOM_SEED = 0  # of the channels that every choice must beat
AGREED = (*fields_of(PlanOptions), *fields_of(ExportOptions))  # options of all processes


def compress(
    recipe: CompressionRecipe, steps: Steps | None = None, where: PlaceOptions | None = None
) -> CompressionReport:
    """Score, plan, repair, export, verify, evaluate and report.

    An interrupted run is repeated with the same recipe and goes on after its last whole stage; of
    a finished one the report is read again.

    Args:
      recipe: what to do.
      steps: where progress goes; default stderr, of process 0.
      where: devices that share the text while it is scored, and processes that share it there, in
        repair and in GPTQ, and the layers of exports and their checks. Process 0 plans and measures
        while the others wait. Default one device, and the processes of `jax.distributed` if that is
        initialized.

    Returns:
      The report, in every process; it is also in the output folder.

    Raises:
      InputError: bad input, before any expensive work, or another process writes there.
      FullDiskError: the disk is full; what is finished stays.
      VerificationError: an export differs from the model in memory.
      LostProcess: another process has ended; what is finished stays.
    """
    with working(recipe.output, where, steps) as (spread, steps):
        return _compress(recipe, steps, spread)


def _compress(recipe: CompressionRecipe, steps: Steps, spread: Spread) -> CompressionReport:
    job = open_for(recipe, steps, spread)
    if spread.led(lambda: output_folder.is_finished(job)):
        return _finished(job, steps)
    if job.recipe.bits == "auto":
        require_auto(job)
    with capped_recipe(job.base, job.recipe, steps):
        return _run(recipe, job, steps)


def _run(recipe: CompressionRecipe, job: Job, steps: Steps) -> CompressionReport:
    """All of `compress` once its job is open."""
    spread = job.spread
    options = repr([(name, getattr(job.recipe, name)) for name in AGREED])
    scores = scored(job, steps, lambda: preflight.prepare(job, steps), {"recipe": options})
    job, plan = _planned(job, *scores, steps)
    sizes = export_sizes(job.base.about, plan, job.recipe)
    preflight.say_sizes(sizes, steps)
    say_nothing_saved(plan, job.recipe, steps)
    say_left_out(job.base.about.folder, steps)
    repair = repair_stage.repair(job, plan, steps)
    codes = gptq_stage.quantize(job, plan, steps, repair)
    checks = []
    for name in job.recipe.export:
        form, target = form_of(job.recipe, name, plan), job.output / "exports" / name
        if not spread.led(target.exists):
            given = {"codes": codes, "repair": repair, "spread": spread}
            export(job.base, plan, form, target, steps, **given)
        with steps.bar(f"verify {name}"):
            probe = text_probe(job.base, job.calibration)
            checks += verify_export(
                job.base, plan, form, target, probe, codes, repair, spread=spread
            )

    found = {"statistics": scores[0], "provenance": scores[1], "plan": plan, "sizes": sizes}
    found |= {"codes": codes, "repair": repair, "checks": checks}
    report = spread.led_and_read(
        lambda: _reported(recipe, job, steps, **found),
        lambda: CompressionReport.load(job.output / "report.json"),
    )
    require_verified(checks)
    return report


def _planned(
    job: Job, statistics: ChannelStatistics, provenance: dict, steps: Steps
) -> tuple[Job, PruningPlan]:
    """The plan, stored, and the job with the rule that it was made by, which process 0 alone knows
    and needs."""

    def make() -> tuple[Job, PruningPlan]:
        planned, plan = choosing.job_plan(job, statistics, provenance, steps)
        if planned.recipe.bits == "auto":
            plan = recipe_plan(planned, plan, statistics, provenance, steps)
        output_folder.drop_stale_exports(job.output, plan)
        plan.save(job.output)
        return planned, plan

    return job.spread.led_and_read(make, lambda: (job, PruningPlan.load(job.output)))


def _reported(asked: CompressionRecipe, job: Job, steps: Steps, **found: Any) -> CompressionReport:
    """Measure what was made, and write the report, its page and the cards."""
    plan, repair = found["plan"], found["repair"]
    references: dict[str, Reference] = {}
    quality = _measure(job, plan, repair, references, steps)
    random, no_random = _measure_random(job, found["statistics"], plan, references, steps)
    samples, no_samples = continued(job, plan, steps)
    reasons = {"random": no_random, "samples": no_samples}
    report = assemble(
        Outcome(
            asked=dataclasses.asdict(asked), job=job, quality=quality, random=random,
            samples=samples, stages=steps.stages,
            not_run={name: why for name, why in reasons.items() if why}, **found,
        )
    )  # fmt: skip
    # Before the report, whose presence says that all else is there.
    _write_cards(job, plan, report)
    compression_page.save(report, job.output)
    report.save(job.output)
    return report


def _finished(job: Job, steps: Steps) -> CompressionReport:
    """The report of a run that is done already."""
    report = CompressionReport.load(job.output / "report.json")
    steps.say(
        f"this run is finished since {report.environment['date']}: {job.output}/report.html; "
        "--overwrite runs it again"
    )
    require_verified([Check(**check) for check in report.verification])
    return report


def _measure(
    job: Job,
    plan: PruningPlan,
    repair: Path | None,
    references: dict[str, Reference],
    steps: Steps,
) -> Qualities:
    """Quality per text and variant: the dense model, the pruned one, and every export on disk."""
    sources: dict[str, Callable[[], LayerSource]] = {"dense": lambda: job.base}
    sources["pruned"] = partial(repaired_source, job.base, plan, repair)
    for name in job.recipe.export:
        sources[name] = partial(_opened, job.output / "exports" / name)
    # Opened one by one: each keeps its embedding and head.
    by_model = {
        name: _qualities(job, opened(), references, steps, name) for name, opened in sources.items()
    }
    return {
        text: {name: found[text] for name, found in by_model.items()} for text in job.evaluation
    }


def _opened(folder: Path) -> LayerSource:
    export = open_checkpoint(folder)
    export.read_ahead, export.experts_at_once = allowance().reading
    return export


def _measure_random(
    job: Job,
    statistics: ChannelStatistics,
    plan: PruningPlan,
    references: dict[str, Reference],
    steps: Steps,
) -> tuple[dict, str]:
    """Random channels at the same size for the report, or {} and the reason why not."""
    if not job.evaluation:
        return {}, "no text was named to measure on"
    try:
        other = random_plan(job, statistics, plan)
    except InputError as error:  # the run's own plan is made, and its exports: they go on
        return {}, str(error)
    source = pruned_source(job.base, other, None)
    found = _qualities(job, source, references, steps, "random channels")
    return {"seed": RANDOM_SEED, "kept": int(other.counts.sum()), "quality": found}, ""


def _qualities(
    job: Job, source: LayerSource, references: dict[str, Reference], steps: Steps, name: str
) -> dict[str, dict]:
    """Quality of one model per text; the first model becomes the reference of the others."""
    how = {"batch": job.recipe.batch, "dtype": job.dtype, "scratch": job.recipe.scratch_folder}
    found = measure(source, job.evaluation, references, steps, name, **how)
    return {text: value.to_dict() for text, value in found.items()}


def random_plan(job: Job, statistics: ChannelStatistics, plan: PruningPlan) -> PruningPlan:
    """Random channels, as many as a plan keeps, under the same width policy.

    Where whole experts go, the plan's widths are dealt to the experts of each layer at random.

    Raises:
      InputError: the plan removes nothing, or no random plan suits the recipe.
    """
    if plan.keep.all():
        raise InputError("nothing was removed, so there is no choice to compare")
    if job.recipe.width in ("experts", "combined"):
        rng = np.random.default_rng(RANDOM_SEED)
        widths = rng.permuted(plan.counts, axis=1)[:, :, None]  # [L, E, 1]
        rank = rng.random(plan.keep.shape).argsort(axis=2).argsort(axis=2)
        return PruningPlan(rank < widths, plan.layer_indices, {"model_hash": job.base.fingerprint})
    recipe = dataclasses.replace(
        job.recipe,
        criterion="random",
        attribution="uniform",
        planner="random",
        weights=None,
        layer_loss="energy",
        align="paper",
        emptied="zero",
        seed=RANDOM_SEED,
        target_bytes=None,
        target_parameters=None,
        prune_rate=1.0 - int(plan.counts.sum()) / plan.keep.size,
    )
    return planning.plan(recipe, statistics, {"model_hash": job.base.fingerprint}, job.base.about)


def _write_cards(job: Job, plan: PruningPlan, report: CompressionReport) -> None:
    """Say on the model card of every export what was measured."""
    for name in job.recipe.export:
        write_card(
            job.output / "exports" / name, job.base, plan,
            form_of(job.recipe, name, plan),
            quantizer=job.recipe.quantizer, repair=report.repair, quality=report.quality,
            evaluation=report.evaluation, verification=report.verification,
        )  # fmt: skip
