"""Calibration in parts: an interrupted sweep resumes, and the kept set shows when it is stable."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from pruning.kit.progress import Steps
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.collect import collect_statistics
from pruning.scores.expert_criteria import expert_criterion
from pruning.scores.statistics import ChannelStatistics, load_statistics, save_statistics
from pruning.stages import plan as planning
from pruning.stages.job import Job

PARTS, PARTS_UNTIL_STABLE = 4, 16
PART_WINDOWS = 64  # at most, so that a part is one reading of the model


def rows_of_parts(windows: int, until_stable: bool) -> list[np.ndarray]:
    """Rows of each part, dealt like cards: every part has windows of every file.

    Args:
      windows: B.
      until_stable: whether the run may stop early, which takes more and smaller parts.

    Returns:
      At least four lists of rows, or one per window if there are fewer.
    """
    wanted = PARTS_UNTIL_STABLE if until_stable else PARTS
    count = min(windows, max(wanted, -(-windows // PART_WINDOWS)))
    return [np.arange(start, windows, count) for start in range(count)]


def collect_parts(
    job: Job, identity: dict, steps: Steps
) -> tuple[ChannelStatistics, np.ndarray, dict]:
    """Score every part of the calibration text, or those left by an interrupted run.

    Args:
      job: the opened recipe.
      identity: facts that stored parts must agree with to be used again.
      steps: where progress goes.

    Returns:
      (sums of all parts, rows of the windows scored, stability): stability has `tokens` and
      `jaccard` per part, the overlap of the kept set with that of one part fewer (null for the
      first and where the criterion needs the whole text), and `halves`, that of the even and the
      odd parts.
    """
    kept = _kept_set(job)
    parts = rows_of_parts(len(job.calibration.tokens), job.recipe.until_stable is not None)
    halves: list[ChannelStatistics | None] = [None, None]
    total, before, curve = None, None, {"tokens": [], "jaccard": []}
    done = 0
    # A text of few windows is not padded to whole batches in every part.
    batch = min(job.recipe.batch, max(map(len, parts)))
    for number, rows in enumerate(parts):
        about = {**identity, "part": number, "parts": len(parts)}
        part = _part(job, about, rows, batch, steps)
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
            if job.recipe.until_stable is not None and overlap >= job.recipe.until_stable:
                break
    assert total is not None
    even, odd = halves
    apart = None if even is None or odd is None else jaccard(kept(even), kept(odd))
    rows = np.sort(np.concatenate(parts[:done]))
    return total, rows, {**curve, "halves": apart}


def jaccard(one: np.ndarray | None, two: np.ndarray | None) -> float | None:
    """Members of both sets over members of either; None if one is unknown."""
    if one is None or two is None:
        return None
    return float((one & two).sum() / max(1, (one | two).sum()))


def _part(
    job: Job, identity: dict, rows: np.ndarray, batch: int, steps: Steps
) -> ChannelStatistics:
    path = Path(job.output) / "parts" / f"{identity['part']:03d}.safetensors"
    if path.is_file() and path.with_suffix(".json").is_file():
        found, notes = load_statistics(path)
        same = all(notes.get(key) == value for key, value in identity.items())
        if same and found.covers(job.recipe.groups & {"gradients", "expert-details"}):
            return found
    with steps.bar(f"score {identity['part'] + 1}/{identity['parts']}") as on_step:
        found = collect_statistics(
            job.base,
            job.calibration.tokens[rows],
            job.calibration.valid[rows],
            counted=job.calibration.counted_in(rows),
            gradients=job.recipe.gradients,
            expert_details=job.recipe.expert_details,
            finish=False,
            batch=batch,
            dtype=job.dtype,
            scratch=job.recipe.scratch_folder,
            on_step=on_step,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    # In float64: rounding the parts would change the sums.
    save_statistics(path, found, identity)
    return found


def _kept_set(job: Job) -> Callable[[ChannelStatistics], np.ndarray | None]:
    # The rule that planner auto will take is not known yet; the usual one stands for it.
    usual = job.recipe.fixed()
    scores = CHANNEL_CRITERIA[usual.used_criterion], expert_criterion(usual.used_attribution)
    if any(score.whole_text for score in scores):
        return lambda statistics: None
    notes = {"model_hash": job.base.fingerprint}
    return lambda statistics: planning.plan(usual, statistics, notes, job.base.about).keep
