"""The scoring stage: statistics of a model on calibration text, collected or found again."""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

import jax.numpy as jnp
import numpy as np

from convert.checkpoint import Checkpoint, load_model
from convert.fingerprint import fingerprint
from convert.reader import CheckpointError
from moe_jax.errors import InputError
from pruning.kit.fitting import misfits
from pruning.kit.progress import Steps
from pruning.report.stored_fields import Stability
from pruning.scores import own
from pruning.scores.collect import collect_weights
from pruning.scores.elimination import elimination_costs
from pruning.scores.grams import SHARE, sampled
from pruning.scores.statistics import ChannelStatistics, load_statistics, save_statistics
from pruning.scores.weight_gradient import weight_gradient_scores
from pruning.stages import extra_scores, writer
from pruning.stages.job import Job
from pruning.stages.model_record import remember
from pruning.stages.parts import collect_parts, sweep_folder
from pruning.text.kept_out import kept_out_note

STATISTICS = "statistics.safetensors"


class Text(TypedDict):
    """A calibration text behind statistics."""

    path: str
    sha256: str
    weight: float
    documents: int
    tokens: int


class Noted(TypedDict, total=False):
    """What is noted beside statistics, as far as plans and reports rely on it."""

    sources: list[Text]
    stability: Stability | None


def score(job: Job, steps: Steps) -> tuple[ChannelStatistics, dict]:
    """Collect statistics, or read those an earlier run of the same recipe wrote.

    Raises:
      CheckpointError: the weights hold NaN or infinity; then a run that wrote nothing else before
        leaves nothing.
    """
    found = find_statistics(job)
    if found is None and (before := lacking_obs(job)) is not None:
        text, (statistics, provenance) = job.calibration, before
        found = _with_obs(job, statistics, (text.tokens, text.valid), steps), provenance
        save_statistics(job.output / STATISTICS, *found)
    if found is None:
        collect = _score_weights if job.recipe.weights_only else _score_text
        try:
            found = collect(job, steps)
        except CheckpointError:
            _withdraw(job)
            raise
    sweep_folder(job).clear()  # a killed run may have left it beside finished statistics
    return found


def facts(job: Job) -> dict[str, Any]:
    """What processes that share a sweep must agree in."""
    text = job.calibration
    digest = hashlib.sha256(text.tokens.tobytes() + text.valid.tobytes())
    if text.counted is not None:
        digest.update(text.counted.tobytes())
    recipe = job.recipe
    return {
        "model": fingerprint(job.base.about.outer or job.base.about.hf_config, ""),
        "calibration": [digest.hexdigest(), *text.tokens.shape],
        "options": [
            recipe.batch, recipe.dtype, recipe.until_stable, recipe.seed, *sorted(recipe.groups),
            *sorted(own.STATISTICS),
        ],
        "mesh": [job.spread.devices, job.spread.parts],
    }  # fmt: skip


def _withdraw(job: Job) -> None:
    sweep_folder(job).clear()
    recipe = job.output / "recipe.yaml"
    if {path.name for path in job.output.iterdir()} <= {recipe.name, *writer.FILES}:
        recipe.unlink(missing_ok=True)


def _score_text(job: Job, steps: Steps) -> tuple[ChannelStatistics, dict]:
    extra_scores.announce(job.base, job.recipe, steps)
    job.output.mkdir(parents=True, exist_ok=True)
    statistics, used, stability = collect_parts(job, _text_identity(job), steps)
    text = job.calibration
    texts = text.tokens[used], text.valid[used], text.counted_in(used)
    how: dict[str, Any] = {"batch": job.recipe.batch, "dtype": job.dtype}
    if job.recipe.weight_gradients:
        with steps.bar("weight gradients") as on_step:
            gradient = weight_gradient_scores(
                job.base,
                *texts,
                scratch=job.recipe.scratch_folder,
                on_step=on_step,
                **how,
            )
        statistics = dataclasses.replace(statistics, weight_gradient=gradient)
    if job.recipe.obs and statistics.elimination is None:
        statistics = _with_obs(job, statistics, texts[:2], steps)
    load = lambda: load_model(job.base.about.folder, jnp.bfloat16)  # noqa: E731
    statistics = extra_scores.add(statistics, job.base, texts, job.recipe, steps, load, **how)
    provenance = _provenance(job, stability)
    save_statistics(job.output / STATISTICS, statistics, provenance)
    return statistics, provenance


