"""The whole story: score, plan, export, verify, evaluate, report."""

import dataclasses

import numpy as np

from convert.checkpoint import load_model, open_checkpoint
from moe_jax.errors import InputError
from moe_jax.generate import generate
from moe_jax.stream import LayerSource
from pruning.budget.decide import PruningPlan
from pruning.kit.progress import Steps
from pruning.kit.words import amount
from pruning.recipe.recipe import CompressionRecipe
from pruning.report import compression_page
from pruning.report.compression import CompressionReport
from pruning.runs.assemble import Outcome, Qualities, assemble
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import folder as output_folder
from pruning.stages import gptq as gptq_stage
from pruning.stages import job as stages
from pruning.stages import plan as planning
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.card import write_card
from pruning.stages.job import Job
from pruning.stages.sizes import export_sizes, folder_bytes, form_of
from pruning.stages.verify import PROBE_TOKENS, PROBE_WINDOWS, random_probe, require_verified

SAMPLE_PROMPT_TOKENS, SAMPLE_NEW_TOKENS = 24, 40
SAMPLE_BYTES = 4 << 30  # larger models are not read once per generated token
SAMPLES = 8  # texts that are continued, at most
RANDOM_SEED = 0  # of the channels that every choice must beat


def compress(recipe: CompressionRecipe, steps: Steps | None = None) -> CompressionReport:
    """Score, plan, export, verify, evaluate and report.

    An interrupted run is repeated with the same recipe and goes on after its last whole stage.

    Args:
      recipe: what to do.
      steps: where progress goes; default stderr.

    Returns:
      The report, which is also in the output folder.

    Raises:
      InputError: bad input, before any expensive work.
      VerificationError: an export differs from the model in memory.
    """
    steps = steps or Steps()
    with steps.bar("open"):
        job = stages.open_job(recipe)
    preflight.prepare(job, steps)
    statistics, provenance = scoring.score(job, steps)
    with steps.bar("plan"):
        plan = planning.plan(job.recipe, statistics, provenance, job.base)
        output_folder.drop_stale_exports(job.output, plan)
        plan.save(job.output)
    sizes = export_sizes(job.base, plan, job.recipe)
    preflight.say_sizes(sizes, steps)
    codes = gptq_stage.quantize(job, plan, steps)
    checks = []
    for name in job.recipe.export:
        form, target = form_of(job.recipe, name, plan), job.output / "exports" / name
        if not target.exists():
            stages.export(job.base, plan, form, target, steps, codes=codes)
        with steps.bar(f"verify {name}"):
            checks += stages.verify(job.base, plan, form, target, probe_tokens(job), codes)
    not_run: dict[str, str] = {}
    quality, random = _measure(job, statistics, plan, not_run, steps)
    samples = _samples(job, not_run, steps)
    report = assemble(
        Outcome(
            asked=dataclasses.asdict(recipe), job=job, statistics=statistics,
            provenance=provenance, plan=plan, sizes=sizes, codes=codes, checks=checks,
            quality=quality, random=random, samples=samples, stages=steps.stages, not_run=not_run,
        )
    )  # fmt: skip
    # Before the report, whose presence says that all else is there.
    _write_cards(job, plan, report)
    compression_page.save(report, job.output)
    report.save(job.output)
    require_verified(checks)
    return report


def probe_tokens(job: Job) -> np.ndarray:
    """Short windows of calibration text, int32 [B, T], on which logits are compared; random
    tokens where there is no text."""
    if not job.calibration.total:
        return random_probe(job.base)
    length = min(PROBE_TOKENS, int(job.calibration.valid.sum(axis=1).max()))
    whole = np.flatnonzero(job.calibration.valid[:, :length].all(axis=1))
    rows = np.unique(whole[np.linspace(0, len(whole) - 1, PROBE_WINDOWS).astype(int)])
    return job.calibration.tokens[rows, :length]


def _measure(
    job: Job,
    statistics: ChannelStatistics,
    plan: PruningPlan,
    not_run: dict[str, str],
    steps: Steps,
) -> tuple[Qualities, dict]:
    """Quality per text of the dense model, the pruned one and every export on disk; and of random
    channels at the same size, {} with a reason in `not_run` if that is not to be had."""
    references: dict = {}

    def measured(name: str, source: LayerSource) -> dict[str, dict]:
        how = {"batch": job.recipe.batch, "dtype": job.dtype}
        found = stages.measure(source, job.evaluation, references, steps, name, **how)
        return {text: value.to_dict() for text, value in found.items()}

    variants: dict[str, LayerSource] = {"dense": job.base}
    variants["pruned"] = stages.pruned_source(job.base, plan, None)
    for name in job.recipe.export:
        variants[name] = open_checkpoint(job.output / "exports" / name, dtype=None)
    by_model = {name: measured(name, source) for name, source in variants.items()}
    quality = {
        text: {name: found[text] for name, found in by_model.items()} for text in job.evaluation
    }
    if not job.evaluation:
        not_run["random"] = "no text was named to measure on"
        return quality, {}
    try:
        other = random_plan(job, statistics, plan)
    except InputError as error:
        not_run["random"] = str(error)
        return quality, {}
    found = measured("random channels", stages.pruned_source(job.base, other, None))
    return quality, {"seed": RANDOM_SEED, "kept": int(other.counts.sum()), "quality": found}


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
    return planning.plan(recipe, statistics, {"model_hash": job.base.fingerprint}, job.base)


def _write_cards(job: Job, plan: PruningPlan, report: CompressionReport) -> None:
    """Say on the model card of every export what was measured."""
    for name in job.recipe.export:
        write_card(
            job.output / "exports" / name, job.base, plan,
            form_of(job.recipe, name, plan),
            quantizer=job.recipe.quantizer, quality=report.quality, evaluation=report.evaluation,
        )  # fmt: skip


def _samples(job: Job, not_run: dict[str, str], steps: Steps) -> list[dict[str, str]]:
    """The start of every text continued by the dense model and by the smallest export; [] with a
    reason in `not_run` for a large model or without a text."""
    folders = [job.output / "exports" / name for name in job.recipe.export]
    folder = min(folders, key=folder_bytes)
    shown = dict(list(job.evaluation.items())[:SAMPLES]) or {"calibration": job.calibration}
    starts = {
        text: windows.tokens[0, windows.valid[0]][:SAMPLE_PROMPT_TOKENS].tolist()
        for text, windows in shown.items()
        if len(windows.tokens)
    }
    size = folder_bytes(job.base.folder)
    if size > SAMPLE_BYTES or not starts:
        large = f"the model has {amount(size)}, and those above {amount(SAMPLE_BYTES)} write slowly"
        not_run["samples"] = large if size > SAMPLE_BYTES else "there was no text to continue"
        return []
    stop = () if job.codec.end is None else (job.codec.end,)
    written: dict[str, dict[str, str]] = {}
    with steps.bar("sample"):
        for name, path in (("dense", job.base.folder), ("compressed", folder)):
            model = load_model(path)
            for text, prompt in starts.items():
                room = min(SAMPLE_NEW_TOKENS, job.base.config.max_position - len(prompt))
                # One by one: in a batch the last bits of a sum, and so a token, may differ.
                (new,) = generate(model, [prompt], max_new_tokens=room, stop=stop)
                written.setdefault(text, {})[name] = job.codec.decode(new)
    return [
        {"text": text, "prompt": job.codec.decode(prompt), **written[text], "export": folder.name}
        for text, prompt in starts.items()
    ]
