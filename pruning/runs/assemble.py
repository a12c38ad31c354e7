"""The report of a compression, assembled from what its stages left."""

import dataclasses
import datetime
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from convert.export_format import ExportFormat
from pruning.budget.importance import LAYER_LOSSES, PlannerOptions, layer_weights
from pruning.budget.plan import PruningPlan
from pruning.measure.concentration import fraction_holding, gini
from pruning.report.command import command_line
from pruning.report.compression import CompressionReport
from pruning.report.figures import concentration
from pruning.scores.criteria import channel_scores
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.gptq_model import layer_errors
from pruning.stages.card import loading, rounded_again
from pruning.stages.checks import Check
from pruning.stages.job import Job
from pruning.stages.repair import repair_facts
from pruning.stages.sizes import (
    active_bytes,
    active_parameters,
    export_of,
    folder_bytes,
    form_of,
    shares_among_kept,
    token_shares,
)
from pruning.text.held_out import seen_shares
from pruning.text.windows import text_hashes

Qualities = dict[str, dict[str, dict[str, Any]]]  # text -> model -> field -> value


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What the stages of a run left behind.

    Attributes:
      asked: the recipe before it was resolved for the model, by name.
      job: the opened recipe.
      statistics, provenance: of scoring.
      plan: what is kept.
      sizes: of the exports, as planned: see `export_sizes`.
      codes: folder of the 4-bit codes of GPTQ, None without.
      repair: folder of the repaired weights, None without.
      checks: of all exports.
      quality: as in the report.
      random: as in the report; {} if it was not measured.
      samples: as in the report.
      stages: as in the report.
      not_run: as in the report.
    """

    asked: dict[str, Any]
    job: Job
    statistics: ChannelStatistics
    provenance: dict[str, Any]
    plan: PruningPlan
    sizes: dict[str, dict]
    codes: Path | None
    repair: Path | None
    checks: list[Check]
    quality: Qualities
    random: dict[str, Any]
    samples: list[dict[str, str]]
    stages: list[dict[str, Any]]
    not_run: dict[str, str]


def assemble(found: Outcome) -> CompressionReport:
    """The report; sizes are read from the exports on disk."""
    job, plan = found.job, found.plan
    recipe = job.recipe
    about, windows = job.base.about, next(iter(job.evaluation.values()), None)
    smallest = min(recipe.export, key=lambda name: folder_bytes(job.output / "exports" / name))
    sample = found.samples[0] if found.samples else {"export": smallest}
    return CompressionReport(
        model={
            "path": recipe.model,
            "family": about.family.model_type,
            "fingerprint": job.base.fingerprint,
            "parameters": about.weights() + about.mtp_weights,
            "bytes": folder_bytes(about.folder),
        },
        recipe=_plain(dataclasses.asdict(recipe)),
        environment=_environment(),
        calibration=_calibration(found),
        plan={
            **plan.provenance,
            "content_hash": plan.content_hash,
            **({"layer_bits": list(plan.layer_bits)} if plan.layer_bits else {}),
        },
        layer_indices=list(plan.layer_indices),
        d_expert=int(plan.keep.shape[2]),
        counts=plan.counts.tolist(),
        **_scores(found),
        quantization=list(layer_errors(found.codes)),
        sizes=_sizes(found),
        quality=found.quality,
        evaluation={
            "window": recipe.window,
            "stride": windows.stride if windows else None,
            "seen": seen_shares(job.calibration, job.evaluation),
            "texts": text_hashes(job.evaluation),
            "sources": list(job.evaluation_sources),
        },
        stages=found.stages,
        sample={key: sample.get(key, "") for key in ("prompt", "dense", "compressed", "export")},
        verification=[dataclasses.asdict(check) for check in found.checks],
        samples=found.samples,
        random=found.random,
        alone=_alone(job, plan),
        loading={
            name: _plain(dataclasses.asdict(loading(job.base, plan, form_of(recipe, name, plan))))
            for name in recipe.export
        },
        command=command_line(found.asked),
        not_run=found.not_run,
        repair=repair_facts(found.repair),
    )


def _plain(values: Any) -> Any:
    """Tuples as the lists that JSON has."""
    if isinstance(values, dict):
        return {key: _plain(value) for key, value in values.items()}
    return list(values) if isinstance(values, tuple) else values


def _environment() -> dict:
    """Where and when a run happened."""
    installed = importlib.metadata.distributions(name="moe-jax")
    return {
        "moe-jax": next((package.version for package in installed), "source tree"),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def _calibration(found: Outcome) -> dict[str, Any]:
    """The text that was scored, and what it showed of the routers and of the choice."""
    statistics = found.statistics
    values: dict[str, Any] = {
        "tokens": int(statistics.total_tokens),
        "sources": list(found.job.calibration.sources),
    }
    routed = statistics.tokens.sum(axis=1, keepdims=True)
    if routed.all():
        entropy = statistics.router_entropy / statistics.total_tokens
        values |= {"router_entropy": entropy.tolist()}
        values |= {"usage": (statistics.tokens / routed).tolist()}
    return values | {"stability": found.provenance.get("stability")}


def _scores(found: Outcome) -> dict[str, Any]:
    """Attribution, coverage, layer losses and concentration under the recipe's scores."""
    recipe, plan = found.job.recipe, found.plan
    scores = channel_scores(
        found.statistics, criterion=recipe.used_criterion,
        attribution=recipe.used_attribution,
        seed=recipe.seed,
    )  # fmt: skip
    fractions, curves = concentration(scores.channel)
    layers = scores.channel.reshape(len(scores.channel), -1)  # [L, E F]
    options = PlannerOptions.of(recipe)
    return {
        "attribution": scores.expert.tolist(),
        "expert_coverage": plan.expert_coverage(scores.channel).tolist(),
        "layer_coverage": plan.layer_coverage(scores.channel).tolist(),
        "layer_loss": {
            "raw": LAYER_LOSSES[recipe.layer_loss](scores).tolist(),
            "smoothed": layer_weights(scores, options).tolist(),
        },
        "concentration": {
            "fractions": fractions.tolist(),
            "curves": curves.tolist(),
            "gini": gini(layers).tolist(),
            "fraction_holding": fraction_holding(layers).tolist(),
            "model": {
                "gini": float(gini(layers.reshape(-1))),
                "fraction_holding": float(fraction_holding(layers.reshape(-1))),
            },
        },
    }


