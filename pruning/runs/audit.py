"""The stage behind `moe-compress audit`: measure, remember, compare, write."""

import dataclasses
import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.files import remove_leftovers, replace_text
from moe_jax.spread import Spread
from pruning.kit.progress import Steps
from pruning.measure.ablation_record import RECORD, Losses, append, begin_section, read_record
from pruning.measure.agreement import audit_report, sample_ablations, to_csv
from pruning.measure.loss_curves import expert_loss_curves
from pruning.measure.tokens import view_tokens
from pruning.recipe.place_options import PlaceOptions
from pruning.recipe.recipe import CompressionRecipe
from pruning.recipe.values import check_whole
from pruning.report.audit_page import PAGE, audit_page, token_figures
from pruning.runs.cap import refuse_limit
from pruning.runs.layers_alone import report_alone
from pruning.runs.places import working
from pruning.runs.score import scored
from pruning.scores.ablation import Ablation, ablate, layer_visits
from pruning.scores.criteria import ChannelScores, channel_scores
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import preflight
from pruning.stages import score as scoring
from pruning.stages.job import Job, open_job
from pruning.stages.model_record import identify
from pruning.stages.stored import stored_recipe
from pruning.text.calibration import TokenBatch
from pruning.text.windows import Windows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEN_TOKENS = 2048  # of each text, for the figures of distributions
EVALUATION_TEXTS = 3  # beside the calibration text
TOGETHER = 64  # ablations that share a reading of the model; each such group is remembered


def check_sample(
    *, experts: int, channels: int, tokens: int, layers_alone: float | None = None
) -> None:
    """Refuse sizes that measure nothing.

    Raises:
      InputError: naming the flag.
    """
    for name, value, least in (
        ("experts", experts, 0), ("channels", channels, 0), ("tokens", tokens, 2),
    ):  # fmt: skip
        flag = "sample-tokens" if name == "tokens" else name
        check_whole(name, value, least, cure=f"; change --{flag}")
    if layers_alone is not None and not 0 < layers_alone < 1:
        raise InputError(f"layers_alone={layers_alone} must lie in (0, 1); choose e.g. 0.5")
    if experts + channels == 0:
        raise InputError("experts=0 and channels=0 leave nothing to measure; give --experts 32")


