"""Attribution-guided channel pruning of Mixture-of-Experts models."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruning.attribution import collect_statistics
    from pruning.calibration import TextSource, TokenBatch, calibration_batch
    from pruning.criteria import ChannelScores, channel_scores
    from pruning.pipeline import compress
    from pruning.plan import PruningPlan, plan_pruning
    from pruning.prune import PrunedSource, mask_layer, prune_layer
    from pruning.recipe import CompressionRecipe, load_recipe
    from pruning.statistics import ChannelStatistics, load_statistics, save_statistics

__all__ = [
    "ChannelScores",
    "ChannelStatistics",
    "CompressionRecipe",
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
    "plan": ("PruningPlan", "plan_pruning"),
    "prune": ("PrunedSource", "mask_layer", "prune_layer"),
    "recipe": ("CompressionRecipe", "load_recipe"),
    "statistics": ("ChannelStatistics", "load_statistics", "save_statistics"),
}


def __getattr__(name: str):
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pruning.{module}"), name)
    raise AttributeError(f"module 'pruning' has no attribute {name!r}")
