"""Calibration in parts: one sweep over all of them, and when the kept set was stable."""

from collections.abc import Callable
from contextlib import nullcontext

import numpy as np

from pruning.kit.progress import Steps
from pruning.scores.asked import Asked
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.expert_criteria import expert_criterion
from pruning.scores.own import STATISTICS
from pruning.scores.parts import in_parts, rows_of_parts, windows_at_work
from pruning.scores.states import States, state_bytes
from pruning.scores.statistics import ChannelStatistics
from pruning.scores.sweep_log import SweepFolder
from pruning.scores.text_sweep import TextSweep
from pruning.stages import plan as planning
from pruning.stages.job import Job
from pruning.stages.model_record import remember

FOLDER = "scoring"  # of the output folder, while the text is swept


def collect_parts(
    job: Job, identity: dict, steps: Steps
) -> tuple[ChannelStatistics, np.ndarray, dict]:
    """Sweep over the calibration text, or over the layers that an interrupted run left.

    Args:
      job: the opened recipe.
      identity: facts about the text that stored progress must agree with to be gone on with.
      steps: where progress goes.

    Returns:
      (sums of the parts that count, rows of their windows, stability): all parts count, or with
      `until_stable` the fewest whose kept set is stable. stability has `tokens` and `jaccard` per
      part, the overlap of the kept set with that of one part fewer (null for the first and where
      the criterion needs the whole text), and `halves`, that of the even and the odd parts.
    """
    until_stable = job.recipe.until_stable
    parts = rows_of_parts(len(job.calibration.tokens), until_stable is not None)
    found = _swept(job, identity, parts, steps)
    kept = _kept_set(job)
    halves: list[ChannelStatistics | None] = [None, None]
    total, before, curve = None, None, {"tokens": [], "jaccard": []}
    done = 0
    for number in range(len(parts)):
        part = found.part(number)
        total = part if total is None else total.merge(part)
        half = halves[number % 2]
        halves[number % 2] = part if half is None else half.merge(part)
        done = number + 1
        after = kept(total)
        overlap = jaccard(before, after)
        curve["tokens"].append(int(total.total_tokens))
        curve["jaccard"].append(overlap)
        before = after
        if overlap is not None:
            steps.say(
                f"kept set changed by {1 - overlap:.1%} since the last "
                f"{int(part.total_tokens):,} tokens"
            )
            if until_stable is not None and overlap >= until_stable:
                break
    assert total is not None
    even, odd = halves
    apart = None if even is None or odd is None else jaccard(kept(even), kept(odd))
    rows = np.sort(np.concatenate(parts[:done]))
    return found.finished(total, done), rows, {**curve, "halves": apart}


def help_collect(job: Job, steps: Steps) -> None:
    """What a process other than the first does while that one is in `collect_parts`."""
    until_stable = job.recipe.until_stable is not None
    _swept(job, {}, rows_of_parts(len(job.calibration.tokens), until_stable), steps)


def jaccard(one: np.ndarray | None, two: np.ndarray | None) -> float | None:
    """Members of both sets over members of either; None if one is unknown."""
    if one is None or two is None:
        return None
    return float((one & two).sum() / max(1, (one | two).sum()))


def sweep_folder(job: Job) -> SweepFolder:
    """Where a job's sweep leaves its progress."""
    return SweepFolder(job.output / FOLDER, job.spread)


def _swept(job: Job, identity: dict, parts: list[np.ndarray], steps: Steps) -> TextSweep:
    recipe, base, log, spread = job.recipe, job.base, sweep_folder(job), job.spread
    is_prefix = recipe.until_stable is not None
    # Where some of the text is enough its sample is of that, and known afterwards.
    obs = recipe.obs and not is_prefix and spread.parts == 1
    asked = Asked(recipe.gradients, recipe.expert_details, is_prefix, obs)
    batch, _ = windows_at_work(parts, recipe.batch)
    tokens, valid = job.calibration.tokens, job.calibration.valid
    text = in_parts(base, tokens, valid, job.calibration.counted, parts, batch, spread)
    shape = (*text.batches.tokens.shape, base.config.d_model)
    slots, number = asked.slots(base.config), asked.steps(base.config)
    told = {
        **identity, "files": base.file_hash, "asked": asked.groups, "own": sorted(STATISTICS),
        "batch": batch, "parts": len(parts),
    }  # fmt: skip
    if spread.processes * spread.devices > 1:  # by which states are dealt
        told |= {"processes": spread.processes, "devices": spread.devices}
    size = state_bytes(slots, shape, job.dtype)
    with (
        log.states(told, number, recipe.scratch_folder, size) as file,
        steps.bar("score text") as on_step,
    ):
        states = None if file is None else States(slots, shape, job.dtype, file)
        beside = recipe.scratch_folder
        found = TextSweep(base, text, asked, job.dtype, states, log, on_step, spread, beside)
        # The first reading is also that which finds bad weights and identifies the model.
        is_read = base.weights_hash is not None and log.done >= len(base)
        is_read |= not spread.leads
        with nullcontext() if is_read else base.checking(mtp=recipe.mtp != "drop"):
            found.forward()
        if spread.leads:
            remember(base, job.output)
        found.backward()
    log.drop_states()
    return found


def _kept_set(job: Job) -> Callable[[ChannelStatistics], np.ndarray | None]:
    # The rule that planner auto will take is not known yet; the usual one stands for it.
    usual = job.recipe.fixed()
    scores = CHANNEL_CRITERIA[usual.used_criterion], expert_criterion(usual.used_attribution)
    if any(score.whole_text for score in scores):
        return lambda statistics: None
    notes = {"model_hash": job.base.fingerprint}
    return lambda statistics: planning.plan(usual, statistics, notes, job.base.about).keep
