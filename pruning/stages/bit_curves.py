"""What every layer loses alone, by its channels and by its bits.

Of each layer some shares of its channels are removed, as a rule removes them, and its weights are
rounded, while all other layers are dense and in 16 bits. What that does is the divergence of the
model's predictions from the dense ones on text kept out of the statistics: of a few tokens losses
are too noisy to tell layers apart, divergences are not.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.export_format import STORAGES
from moe_jax.errors import InputError
from moe_jax.files import replace_text
from moe_jax.json_files import read_json
from pruning.budget.plan import PruningPlan
from pruning.kit.errors import BudgetError
from pruning.kit.memory import allowance
from pruning.kit.progress import Steps
from pruning.measure.quality import Reference, measure_quality, quality_of
from pruning.shrink.masked import masked_hidden
from pruning.stages.job import Job
from pruning.stages.rule_losses import STATE_BYTES
from pruning.text.calibration import TokenBatch
from pruning.text.kept_out import FEWEST, kept_out_note

RECORD = "bit-curves.json"
REMOVED = (1 / 8, 1 / 4, 1 / 2, 3 / 4, 7 / 8)  # shares of all channels of which curves are measured
GROUP = 64  # plans that share a reading at most: divergences are remembered after each

PlanAt = Callable[[int], PruningPlan]  # channels -> the plan of a rule that keeps so many


@dataclass(frozen=True)
class Curves:
    """What the layers of a model lose alone, nats per token that its predictions diverge.

    Attributes:
      kept: int [L, P], channels of each layer with experts, all of them first.
      error: float64 [L, P], when it keeps these.
      rounding: bits -> float64 [N], of each layer of the model when its weights have so many.
    """

    kept: np.ndarray
    error: np.ndarray
    rounding: Mapping[int, np.ndarray]


def require_kept_out(job: Job) -> TokenBatch:
    """The windows that curves are measured on.

    Raises:
      InputError: nothing was kept out, the calibration text is too short for that.
    """
    if job.kept_out is None:
        raise InputError(
            "what is 'auto' is measured on windows kept out of the calibration text, which has "
            f"{len(job.calibration.tokens)}, fewer than {FEWEST}; give more text, or a shorter "
            "--window"
        )
    return job.kept_out


def measured_curves(job: Job, plan_at: PlanAt, step: int, steps: Steps) -> Curves:
    """Measure the curves of a rule; what a folder remembers is not measured again.

    Args:
      job: its `kept_out` is what is measured on; the dense model, its group size.
      plan_at: raises BudgetError for numbers that the rule cannot keep.
      step: of which the numbers of channels are multiples.
      steps: where progress goes.

    Raises:
      InputError: nothing was kept out, the calibration text is too short for that.
    """
    text, whole = require_kept_out(job), whole_plan(job)
    plans = [whole, *(plan for _, plan in made_plans(plan_at, whole.keep.size, REMOVED, step))]
    alone = [[_alone(plan, slot, whole) for plan in plans[1:]] for slot in range(len(whole.keep))]
    rounded = {
        bits: [in_bits(whole, index, bits, len(job.base)) for index in range(len(job.base))]
        for bits in STORAGES if bits < 16
    }  # fmt: skip
    every = [plan for some in (*alone, *rounded.values()) for plan in some]
    found = _divergences(job, text, every, steps)
    return Curves(
        np.array([plan.counts.sum(axis=1) for plan in plans]).T,
        np.array([[0.0, *(found[plan.content_hash] for plan in some)] for some in alone]),
        {bits: np.array([found[plan.content_hash] for plan in some])
         for bits, some in rounded.items()} | {16: np.zeros(len(job.base))},
    )  # fmt: skip


def least_diverging(job: Job, plans: Sequence[PruningPlan], steps: Steps) -> PruningPlan:
    """Of plans that give each layer bits, the one under which predictions diverge least.

    Divergences of layers alone do not add up where much is removed, so what was foretold by them
    is measured before it is taken; the first wins a tie.

    Args:
      job, steps: as of `measured_curves`.
      plans: one or more; what a folder remembers of them is not measured again.

    Returns:
      The plan, whose provenance has the `measured_divergence` in nats per token.
    """
    found = _divergences(job, require_kept_out(job), plans, steps)
    best = min(plans, key=lambda plan: found[plan.content_hash])
    said = {"measured_divergence": found[best.content_hash]}
    return dataclasses.replace(best, provenance={**best.provenance, **said})


def made_plans(
    plan_at: PlanAt, channels: int, shares: Sequence[float], step: int, also: Sequence[int] = ()
) -> list[tuple[int, PruningPlan]]:
    """Plans without these shares of all channels, most channels first; without those that the rule
    cannot make."""
    budgets = {step * round((1 - share) * channels / step) for share in shares} | {*also}
    found = []
    for budget in sorted((one for one in budgets if 0 < one < channels), reverse=True):
        with contextlib.suppress(BudgetError):
            found.append((budget, plan_at(budget)))
    return found


def whole_plan(job: Job) -> PruningPlan:
    """The plan that keeps everything."""
    c = job.base.config
    shape = (len(c.moe_layers), c.moe.num_experts, c.moe.d_expert)
    return PruningPlan(np.ones(shape, bool), tuple(c.moe_layers))


def _alone(plan: PruningPlan, slot: int, whole: PruningPlan) -> PruningPlan:
    """What a plan does to one layer, the others left as they are."""
    return joined_plan([whole, plan], [int(own == slot) for own in range(len(whole.keep))])


def joined_plan(plans: Sequence[PruningPlan], numbers: Sequence[int]) -> PruningPlan:
    """A plan that does to each layer with experts what that of a number does."""
    taken = [(plans[number], slot) for slot, number in enumerate(numbers)]
    keep = np.stack([plan.keep[slot] for plan, slot in taken])
    constants = next((plan.constants for plan in plans if plan.constants is not None), None)
    if constants is not None:
        none = np.zeros((0, constants[0].shape[1]), np.float32)
        constants = tuple(
            none if plan.constants is None else plan.constants[slot] for plan, slot in taken
        )
    return PruningPlan(keep, plans[0].layer_indices, constants=constants)


def in_bits(whole: PruningPlan, index: int, bits: int, layers: int) -> PruningPlan:
    """Nothing removed, one layer in so many bits."""
    own = tuple(bits if layer == index else 16 for layer in range(layers))
    return dataclasses.replace(whole, layer_bits=own)


def _divergences(
    job: Job, text: TokenBatch, plans: Sequence[PruningPlan], steps: Steps
) -> dict[str, float]:
    """Nats per token that predictions diverge from those of the dense model, by content of a plan;
    readings are shared, and what was measured is remembered in the output folder."""
    base, path = job.base, job.output / RECORD
    key = {"model_hash": base.fingerprint, "dtype": job.recipe.dtype,
           "group_size": job.recipe.group_size, **kept_out_note(text)}  # fmt: skip
    known = _remembered(path, key)
    missing = {plan.content_hash: plan for plan in plans}
    missing = {name: plan for name, plan in missing.items() if name not in known}
    if not missing:
        return known
    windows, names, layers = text.windows(), list(missing), len(base)
    how: dict[str, Any] = {"batch": job.recipe.batch, "dtype": job.dtype}
    _, dense = measure_quality(base, windows, **how)
    state = text.tokens.size * base.config.d_model * np.dtype(job.dtype).itemsize
    size = max(1, min(GROUP, allowance().of(STATE_BYTES) // state))
    steps.detail(f"  {len(names)} layers alone on {int(windows.scored.sum()):,} predictions")
    with steps.bar("measure layers alone") as on_step:
        for start in range(0, len(names), size):
            group = [missing[name] for name in names[start : start + size]]

            def visited(layer: int, start=start, count=len(group)) -> None:  # noqa: B008
                on_step(start * layers + (layer + 1) * count, len(names) * layers)

            hidden = masked_hidden(
                base, text.tokens, text.valid, group, storages=[storages(plan) for plan in group],
                group_size=job.recipe.group_size, on_layer=visited, **how,
            )  # fmt: skip
            for plan, states in zip(group, hidden, strict=True):
                quality = quality_of(Reference(base.head, states), windows, dense)
                assert quality.kl is not None
                known[plan.content_hash] = quality.kl
            replace_text(path, json.dumps({"key": key, "divergences": known}) + "\n")
    return known


def storages(plan: PruningPlan, bits: int = 16) -> str | list[str]:
    """How the weights under a plan are stored, as of `masked_hidden`: in `bits`, unless the plan
    says it of each layer."""
    if plan.layer_bits:
        return [STORAGES[own] for own in plan.layer_bits]
    return STORAGES[bits]


def _remembered(path: Path, key: dict[str, Any]) -> dict[str, float]:
    """Divergences by plan of the same model and text; none if the file is another's or damaged."""
    try:
        found = read_json(path)
        divergences = found["divergences"] if found["key"] == key else {}
        return {str(name): float(value) for name, value in divergences.items()}
    except (InputError, OSError, AttributeError, KeyError, TypeError, ValueError):
        return {}
