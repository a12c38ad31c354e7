"""Attribution-guided channel pruning of Mixture-of-Experts models."""

from typing import TYPE_CHECKING

from moe_jax.facade import lazy_face

if TYPE_CHECKING:
    from pruning.budget import objectives, planners
    from pruning.budget.budgets import nested_plans, plan_for_target
    from pruning.budget.decide import plan_pruning
    from pruning.budget.importance import IMPORTANCE, PlannerOptions
    from pruning.budget.plan import PruningPlan
    from pruning.budget.planners import PLANNERS
    from pruning.budget.problem import Limits, Objective, Planner, Problem
    from pruning.budget.rule import Rule
    from pruning.budget.rules import RULES
    from pruning.kit.progress import Steps
    from pruning.measure.quality import Quality, make_windows
    from pruning.recipe.options import PlanOptions
    from pruning.recipe.recipe import CompressionRecipe, load_recipe
    from pruning.report import figures as plots
    from pruning.runs.apply import apply_plan
    from pruning.runs.compress import compress
    from pruning.scores.channel_criteria import CHANNEL_CRITERIA, Criterion
    from pruning.scores.collect import collect_statistics, collect_weights
    from pruning.scores.criteria import ChannelScores, channel_scores
    from pruning.scores.expert_criteria import EXPERT_CRITERIA
    from pruning.scores.own import STATISTICS, HiddenRows, Statistic
    from pruning.scores.statistics import ChannelStatistics, load_statistics, save_statistics
    from pruning.shrink.prune import PrunedSource, mask_layer, prune_layer
    from pruning.shrink.rounding import QuantizedSource
    from pruning.stages.job import export, open_job
    from pruning.stages.sizes import form_of
    from pruning.text.calibration import TextSource, TokenBatch, calibration_batch

__all__ = [
    "CHANNEL_CRITERIA",
    "EXPERT_CRITERIA",
    "IMPORTANCE",
    "PLANNERS",
    "RULES",
    "STATISTICS",
    "ChannelScores",
    "ChannelStatistics",
    "CompressionRecipe",
    "Criterion",
    "HiddenRows",
    "Limits",
    "Objective",
    "PlanOptions",
    "Planner",
    "PlannerOptions",
    "Problem",
    "PrunedSource",
    "PruningPlan",
    "Quality",
    "QuantizedSource",
    "Rule",
    "Statistic",
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
    "objectives",
    "open_job",
    "plan_for_target",
    "plan_pruning",
    "planners",
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
    "measure.quality": ("Quality", "make_windows"),
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
    "budget.budgets": ("nested_plans", "plan_for_target"),
    "budget.importance": ("IMPORTANCE", "PlannerOptions"),
    "budget.planners": ("PLANNERS",),
    "budget.problem": ("Limits", "Objective", "Planner", "Problem"),
    "budget.rule": ("Rule",),
    "budget.rules": ("RULES",),
    "recipe.options": ("PlanOptions",),
    "scores.channel_criteria": ("CHANNEL_CRITERIA", "Criterion"),
    "scores.expert_criteria": ("EXPERT_CRITERIA",),
    "scores.own": ("STATISTICS", "HiddenRows", "Statistic"),
}
__getattr__, __dir__ = lazy_face(
    __name__,
    _HOMES,
    {
        "plots": "report.figures",
        "objectives": "budget.objectives",
        "planners": "budget.planners",
    },
)
