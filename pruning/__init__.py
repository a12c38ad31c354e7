"""Attribution-guided channel pruning of Mixture-of-Experts models."""

from typing import TYPE_CHECKING

from pruning.attribution import collect_statistics
from pruning.calibration import TextSource, TokenBatch, calibration_batch
from pruning.criteria import ChannelScores, channel_scores
from pruning.plan import PruningPlan, plan_pruning
from pruning.prune import PrunedSource, mask_layer, prune_layer
from pruning.recipe import CompressionRecipe, load_recipe
from pruning.statistics import ChannelStatistics, load_statistics, save_statistics

if TYPE_CHECKING:
    from pruning.pipeline import compress

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


def __getattr__(name: str):
    # `compress` brings plots and converters along; `--help` and the method files do not pay for it.
    if name == "compress":
        from pruning.pipeline import compress

        return compress
    raise AttributeError(f"module 'pruning' has no attribute {name!r}")