def _sizes(found: Outcome) -> dict[str, Any]:
    """What was written and what is left."""
    job, statistics, plan, exports = found.job, found.statistics, found.plan, {}
    shares = token_shares(job.base.about, statistics)
    if plan.cut_router:
        shares = shares_among_kept(plan, plan.top_k or job.base.config.moe.experts_per_token)
    for name, size in found.sizes.items():
        written = folder_bytes(job.output / "exports" / name)
        bits = written * 8 / size["parameters"]
        exports[name] = {**size, "bytes": written, "bits_per_parameter": round(bits, 3)}
        if ExportFormat(name).is_padded:
            exports[name]["padded_bytes"] = None
        export = export_of(job.base.about, plan, form_of(job.recipe, name, plan))
        exports[name]["active_bytes"] = active_bytes(export, shares)
        if (again := rounded_again(job.output / "exports" / name)) is not None:
            exports[name]["rounded_again"] = again
    whole = np.full_like(plan.counts, plan.keep.shape[2])
    return {
        "source_bytes": folder_bytes(job.base.about.folder),
        "channels": int(plan.keep.size),
        "channels_kept": int(plan.counts.sum()),
        "active_parameters": {
            "source": active_parameters(job.base.about, whole, shares),
            "exports": active_parameters(job.base.about, plan.counts, shares),
        },
        "exports": exports,
    }


def _alone(job: Job, plan: PruningPlan) -> dict[str, dict[str, int | None]]:
    """Bytes of each export if only channels were removed, or only weights rounded."""
    about, found = job.base.about, {}
    for name in job.recipe.export:
        both = export_of(about, plan, form_of(job.recipe, name, plan))
        pruned = dataclasses.replace(both, form=both.form.like(storage="bf16"))
        rounded = dataclasses.replace(both, widths=about.widths)
        found[name] = {
            "pruned_bytes": pruned.nbytes,
            "rounded_bytes": rounded.nbytes if both.form.is_packed else None,
        }
    return found
