"""Attribution-guided channel pruning of Mixture-of-Experts models."""

from typing import TYPE_CHECKING

from moe_jax.facade import lazy_face

if TYPE_CHECKING:
    from pruning.budget.budgets import nested_plans
    from pruning.budget.decide import plan_pruning
    from pruning.budget.importance import PlannerOptions
    from pruning.budget.plan import PruningPlan
    from pruning.budget.targets import plan_for_target
    from pruning.kit.progress import Steps
    from pruning.measure.quality import Quality
    from pruning.recipe.recipe import CompressionRecipe, load_recipe
    from pruning.report import figures as plots
    from pruning.runs.apply import apply_plan
    from pruning.runs.compress import compress
    from pruning.scores.collect import collect_statistics, collect_weights
    from pruning.scores.criteria import ChannelScores, channel_scores
    from pruning.scores.statistics import ChannelStatistics, load_statistics, save_statistics
    from pruning.shrink.prune import PrunedSource, mask_layer, prune_layer
    from pruning.shrink.rounding import QuantizedSource
    from pruning.stages.job import export, open_job
    from pruning.stages.sizes import form_of
    from pruning.text.calibration import TextSource, TokenBatch, calibration_batch
    from pruning.text.windows import make_windows

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
    "runs.apply": ("apply_plan",),
    "scores.collect": ("collect_statistics", "collect_weights"),
    "text.calibration": ("TextSource", "TokenBatch", "calibration_batch"),
    "scores.criteria": ("ChannelScores", "channel_scores"),
    "measure.quality": ("Quality",),
    "text.windows": ("make_windows",),
    "runs.compress": ("compress",),
    "budget.decide": ("plan_pruning",),
    "budget.plan": ("PruningPlan",),
    "kit.progress": ("Steps",),
    "shrink.prune": ("PrunedSource", "mask_layer", "prune_layer"),
    "shrink.rounding": ("QuantizedSource",),
    "recipe.recipe": ("CompressionRecipe", "load_recipe"),
    "stages.sizes": ("form_of",),
    "stages.job": ("export", "open_job"),
    "scores.statistics": ("ChannelStatistics", "load_statistics", "save_statistics"),
    "budget.budgets": ("nested_plans",),
    "budget.targets": ("plan_for_target",),
    "budget.importance": ("PlannerOptions",),
}
__getattr__, __dir__ = lazy_face(__name__, _HOMES, {"plots": "report.figures"})
