"""The scoring stage: statistics of a model on calibration text, collected or found again."""

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from convert.checkpoint import Checkpoint, load_model
from pruning import extra_scores
from pruning.collect import collect_statistics
from pruning.progress import Steps
from pruning.stages import Job
from pruning.statistics import ChannelStatistics, load_statistics, save_statistics
from pruning.weight_gradient import weight_gradient_scores

STATISTICS = "statistics.safetensors"


def score(job: Job, steps: Steps) -> tuple[ChannelStatistics, dict]:
    """Collect statistics, or read those an earlier run of the same recipe wrote."""
    found = find_statistics(job)
    if found is not None:
        return found
    extra_scores.announce(job.base, job.recipe, steps)
    texts = job.calibration.tokens, job.calibration.valid
    how: dict[str, Any] = {"batch": job.recipe.batch, "dtype": job.dtype}
    with steps.bar("score") as on_step:
        statistics = collect_statistics(
            job.base,
            *texts,
            gradients=job.recipe.gradients,
            expert_details=job.recipe.expert_details,
            on_step=on_step,
            **how,
        )
    if job.recipe.weight_gradients:
        with steps.bar("weight gradients") as on_step:
            found = weight_gradient_scores(job.base, *texts, on_step=on_step, **how)
        statistics = dataclasses.replace(statistics, weight_gradient=found)
    load = lambda: load_model(job.base.folder, jnp.bfloat16)  # noqa: E731
    statistics = extra_scores.add(statistics, job.base, texts, job.recipe, steps, load, **how)
    job.output.mkdir(parents=True, exist_ok=True)
    save_statistics(job.output / STATISTICS, statistics, _provenance(job))
    return statistics, _provenance(job)


def find_statistics(job: Job) -> tuple[ChannelStatistics, dict] | None:
    """What an earlier run of the same recipe measured on the same model and texts, if it did."""
    path = job.output / STATISTICS
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    statistics, found = load_statistics(path)
    same = all(found.get(key) == value for key, value in _provenance(job).items())
    return (statistics, found) if same and statistics.groups >= job.recipe.groups else None


def _provenance(job: Job) -> dict:
    return {
        "model_hash": job.base.fingerprint,
        "model": str(job.base.folder),
        "window": job.recipe.window,
        "dtype": job.recipe.dtype,
        "tokens": job.calibration.total,
        "sources": list(job.calibration.sources),
        **({"nll_ig_steps": job.recipe.nll_ig} if job.recipe.nll_ig else {}),
    }


def stored_statistics(folder: Path, base: Checkpoint) -> tuple[ChannelStatistics, dict]:
    """Statistics in an output folder, which must be of this very model.

    Raises:
      ValueError: they are missing, damaged, or of another model.
    """
    statistics, provenance = load_statistics(folder / STATISTICS)
    if provenance.get("model_hash") != base.fingerprint:
        raise ValueError(
            f"{folder / STATISTICS} was measured on model {provenance.get('model_hash')}, but "
            f"{base.folder} is {base.fingerprint}; score this model"
        )
    return statistics, provenance