def audit(
    source: CompressionRecipe | str | os.PathLike,
    *,
    experts: int = 32,
    channels: int = 64,
    tokens: int = 8192,
    layers_alone: float | None = None,
    output: str | os.PathLike | None = None,
    steps: Steps | None = None,
    where: PlaceOptions | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Ablate a random sample of experts and channels, and compare every score with it.

    An interrupted audit is repeated with the same arguments and goes on where it stopped.

    Args:
      source: a recipe, whose model is scored first, or a folder that `score` or `compress` wrote.
      experts, channels: to sample; the recipe's seed decides which.
      tokens: of the calibration text, in whole windows spread over it.
      layers_alone: also prune each layer alone of this fraction of its channels, those of least
        score by the recipe's criterion, and say how far the concentration of its score foretells
        the loss.
      output: of a folder, where audit.json, audit.csv, audit.html and the record of what was
        measured go; default the folder itself. A recipe names its own.
      steps: where progress goes; default stderr, of process 0.
      where: devices and processes: of a recipe windows are dealt to all while scoring, groups of
        ablations to processes; as of `score`. Of a folder only processes.
      options: on top of the recipe in a folder, such as `batch` and `seed`.

    Returns:
      What audit.json holds.

    Raises:
      InputError: a number is out of range, the folder was scored without text, or another process
        writes where the results go.
      LostProcess: another process has ended; what is finished stays.
    """
    sample: dict[str, Any] = {"experts": experts, "channels": channels, "tokens": tokens,
                              "layers_alone": layers_alone}  # fmt: skip
    check_sample(**sample)
    target = source.output if isinstance(source, CompressionRecipe) else output or source
    with working(target, where, steps) as (spread, steps):
        return _opened(source, Path(target), sample, steps, options, spread)


def _opened(
    source: CompressionRecipe | str | os.PathLike,
    target: Path,
    sample: dict[str, Any],
    steps: Steps,
    options: dict[str, Any],
    spread: Spread,
) -> dict[str, Any]:
    """Open what is audited, scored if it is a recipe, and audit it."""
    if isinstance(source, CompressionRecipe):
        refuse_limit(source, "audit")
        asked = dataclasses.replace(source, planner=source.used_planner)
        job = dataclasses.replace(open_job(asked), spread=spread)
        if spread.leads:
            identify(job.base, job.output, steps)
        statistics, _ = scored(
            job, steps, lambda: preflight.prepare(job, steps, exports=False, last=PAGE), sample
        )
    else:
        folder = Path(source)
        recipe = stored_recipe(folder, **options)
        if recipe.weights_only:
            raise InputError(
                f"{folder} was scored without text (weights_only), and the audit measures losses "
                "on text; score the model with --calibration"
            )
        if spread.mesh is not None:
            raise InputError(f"mesh deals windows while scoring, and {folder} is scored already; "
                             "leave out --mesh")  # fmt: skip
        job = dataclasses.replace(open_job(recipe), spread=spread)
        spread.require_same({**scoring.facts(job), **sample})
        if spread.leads:
            identify(job.base, folder, steps)
        job.base.weights_hash = spread.led(job.base.hash_weights)
        statistics, _ = scoring.stored_statistics(folder, job.base)
    if spread.leads:
        remove_leftovers(target)
    return _audit(job, statistics, target, steps, **sample)


def _audit(
    job: Job,
    statistics: ChannelStatistics,
    target: Path,
    steps: Steps,
    *,
    experts: int,
    channels: int,
    tokens: int,
    layers_alone: float | None,
) -> dict[str, Any]:
    """Measure, remember, compare, write; arguments as in `audit`."""
    c = job.base.config
    shape = c.moe.num_experts, c.moe.d_expert
    chosen = sample_ablations(c.moe_layers, shape, experts, channels, job.recipe.seed)
    text, valid = some_windows(job.calibration, tokens)
    target.mkdir(parents=True, exist_ok=True)
    losses = _measure(job, chosen, text, valid, target / RECORD, steps)
    more = {}
    if layers_alone is not None:
        channel = _scores(job, statistics).channel
        more["layers"] = report_alone(job, channel, layers_alone, (text, valid), target, steps)
    return job.spread.led(lambda: _report(job, statistics, losses, more, valid, target, steps))


def _scores(job: Job, statistics: ChannelStatistics) -> ChannelScores:
    recipe = job.recipe
    return channel_scores(
        statistics, criterion=recipe.used_criterion, attribution=recipe.used_attribution,
        seed=recipe.seed,
    )  # fmt: skip


def _predicted(valid: np.ndarray) -> int:
    return int((valid[:, :-1] & valid[:, 1:]).sum())


def _report(
    job: Job,
    statistics: ChannelStatistics,
    losses: Losses,
    more: dict[str, Any],
    valid: np.ndarray,
    target: Path,
    steps: Steps,
) -> dict[str, Any]:
    """Compare scores with what was measured, and write it."""
    predicted = _predicted(valid)
    increases = {one: (loss - dense) / predicted for one, (dense, loss) in losses.items()}
    found = {
        "model": str(job.base.about.folder),
        "model_hash": job.base.fingerprint,
        "dtype": job.recipe.dtype,
        "seed": job.recipe.seed,
        "predicted": predicted,
        "dense_nll": next(iter(losses.values()))[0] / predicted,
        **audit_report(statistics, job.base.config.moe_layers, increases),
        **more,
    }
    replace_text(target / "audit.json", json.dumps(found, indent=2) + "\n")
    replace_text(target / "audit.csv", to_csv(found))
    with steps.bar("figures") as on_step:
        figures = _figures(job, statistics, on_step)
    replace_text(target / PAGE, audit_page(found, figures))
    return found


def _figures(
    job: Job, statistics: ChannelStatistics, on_step: Callable[[int, int], None]
) -> list[tuple["Figure", str]]:
    """What single tokens show on some of the calibration text and of the evaluation texts."""
    recipe = job.recipe
    scores = _scores(job, statistics)
    evaluation = list(job.evaluation.items())[:EVALUATION_TEXTS]
    texts = {
        name: some_windows(one, SEEN_TOKENS)
        for name, one in (("calibration", job.calibration), *evaluation)
    }
    how: dict[str, Any] = {"batch": recipe.batch, "dtype": job.dtype}
    # The model is read once for the curves and once for each text.
    curves, seen = expert_loss_curves(job.base, *texts["calibration"], scores.channel, **how), {}
    for done, (name, part) in enumerate(texts.items(), 1):
        on_step(done, 1 + len(texts))
        seen[name] = view_tokens(job.base, *part, **how)
    return token_figures(
        curves=curves,
        seen=seen,
        usage=statistics.tokens,
        layer_indices=job.base.config.moe_layers,
        criterion=recipe.used_criterion,
    )


def some_windows(batch: TokenBatch | Windows, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """At most `tokens` tokens of a text in whole windows, one at least, evenly spread over it.

    Returns:
      (tokens int32 [B, T], valid bool [B, T]).
    """
    rows, length = batch.tokens.shape
    count = min(rows, max(1, tokens // length))
    picked = np.unique(np.rint(np.linspace(0, rows - 1, count)).astype(int))
    return batch.tokens[picked], batch.valid[picked]


def _measure(job: Job, chosen: list[Ablation], text, valid, record: Path, steps: Steps) -> Losses:
    """Losses of all chosen ablations, those in `record` taken from there."""
    digest = sha256(text.tobytes() + valid.tobytes()).hexdigest()
    key = {"model_hash": job.base.fingerprint, "text": digest, "dtype": job.recipe.dtype}
    known: Losses = {}
    if job.spread.leads:
        known = read_record(record, key)
        begin_section(record, key)
    missing = job.spread.led(lambda: [n for n, one in enumerate(chosen) if one not in known])
    left = [chosen[number] for number in missing]
    _say_cost(left, chosen, len(job.base), text.size, steps)
    how = {"batch": min(job.recipe.batch, len(text)), "dtype": job.dtype}
    with steps.bar("ablate") as on_step:

        def losses_of(start: int) -> list[float]:
            group = left[start : start + TOGETHER]

            def visited(done: int, total: int) -> None:
                on_step(start + len(group) * done // total, len(left))

            dense, losses = ablate(job.base, text, valid, group, on_step=visited, **how)
            return [dense, *map(float, losses)]

        starts = range(0, len(left), TOGETHER)
        for start, (dense, *losses) in job.spread.shared_out(starts, losses_of):
            group = left[start : start + TOGETHER]
            found = {one: (dense, loss) for one, loss in zip(group, losses, strict=True)}
            if job.spread.leads:
                append(record, found)
            known |= found
    return {one: known[one] for one in chosen if one in known}  # process 0 knows all of them


def _say_cost(left, chosen, layers: int, tokens: int, steps: Steps) -> None:
    groups = [left[start : start + TOGETHER] for start in range(0, len(left), TOGETHER)]
    visits = sum(layer_visits(group, layers) for group in groups)
    steps.say(
        f"audit: {len(left)} of {len(chosen)} ablations left to measure on {tokens:,} tokens, "
        f"{visits:,} layer visits, {visits / layers:,.0f} times a plain pass over them"
    )
