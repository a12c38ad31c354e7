"""The plan of channels and bits of all layers at once, by what each of them loses alone."""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from convert.export import Export
from convert.export_format import STORAGES
from convert.layout import Spec, weight_bytes
from convert.rules import layer_number
from pruning.budget.joint import cheapest, error_between
from pruning.budget.plan import PruningPlan
from pruning.kit.errors import BudgetError
from pruning.stages.bit_curves import (
    Curves,
    PlanAt,
    in_bits,
    joined_plan,
    made_plans,
    whole_plan,
)
from pruning.stages.job import Job
from pruning.stages.sizes import expert_widths

LEVELS = 64  # sizes of a rule, by its share of all channels, among which each layer chooses
# What the plan of one size says of its rule, which holds of the layers of several.
OF_RULE = ("criterion", "attribution", "planner", "planner_options", "width", "block", "minimum",
           "align", "emptied", "seed")  # fmt: skip
CORRECTIONS = 8  # bytes of headers are told of the whole, a layer's choice by its own


def joint_plan(
    job: Job,
    curves: Curves,
    plan_at: PlanAt,
    written: Callable[[PruningPlan], Export],
    target: int,
    step: int,
    *,
    also: Sequence[int] = (),
    least: float = 0.0,
    notes: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """Channels and bits of every layer, so that the errors of all add up to the least.

    Each layer takes what the rule leaves it at one of many sizes, and 4, 8 or 16 bits for all of
    its linear layers; so a plan of one size in the same bits throughout is among the choices.

    Args:
      job: with the dense model.
      curves, plan_at, step: of the rule.
      written: the folder that a plan would be written as.
      target: most bytes of that.
      also: further sizes to choose among, such as those of plans in one of the bits.
      least: share of a layer's channels that it keeps at least.
      notes: what the plan's provenance says beside what it is thought to lose.

    Returns:
      The plan, with its `layer_bits`.

    Raises:
      BudgetError: nothing is as small.
    """
    whole, layers = whole_plan(job), len(job.base)
    shares = [number / LEVELS for number in range(1, LEVELS)]
    made = made_plans(plan_at, whole.keep.size, shares, step, also)
    plans = [whole, *(plan for _, plan in made)]
    dense = written(in_bits(whole, 0, 16, layers))
    costs = {bits: _costs(dense, bits, plans) for bits in STORAGES}  # [N, M] each
    options = [(number, bits) for number in range(len(plans)) for bits in STORAGES]
    cost = np.array([costs[bits][:, number] for number, bits in options]).T  # [N, O]
    lost = _lost(curves, plans, layers)
    counts = np.array([plan.counts.sum(axis=1) for plan in plans]).T  # [L, M]
    lost[list(whole.layer_indices)] += np.where(counts < least * counts[:, :1], np.inf, 0.0)
    error = np.array([lost[:, number] + curves.rounding[bits] for number, bits in options]).T
    room = target - (dense.nbytes - int(costs[16][:, 0].sum()))
    for _ in range(CORRECTIONS):
        chosen = cheapest(list(cost), list(error), room) if room > 0 else []
        if not chosen:
            break
        taken = [options[place] for place in chosen]
        plan = joined_plan(plans, [taken[index][0] for index in whole.layer_indices])
        plan = dataclasses.replace(plan, layer_bits=tuple(bits for _, bits in taken))
        if (more := written(plan).nbytes - target) <= 0:
            foretold = float(error[np.arange(layers), chosen].sum())
            said = {**_told(plans[-1], notes), "foretold_divergence": foretold}
            return _within(plan, target, target + more, said)
        room -= more
    raise BudgetError(f"no channels and bits of all layers take at most {target} bytes")


def even_plans(
    job: Job,
    plan_at: PlanAt,
    written: Callable[[PruningPlan], Export],
    target: int,
    most: Mapping[int, int],
    *,
    notes: Mapping[str, Any] | None = None,
) -> list[PruningPlan]:
    """Plans of all layers in the same bits, which a joint one is to be better than.

    Args:
      job, plan_at, written, target, notes: as of `joint_plan`.
      most: bits -> channels that fit the target in them; 0 for none.
    """
    whole, layers, found = whole_plan(job), len(job.base), []
    for bits, channels in most.items():
        with contextlib.suppress(BudgetError):  # its rule does not keep that many
            plan = whole if channels == whole.keep.size else plan_at(channels) if channels else None
            if plan is None:
                continue
            said = _told(plan, notes)
            plan = dataclasses.replace(plan, layer_bits=(bits,) * layers)
            if (cost := written(plan).nbytes) <= target:
                found.append(_within(plan, target, cost, said))
    return found


def _told(plan: PruningPlan, notes: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a plan of several takes over from one of them."""
    return {**{n: v for n, v in plan.provenance.items() if n in OF_RULE}, **(notes or {})}


def _within(plan: PruningPlan, target: int, cost: int, said: dict[str, Any]) -> PruningPlan:
    about = {"prune_rate": 1.0 - plan.keep.mean().item(), "target": target,
             "target_unit": "bytes", "cost": cost}  # fmt: skip
    return dataclasses.replace(plan, provenance={**said, **about})


def _lost(curves: Curves, plans: Sequence[PruningPlan], layers: int) -> np.ndarray:  # [N, M]
    """What each layer of the model loses by the channels that each plan removes."""
    found = np.zeros((layers, len(plans)))
    for slot, index in enumerate(plans[0].layer_indices):
        kept = np.array([plan.counts[slot].sum() for plan in plans])
        found[index] = error_between(kept, curves.kept[slot], curves.error[slot])
    return found


def _costs(dense: Export, bits: int, plans: Sequence[PruningPlan]) -> np.ndarray:  # int64 [N, M]
    """Bytes of every layer under each plan, all of it in so many bits.

    Channels take the same space wherever they are, and every expert that has any the same beside.
    """
    base, indices = dense.base, plans[0].layer_indices
    experts, width = plans[0].keep.shape[1:]
    form = dense.form.like(storage=STORAGES[bits])
    narrow = min(form.step, width)

    def layer_bytes(count: int) -> np.ndarray:  # [N], all experts so wide
        counts = np.full((len(indices), experts), count)
        export = Export(base, expert_widths(counts, indices, base), form)
        specs: list[dict[str, Spec]] = [{} for _ in range(len(base))]
        for name, stored in export.tensors.items():
            if (layer := layer_number(name)) is not None:
                specs[layer] |= stored.specs(name, form)
        return np.array([weight_bytes(own) for own in specs])

    none, some, every = (layer_bytes(count)[:, None] for count in (0, narrow, width))
    of_channel = (every - some) / (experts * max(1, width - narrow))
    of_expert = (some - none) / experts - narrow * of_channel
    channels, opened = np.zeros((2, len(base), len(plans)))
    channels[list(indices)] = np.array([plan.counts.sum(axis=1) for plan in plans]).T
    opened[list(indices)] = np.array([(plan.counts > 0).sum(axis=1) for plan in plans]).T
    return np.ceil(none + of_expert * opened + of_channel * channels).astype(np.int64)
