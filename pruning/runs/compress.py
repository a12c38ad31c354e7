"""The whole story: score, plan, export, verify, evaluate, report."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform

import jax
import numpy as np

from convert.checkpoint import load_model, open_checkpoint
from convert.export_format import ExportFormat
from moe_jax.generate import generate
from pruning.budget.decide import PruningPlan
from pruning.budget.importance import LAYER_LOSSES, layer_weights
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.report.compression import CompressionReport
from pruning.report.figures import concentration
from pruning.scores.criteria import channel_scores
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.gptq_model import layer_errors
from pruning.stages import folder as output_folder
from pruning.stages import gptq as gptq_stage
from pruning.stages import job as stages
from pruning.stages import plan as planning
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.card import write_card
from pruning.stages.job import Job
from pruning.stages.sizes import (
    active_parameters,
    export_sizes,
    folder_bytes,
    form_of,
)
from pruning.stages.verify import PROBE_TOKENS, PROBE_WINDOWS, random_probe, require_verified
from pruning.text.held_out import seen_shares

SAMPLE_PROMPT_TOKENS, SAMPLE_NEW_TOKENS = 24, 40
SAMPLE_BYTES = 4 << 30  # larger models are not read once per generated token


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
        plan = planning.plan(job.recipe, statistics, provenance, job.base.about)
        output_folder.drop_stale_exports(job.output, plan)
        plan.save(job.output)
    sizes = export_sizes(job.base.about, plan, job.recipe)
    preflight.say_sizes(sizes, steps)
    codes = gptq_stage.quantize(job, plan, steps)
    checks = []
    for name in job.recipe.export:
        form, target = form_of(job.recipe, name, plan), job.output / "exports" / name
        if not target.exists():
            stages.export(job.base, plan, form, target, steps, codes=codes)
        with steps.bar(f"verify {name}"):
            checks += stages.verify(job.base, plan, form, target, probe_tokens(job), codes)
    quality = _measure(job, plan, steps)
    sample = _sample(job, steps)
    report = _report(job, statistics, plan, sizes, quality, sample, checks, steps)
    report.calibration["stability"] = provenance.get("stability")
    report.quantization.extend(layer_errors(codes))
    # Before the report, whose presence says that all else is there.
    _write_cards(job, plan, report)
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


def _measure(job: Job, plan: PruningPlan, steps: Steps) -> dict[str, dict[str, dict]]:
    """Quality per text and variant: the dense model, the pruned one, and every export on disk."""
    references: dict = {}
    variants = {"dense": job.base, "pruned": stages.pruned_source(job.base, plan, None)}
    for name in job.recipe.export:
        variants[name] = open_checkpoint(job.output / "exports" / name, dtype=None)
    quality: dict[str, dict[str, dict]] = {text: {} for text in job.evaluation}
    for name, source in variants.items():
        found = stages.measure(
            source, job.evaluation, references, steps, name, batch=job.recipe.batch, dtype=job.dtype
        )
        for text, value in found.items():
            quality[text][name] = value.to_dict()
    return quality


def _write_cards(job: Job, plan: PruningPlan, report: CompressionReport) -> None:
    """Say on the model card of every export what was measured."""
    for name in job.recipe.export:
        write_card(
            job.output / "exports" / name, job.base, plan,
            form_of(job.recipe, name, plan),
            quantizer=job.recipe.quantizer, quality=report.quality, evaluation=report.evaluation,
        )  # fmt: skip


def _sample(job: Job, steps: Steps) -> dict:
    """The same prompt continued by the dense model and by the smallest export."""
    folders = [job.output / "exports" / name for name in job.recipe.export]
    folder = min(folders, key=folder_bytes)
    windows = next(iter(job.evaluation.values()), None)
    shown = job.calibration if windows is None else windows
    if folder_bytes(job.base.about.folder) > SAMPLE_BYTES or not len(shown.tokens):
        return {"prompt": "", "dense": "", "compressed": "", "export": folder.name}
    prompt = shown.tokens[0, shown.valid[0]][:SAMPLE_PROMPT_TOKENS].tolist()
    room = job.base.config.max_position - len(prompt)
    stop = () if job.codec.end is None else (job.codec.end,)
    texts = {}
    with steps.bar("sample"):
        for name, path in (("dense", job.base.about.folder), ("compressed", folder)):
            model = load_model(path)
            new = generate(model, [prompt], max_new_tokens=min(SAMPLE_NEW_TOKENS, room), stop=stop)[
                0
            ]
            texts[name] = job.codec.decode(new)
    return {"prompt": job.codec.decode(prompt), **texts, "export": folder.name}


def _environment() -> dict:
    """Where and when a run happened, for the report."""
    installed = importlib.metadata.distributions(name="moe-jax")
    return {
        "moe-jax": next((package.version for package in installed), "source tree"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _routers(statistics: ChannelStatistics) -> dict[str, list]:
    """Mean entropy and usage of the routers, nothing where no token was seen."""
    routed = statistics.tokens.sum(axis=1, keepdims=True)
    if not routed.all():
        return {}
    return {
        "router_entropy": (statistics.router_entropy / statistics.total_tokens).tolist(),
        "usage": (statistics.tokens / routed).tolist(),
    }


def _sizes(job: Job, statistics: ChannelStatistics, plan: PruningPlan, planned) -> dict:
    """What was written and what is left, for the report."""
    exports = {}
    for name, size in planned.items():
        written = folder_bytes(job.output / "exports" / name)
        bits = written * 8 / size["parameters"]
        exports[name] = {**size, "bytes": written, "bits_per_parameter": round(bits, 3)}
        if ExportFormat(name).is_padded:
            exports[name]["padded_bytes"] = None
    whole = np.full_like(plan.counts, plan.keep.shape[2])
    return {
        "source_bytes": folder_bytes(job.base.about.folder),
        "channels": int(plan.keep.size),
        "channels_kept": int(plan.counts.sum()),
        "active_parameters": {
            "source": active_parameters(job.base.about, whole, statistics),
            "exports": active_parameters(job.base.about, plan.counts, statistics),
        },
        "exports": exports,
    }


def _report(
    job: Job,
    statistics: ChannelStatistics,
    plan: PruningPlan,
    sizes,
    quality,
    sample,
    checks,
    steps,
) -> CompressionReport:
    recipe = job.recipe
    scores = channel_scores(
        statistics, criterion=recipe.criterion, attribution=recipe.attribution, seed=recipe.seed
    )
    fractions, curves = concentration(scores.channel)
    windows = next(iter(job.evaluation.values()), None)
    options = planning.planner_arguments(recipe, job.base.about)["options"]
    return CompressionReport(
        model={
            "path": recipe.model,
            "family": job.base.about.family.model_type,
            "fingerprint": job.base.fingerprint,
            "parameters": job.base.about.weights() + job.base.about.mtp_weights,
            "bytes": folder_bytes(job.base.about.folder),
        },
        recipe={k: list(v) if isinstance(v, tuple) else v
                for k, v in dataclasses.asdict(recipe).items()},
        environment=_environment(),
        calibration={
            "tokens": int(statistics.total_tokens),
            "sources": list(job.calibration.sources),
            **_routers(statistics),
        },
        plan=dict(plan.provenance),
        layer_indices=list(plan.layer_indices),
        d_expert=int(plan.keep.shape[2]),
        counts=plan.counts.tolist(),
        attribution=scores.expert.tolist(),
        expert_coverage=plan.expert_coverage(scores.channel).tolist(),
        layer_coverage=plan.layer_coverage(scores.channel).tolist(),
        layer_loss={"raw": LAYER_LOSSES[recipe.layer_loss](scores).tolist(),
                    "smoothed": layer_weights(scores, options).tolist()},
        concentration={"fractions": fractions.tolist(), "curves": curves.tolist()},
        quantization=[],
        sizes=_sizes(job, statistics, plan, sizes),
        quality=quality,
        evaluation={
            "window": recipe.window,
            "stride": windows.stride if windows else None,
            "seen": seen_shares(job.calibration, job.evaluation),
        },
        stages=steps.stages,
        sample=sample,
        verification=[dataclasses.asdict(check) for check in checks],
    )  # fmt: skip
