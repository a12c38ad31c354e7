"""What pruning each layer alone costs, and how far the concentration of its score foretells it."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import allowance
from pruning.kit.progress import Steps
from pruning.measure.concentration import concentration_report
from pruning.measure.quality import Reference, window_losses
from pruning.shrink.masked import masked_hidden
from pruning.stages.job import Job
from pruning.stages.rule_losses import STATE_BYTES
from pruning.text.calibration import TokenBatch

RECORD = "layers-alone.json"
GROUP = 16  # plans that share a reading at most: losses are remembered after each
Text = tuple[np.ndarray, np.ndarray]  # tokens int32 [B, T], and their mask bool [B, T]


def report_alone(
    job: Job, channel: np.ndarray, rate: float, text: Text, target: Path, steps: Steps
) -> dict[str, Any]:
    """What pruning each layer alone costs, beside the concentration of its score.

    Args:
      job, text, target, steps: as of `losses_alone`.
      channel: [L, E, F], scores by the criterion of the job's recipe.
      rate: as of `least_gone`.

    Returns:
      What `concentration_report` does, losses per predicted token, with `rate` and `criterion`.
    """
    keep, valid = least_gone(channel, rate), text[1]
    predicted = int((valid[:, :-1] & valid[:, 1:]).sum())
    increase = losses_alone(job, keep, text, target, steps) / predicted
    found = concentration_report(channel, keep, increase, job.base.config.moe_layers)
    return {"rate": rate, "criterion": job.recipe.used_criterion, **found}


def least_gone(channel: np.ndarray, rate: float) -> np.ndarray:
    """What stays when a layer loses its channels of least score, whichever expert has them.

    Args:
      channel: [L, E, F] scores.
      rate: fraction of each layer's channels that goes.

    Returns:
      bool [L, E, F]; ties go from the lower expert and channel on.
    """
    flat = channel.reshape(len(channel), -1)
    keep = np.ones(flat.shape, bool)
    gone = np.argsort(flat, axis=1, kind="stable")[:, : round(rate * flat.shape[1])]
    np.put_along_axis(keep, gone, False, axis=1)
    return keep.reshape(channel.shape)


def losses_alone(job: Job, keep: np.ndarray, text: Text, target: Path, steps: Steps) -> np.ndarray:
    """Loss that is added when one layer is pruned and the others are not.

    Plans share readings of the model, and what was measured is remembered in the target folder.

    Args:
      job: with the dense model and the processes that share the plans.
      keep: bool [L, E, F], what stays of each layer.
      text: tokens int32 [B, T] and their mask bool [B, T].
      target: folder of `RECORD`.
      steps: where progress goes.

    Returns:
      float64 [L], nats summed over the predictions.
    """
    batch, indices = TokenBatch(*text), tuple(job.base.config.moe_layers)
    plans = [PruningPlan(np.ones_like(keep), indices)]
    for slot, own in enumerate(keep):
        alone = np.ones_like(keep)
        alone[slot] = own
        plans.append(PruningPlan(alone, indices))
    digest = sha256(batch.tokens.tobytes() + batch.valid.tobytes()).hexdigest()
    key = {"model_hash": job.base.fingerprint, "text": digest, "dtype": job.recipe.dtype}
    names = [plan.content_hash for plan in plans]
    by_name = dict(zip(names, plans, strict=True))
    known = job.spread.led(lambda: _remembered(target / RECORD, key))
    left = [name for name in by_name if name not in known]
    state = batch.tokens.size * job.base.config.d_model * np.dtype(job.dtype).itemsize
    size = max(1, min(GROUP, allowance().of(STATE_BYTES) // state))
    layers = len(job.base)
    windows = batch.windows()
    with steps.bar("layers alone") as on_step:

        def measured(start: int) -> list[float]:
            group = left[start : start + size]

            def visited(layer: int) -> None:
                on_step(start * layers + (layer + 1) * len(group), len(left) * layers)

            hidden = masked_hidden(
                job.base, batch.tokens, batch.valid, [by_name[name] for name in group],
                batch=min(job.recipe.batch, len(batch.tokens)), dtype=job.dtype, on_layer=visited,
            )  # fmt: skip
            models = (Reference(job.base.head, states) for states in hidden)
            return [float(window_losses(model, windows).sum()) for model in models]

        for start, found in job.spread.shared_out(range(0, len(left), size), measured):
            known |= dict(zip(left[start : start + size], found, strict=True))
            if job.spread.leads:
                replace_text(target / RECORD, json.dumps({"key": key, "losses": known}) + "\n")
    if not job.spread.leads:
        return np.zeros(len(keep))  # process 0 knows all of them, and reports
    return np.array([known[name] for name in names[1:]]) - known[names[0]]


def _remembered(path: Path, key: dict[str, Any]) -> dict[str, float]:
    """Losses by plan of the same model and text; none if the file is another's or damaged."""
    try:
        found = read_json(path)
        losses = found["losses"] if found["key"] == key else {}
        return {str(name): float(loss) for name, loss in losses.items()}
    except (InputError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return {}
