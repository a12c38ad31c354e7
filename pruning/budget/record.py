"""What a plan says about itself beside the channels it keeps."""

import importlib.metadata
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from pruning.budget.importance import WEIGHTS
from pruning.budget.optimum import (
    best_known,
    block_values,
    coverage_by_blocks,
    weighted_coverage,
)
from pruning.budget.problem import Problem, Widths

if TYPE_CHECKING:
    from pruning.scores.statistics import ChannelStatistics

# What a plan says about itself under the names that a recipe has for it.
RECORDED = (
    "criterion", "attribution", "planner", "width", "cap", "expert_rate", "align", "per_layer",
    "emptied", "seed",
)  # fmt: skip
RECORDED_OPTIONS = ("weights", "rho_max", "layer_loss", "smoothing", "passes")
# An expert with fewer routed tokens has sums too noisy to be ranked by.
STARVED_TOKENS = 32


def coverage_record(problem: Problem, widths: Widths) -> dict[str, float]:
    """Coverage wanted by the planner, after alignment, and of the best aligned plan known."""
    # Under the planner's weights, so that before, after and optimum compare.
    name = problem.options.weights or problem.objective[1]
    weights = WEIGHTS[name](problem.scores, problem.options)
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
    widths: Widths,
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
    told = {name: said[name] for name in RECORDED if said.get(name) is not None}
    options = said.get("planner_options") or {}
    told |= {name: options[name] for name in RECORDED_OPTIONS if options.get(name) is not None}
    rates = said.get("layer_rates") or {}
    return told | {"layer_rate": [f"{layer}={rate}" for layer, rate in rates.items()]}
