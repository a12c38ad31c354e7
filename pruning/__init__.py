"""Attribution-guided channel pruning of Mixture-of-Experts models."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pruning import plots
    from pruning.apply_stage import apply_plan
    from pruning.calibration import TextSource, TokenBatch, calibration_batch
    from pruning.collect import collect_statistics, collect_weights
    from pruning.criteria import ChannelScores, channel_scores
    from pruning.evaluate import Quality, make_windows
    from pruning.pipeline import compress
    from pruning.plan import plan_pruning
    from pruning.plan_file import PruningPlan
    from pruning.progress import Steps
    from pruning.prune import PrunedSource, mask_layer, prune_layer
    from pruning.quantized import QuantizedSource
    from pruning.recipe import CompressionRecipe, load_recipe
    from pruning.sizes import form_of
    from pruning.stages import export, open_job
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
    "Quality",
    "QuantizedSource",
    "Steps",
    "TextSource",
    "TokenBatch",
    "apply_plan",
    "calibration_batch",
    "channel_scores",
    "collect_statistics",
    "collect_weights",
    "compress",
    "export",
    "form_of",
    "load_recipe",
    "load_statistics",
    "make_windows",
    "mask_layer",
    "nested_plans",
    "open_job",
    "plan_for_target",
    "plan_pruning",
    "plots",
    "prune_layer",
    "save_statistics",
]

# Names are imported when they are used: `--help` and the checks of options need no jax.
_HOMES = {
    "apply_stage": ("apply_plan",),
    "collect": ("collect_statistics", "collect_weights"),
    "calibration": ("TextSource", "TokenBatch", "calibration_batch"),
    "criteria": ("ChannelScores", "channel_scores"),
    "evaluate": ("Quality", "make_windows"),
    "pipeline": ("compress",),
    "plan": ("plan_pruning",),
    "plan_file": ("PruningPlan",),
    "progress": ("Steps",),
    "prune": ("PrunedSource", "mask_layer", "prune_layer"),
    "quantized": ("QuantizedSource",),
    "recipe": ("CompressionRecipe", "load_recipe"),
    "sizes": ("form_of",),
    "stages": ("export", "open_job"),
    "statistics": ("ChannelStatistics", "load_statistics", "save_statistics"),
    "sweep": ("nested_plans",),
    "targets": ("plan_for_target",),
    "weights": ("PlannerOptions",),
}


def __getattr__(name: str):
    if name == "plots":
        return importlib.import_module("pruning.plots")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"pruning.{module}"), name)
    raise AttributeError(f"module 'pruning' has no attribute {name!r}")
