"""What a plan says about itself beside the channels it keeps."""

import dataclasses
import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pruning.budget.importance import IMPORTANCE
from pruning.budget.optimum import (
    best_known,
    block_values,
    coverage_by_blocks,
    weighted_coverage,
)
from pruning.budget.problem import Allocation, Problem
from pruning.recipe.options import BUDGETS, PlanOptions, fields_of
from pruning.scores.expert_criteria import expert_criterion

if TYPE_CHECKING:
    from pruning.scores.statistics import ChannelStatistics

# An expert with fewer routed tokens has sums too noisy to be ranked by.
STARVED_TOKENS = 32


def plan_record(
    statistics: "ChannelStatistics",
    options: PlanOptions,
    problem: Problem,
    widths: Allocation,
    *,
    outliers: np.ndarray,  # [L, E, F]
    keep: np.ndarray,  # [L, E, F]
    indices: tuple[int, ...],
    experts_per_token: int,
    budget: int,
) -> dict[str, Any]:
    """The provenance of a plan: `options` filled in, what they led to, and what is remarkable.

    Values that decided nothing are None. The order is that of plan.json.
    """
    assert options.attribution
    kept = int(widths.counts.sum())
    rate = 1.0 - budget / keep.size if options.prune_rate is None else options.prune_rate
    return {
        "criterion": options.criterion,
        "attribution": options.attribution,
        "planner": None if options.width in ("uniform", "experts") else options.planner,
        "planner_options": dataclasses.asdict(problem.options),
        "width": options.width,
        "cap": options.cap,
        "expert_rate": options.expert_rate if options.width == "combined" else None,
        "prune_rate": rate,
        "align": options.align,
        "per_layer": options.per_layer,
        "block": options.block,
        "minimum": problem.least,
        "keep_experts": options.keep_experts,
        "grid": options.grid,
        "layer_rates": {str(layer): rate for layer, rate in options.layer_rates.items()},
        "experts_per_token": experts_per_token,
        "emptied": options.emptied,
        "seed": options.seed,
        "budget": budget,
        "kept": kept,
        "unspent": budget - kept,
        **expert_record(
            statistics, expert_criterion(options.attribution)(statistics), widths, indices
        ),
        **outlier_record(outliers, keep, indices),
        **coverage_record(problem, widths),
        "tool_version": tool_version(),
    }


def coverage_record(problem: Problem, widths: Allocation) -> dict[str, float]:
    """Coverage wanted by the planner, after alignment, and of the best aligned plan known."""
    # Under the planner's weights, so that before, after and optimum compare.
    name = problem.options.weights or problem.objective.weights
    weights = IMPORTANCE[name](problem.scores, problem.options)
    if not weights.any():
        weights = np.ones_like(weights)
    coverage = coverage_by_blocks(problem.scores.channel, 1)
    least, block = problem.least, problem.block
    room = problem.most // block
    optimum = block * best_known(
        block_values(coverage[:, :, ::block], weights),
        min(problem.budget // block, int(room.sum())),
        least=least // block,
        reserved=problem.reserved,
        most=room,
    )
    return {
        "coverage_before": weighted_coverage(coverage, weights, widths.unaligned),
        "coverage_aligned": weighted_coverage(coverage, weights, widths.counts),
        "coverage_optimum": weighted_coverage(coverage, weights, optimum),
    }


def expert_record(
    statistics: "ChannelStatistics",
    attributed: np.ndarray,  # [L, E]
    widths: Allocation,
    indices: tuple[int, ...],
) -> dict[str, Any]:
    """How many experts are emptied, harmful (negative attribution), or starved of tokens.

    Statistics of weights alone saw no text, so that no expert counts as starved.
    """
    starved = (np.asarray(statistics.tokens) < STARVED_TOKENS) & (statistics.total_tokens > 0)
    return {
        "emptied_experts": int((widths.counts == 0).sum()),
        "harmful_experts": int((attributed < 0.0).sum()),
        "starved_experts": [[indices[layer], int(e)] for layer, e in np.argwhere(starved)],
        "starved_share": float(starved.mean()),
    }


def outlier_record(
    outliers: np.ndarray,  # [L, E, F]
    keep: np.ndarray,  # [L, E, F]
    indices: tuple[int, ...],
) -> dict[str, Any]:
    """Super-channels as [layer, expert, channel], and how many a width policy could not keep."""
    return {
        "super_channels": [[indices[a], int(b), int(c)] for a, b, c in np.argwhere(outliers)],
        "super_channels_removed": int((outliers & ~keep).sum()),
    }


def tool_version() -> str:
    """Version of the installed package; a source tree that was never installed has none."""
    installed = importlib.metadata.distributions(name="moe-jax")
    return next((package.version for package in installed), "source tree")


def recorded_options(said: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a recipe that a plan's provenance states, all but budget, block and minimum."""
    names = fields_of(PlanOptions)
    beside = (*BUDGETS, "block", "minimum")
    told = {n: value for n, value in said.items() if n in names and n not in beside}
    options, rates = said.get("planner_options") or {}, said.get("layer_rates") or {}
    told |= {name: options[name] for name in names if name in options}
    told = {name: value for name, value in told.items() if value is not None}
    return told | {"layer_rate": [f"{layer}={rate}" for layer, rate in rates.items()]}
