"""Losses of plans on the windows kept out, as they are or as a repair begins; remembered."""

import dataclasses
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint
from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from moe_jax.stream import even_batch
from pruning.budget.plan import PruningPlan
from pruning.kit.fitting import misfits
from pruning.kit.memory import allowance
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference, window_losses
from pruning.recipe.recipe import ResolvedRecipe
from pruning.scores.grams import sampled
from pruning.scores.sample import Sample
from pruning.scores.statistics import ChannelStatistics
from pruning.shrink.masked import masked_hidden
from pruning.stages.job import DTYPES, Job
from pruning.text.calibration import TokenBatch
from pruning.text.kept_out import kept_out_note

CHOICE = "choice.json"
STATE_BYTES = 2 << 30  # hidden states of the plans that share a reading of the model
SHARE = 1 / 24  # of the calibration text, by which kept channels take over what is gone


@dataclasses.dataclass(frozen=True)
class Measured:
    """Losses on the windows kept out: of the dense model, and of plans by their content.

    Attributes:
      dense: [B] nats summed over each window.
      plans: content hash of a plan -> the same.
      tokens: [B] predictions in each window.
      files: [B] the place of each window's file among the sources.
    """

    dense: list[float]
    plans: dict[str, list[float]]
    tokens: list[int]
    files: list[int]


def is_repaired(recipe: ResolvedRecipe) -> bool:
    """Whether plans of a recipe are measured as a repair begins, with what is kept refitted."""
    return recipe.repair != "none"


def measured_losses(
    plans: Sequence[PruningPlan],
    recipe: ResolvedRecipe,
    statistics: ChannelStatistics,
    provenance: dict,
    base: Checkpoint,
    opened: Callable[[], Job],
    steps: Steps,
) -> Measured:
    """Losses of plans, those found in choice.json of the output folder not measured again.

    Args:
      plans: of the model, any number.
      recipe: says whether they will be repaired; then what is kept takes over what it can, each
        expert for itself, by a sample of the calibration text.
      statistics, provenance: of scoring, which kept windows out.
      base: the dense model.
      opened: opens the texts, where something is left to measure.
      steps: where progress goes.

    Raises:
      InputError: the windows are not those that were kept out.
    """
    folder, repaired = Path(recipe.output), is_repaired(recipe)
    key = {"model_hash": base.fingerprint, "dtype": recipe.dtype, "repaired": repaired}
    key |= provenance["kept_out"]
    known = _remembered(folder / CHOICE, key)
    missing = {plan.content_hash: plan for plan in plans}
    if known is not None:
        missing = {name: plan for name, plan in missing.items() if name not in known.plans}
    if known is not None and not missing:
        return known
    job = opened()
    text = job.kept_out
    if text is None or kept_out_note(text) != provenance["kept_out"]:
        raise InputError(
            f"the calibration text is not the one that {folder} was scored on, so rules cannot be "
            "measured on the windows kept out of it; name a --planner, or score again"
        )
    if known is None:
        whole = PruningPlan(np.ones_like(plans[0].keep), plans[0].layer_indices)
        missing = {"dense": whole, **missing}
    seen = (job.calibration, statistics) if repaired else None
    found = _losses(text, missing, recipe, base, seen, steps)
    dense = known.dense if known else found.pop("dense")
    files = np.zeros(len(text.tokens), int) if text.files is None else text.files
    losses = Measured(
        dense, {**(known.plans if known else {}), **found},
        text.scored.sum(axis=1).tolist(), files.tolist(),
    )  # fmt: skip
    content = {"key": key, **dataclasses.asdict(losses)}
    if os.access(folder, os.W_OK):  # `eval` may read a folder where it may not write
        replace_text(folder / CHOICE, json.dumps(content, indent=1) + "\n")
    return losses


def _remembered(path: Path, key: dict[str, Any]) -> Measured | None:
    """What choice.json holds of the same model and windows; None if nothing, or nothing whole."""
    try:
        found = read_json(path)
        if found.pop("key") != key or misfits(Measured, found):
            return None
        known = Measured(**found)
        each = (known.tokens, known.files, known.dense, *known.plans.values())
        whole = {key["windows"]} == set(map(len, each)) != {0}
        return known if whole and min(known.tokens + known.files) >= 0 < sum(known.tokens) else None
    except (InputError, OSError, AttributeError, KeyError, TypeError):
        return None


def _losses(
    text: TokenBatch,
    plans: dict[str, PruningPlan],
    recipe: ResolvedRecipe,
    base: Checkpoint,
    seen: tuple[TokenBatch, ChannelStatistics] | None,
    steps: Steps,
) -> dict[str, list[float]]:
    """Nats of every window under every plan; plans share a reading of the weights. With a text of
    which a sample is `seen`, kept channels take over what they can."""
    windows, found, names = text.windows(), {}, list(plans)
    state = text.tokens.size * base.config.d_model * np.dtype(DTYPES[recipe.dtype]).itemsize
    size, layers = max(1, allowance().of(STATE_BYTES) // state), len(base)
    steps.detail(f"  {len(names)} plans on {int(windows.scored.sum()):,} predictions")
    dtype = DTYPES[recipe.dtype]
    with steps.bar("measure rules") as on_step:
        for start in range(0, len(names), size):
            group = names[start : start + size]

            def visited(layer: int, start=start, count=len(group)) -> None:  # noqa: B008
                on_step(start * layers + (layer + 1) * count, len(names) * layers)

            hidden = masked_hidden(
                base, text.tokens, text.valid, [plans[name] for name in group],
                sample=seen and _sample(base, *seen, recipe),
                batch=_step(text.tokens, recipe), dtype=dtype, on_layer=visited,
            )  # fmt: skip
            for name, states in zip(group, hidden, strict=True):
                found[name] = window_losses(Reference(base.head, states), windows).tolist()
    return found


def _sample(
    base: Checkpoint, text: TokenBatch, statistics: ChannelStatistics, recipe: ResolvedRecipe
) -> Sample:
    tokens, valid = sampled(text.tokens, text.valid, SHARE)
    how = {"batch": _step(tokens, recipe), "dtype": DTYPES[recipe.dtype]}
    return Sample(base, tokens, valid, statistics, **how)


def _step(tokens: np.ndarray, recipe: ResolvedRecipe) -> int:
    """Windows per step of a text [B, T]: as many tokens as scoring takes, and little padding, which
    every plan would run."""
    windows, length = tokens.shape
    return even_batch(windows, max(1, recipe.batch * recipe.window // length))