def _with_obs(
    job: Job, statistics: ChannelStatistics, text: tuple[np.ndarray, np.ndarray], steps: Steps
) -> ChannelStatistics:
    """Statistics with obs, which a sweep over a sample of their text adds."""
    how: dict[str, Any] = {"batch": job.recipe.batch, "dtype": job.dtype}
    with steps.bar("elimination") as on_step:
        costs = elimination_costs(
            job.base, *sampled(*text, SHARE), statistics, on_step=on_step, **how
        )
    return dataclasses.replace(statistics, elimination=costs)


def _score_weights(job: Job, steps: Steps) -> tuple[ChannelStatistics, dict]:
    steps.say(
        "no text is read: the weights alone decide "
        f"(criterion {job.recipe.used_criterion}, attribution {job.recipe.used_attribution})"
    )
    with steps.bar("score weights") as on_step:
        visits, total = itertools.count(1), len(job.base.config.moe_layers)
        with job.base.checking(mtp=job.recipe.mtp != "drop"):
            statistics = collect_weights(job.base, lambda: on_step(next(visits), total))
    remember(job.base, job.output)
    provenance = _provenance(job, None)
    save_statistics(job.output / STATISTICS, statistics, provenance)
    return statistics, provenance


def find_statistics(
    job: Job, groups: Iterable[str] | None = None
) -> tuple[ChannelStatistics, dict] | None:
    """What an earlier run of the same recipe measured on the same model and texts, if it did: all
    the recipe's groups, or these."""
    path = job.output / STATISTICS
    if not path.is_file() or not path.with_suffix(".json").is_file():
        return None
    statistics, found = _read(path)
    known = {**found, "sources": without_paths(found.get("sources", ()))}
    same = all(known.get(key) == value for key, value in identity(job).items())
    asked = job.recipe.groups if groups is None else groups
    return (statistics, found) if same and statistics.covers(asked) else None


def lacking_obs(job: Job) -> tuple[ChannelStatistics, dict] | None:
    """What an earlier run measured without obs, which can be added; not where some of the text was
    enough for it."""
    if not job.recipe.obs or job.recipe.until_stable is not None:
        return None
    return find_statistics(job, job.recipe.groups - {"obs"})


def identity(job: Job) -> dict:
    """What statistics must agree in to be those of a job: contents, wherever they lie."""
    return {"model_hash": job.base.fingerprint, **_text_identity(job)}


def _text_identity(job: Job) -> dict:
    return {
        "window": job.recipe.window,
        "dtype": job.recipe.dtype,
        "tokens": job.calibration.total,
        "sources": without_paths(job.calibration.sources),
        **({"nll_ig_steps": job.recipe.nll_ig} if job.recipe.nll_ig else {}),
        "until_stable": job.recipe.until_stable,
        **({"kept_out": kept_out_note(job.kept_out)} if job.kept_out else {}),
    }


def without_paths(sources: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is known of texts beside where they lie."""
    return [{key: value for key, value in one.items() if key != "path"} for one in sources]


def _provenance(job: Job, stability: dict | None) -> dict:
    """What is stored beside statistics: their identity, and where model and texts were."""
    places = {"model": str(job.base.about.folder), "sources": list(job.calibration.sources)}
    return {**identity(job), **places, "stability": stability}


def stored_statistics(folder: Path, base: Checkpoint) -> tuple[ChannelStatistics, dict]:
    """Statistics in an output folder, which must be of this very model.

    Raises:
      InputError: they are missing, damaged, or of another model.
    """
    statistics, provenance = _read(folder / STATISTICS)
    if provenance.get("model_hash") != base.fingerprint:
        raise InputError(
            f"{folder / STATISTICS} was measured on model {provenance.get('model_hash')}, but "
            f"{base.about.folder} is {base.fingerprint}; score this model"
        )
    return statistics, provenance


def _read(path: Path) -> tuple[ChannelStatistics, dict]:
    statistics, provenance = load_statistics(path)
    if wrong := misfits(Noted, provenance):
        raise InputError(
            f"{', '.join(wrong)} in {path.with_suffix('.json')} hold something else; remove it and "
            "score again"
        )
    return statistics, provenance
