"""Attribution-guided channel pruning of Mixture-of-Experts models."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruning.attribution import collect_statistics
    from pruning.calibration import TextSource, TokenBatch, calibration_batch
    from pruning.criteria import ChannelScores, channel_scores
    from pruning.pipeline import compress
    from pruning.plan import plan_pruning
    from pruning.plan_file import PruningPlan
    from pruning.prune import PrunedSource, mask_layer, prune_layer
    from pruning.recipe import CompressionRecipe, load_recipe
    from pruning.statistics import ChannelStatistics, load_statistics, save_statistics
    from pruning.sweep import nested_plans
    from pruning.targets import plan_for_target
    from pruning.weights import PlannerOptions

__all__ = [
    "ChannelScores",
    "ChannelStatistics",
    "CompressionRecipe",
    "PlannerOptions",
    "PrunedSource",
    "PruningPlan",
    "TextSource",
    "TokenBatch",
    "calibration_batch",
    "channel_scores",
    "collect_statistics",
    "compress",
    "load_recipe",
    "load_statistics",
    "mask_layer",
    "nested_plans",
    "plan_for_target",
    "plan_pruning",
    "prune_layer",
    "save_statistics",
]

# Names are imported when they are used: `--help` and the checks of options need no jax.
_HOMES = {
    "attribution": ("collect_statistics",),
    "calibration": ("TextSource", "TokenBatch", "calibration_batch"),
    "criteria": ("ChannelScores", "channel_scores"),
    "pipeline": ("compress",),
    "plan": ("plan_pruning",),
    "plan_file": ("PruningPlan",),
    "prune": ("PrunedSource", "mask_layer", "prune_layer"),
    "recipe": ("CompressionRecipe", "load_recipe"),
    "statistics": ("ChannelStatistics", "load_statistics", "save_statistics"),
    "sweep": ("nested_plans",),
    "targets": ("plan_for_target",),
    "weights": ("PlannerOptions",),
}


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pruning.{module}"), name)
    raise AttributeError(f"module 'pruning' has no attribute {name!r}")
