"""Attribution-guided channel pruning of Mixture-of-Experts models.

What a user of Python calls: `compress`, `score`, `evaluate`, `verify`, `audit`, `compare`, `paper`,
`estimate`, `apply`, `recover`, each the command of its name; `CompressionRecipe` says what to do.
The registries, in capitals, are open: add a name.
"""

from typing import TYPE_CHECKING

from moe_jax.errors import InputError
from moe_jax.facade import lazy_face

if TYPE_CHECKING:
    from pruning.budget import objectives, planners
    from pruning.budget.candidates import CANDIDATES
    from pruning.budget.decide import plan_pruning
    from pruning.budget.importance import IMPORTANCE, PlannerOptions, smooth_layer_loss
    from pruning.budget.merging import MERGES, MergeRule
    from pruning.budget.plan import PruningPlan
    from pruning.budget.planners import PLANNERS
    from pruning.budget.problem import Limits, Objective, Planner, Problem
    from pruning.budget.rule import Rule
    from pruning.budget.rules import RULES
    from pruning.budget.several_budgets import nested_plans, plan_for_target
    from pruning.kit.errors import VerificationError
    from pruning.kit.progress import Steps
    from pruning.measure.agreement import sample_ablations, spearman
    from pruning.measure.loss_curves import expert_loss_curves
    from pruning.measure.quality import Quality, measure_quality
    from pruning.measure.tokens import TokenView, view_tokens
    from pruning.recipe.options import PlanOptions
    from pruning.recipe.paper_options import PaperOptions
    from pruning.recipe.place_options import PlaceOptions
    from pruning.recipe.recipe import CompressionRecipe, load_recipe
    from pruning.recipe.recover_options import RecoverOptions
    from pruning.report import audit_figures as audit_plots
    from pruning.report import comparison_page as comparison_plots
    from pruning.report import figures as plots
    from pruning.report import recovery as recovery_plots
    from pruning.report.comparison import Comparison
    from pruning.report.compression import CompressionReport
    from pruning.report.recovery import RecoveryReport
    from pruning.runs.apply import apply, apply_plan
    from pruning.runs.audit import audit
    from pruning.runs.compare import compare
    from pruning.runs.compress import compress
    from pruning.runs.estimate import estimate
    from pruning.runs.evaluate import evaluate
    from pruning.runs.export import export_folder
    from pruning.runs.health import generation_health
    from pruning.runs.paper import paper
    from pruning.runs.plan import plan_folder
    from pruning.runs.recover import recover
    from pruning.runs.score import score
    from pruning.runs.tasks import evaluate_tasks
    from pruning.runs.verify import verify
    from pruning.scores.ablation import Ablation, ablate
    from pruning.scores.channel_criteria import CHANNEL_CRITERIA, Criterion
    from pruning.scores.collect import collect_statistics, collect_weights
    from pruning.scores.criteria import ChannelScores, channel_scores
    from pruning.scores.expert_criteria import EXPERT_CRITERIA
    from pruning.scores.own import STATISTICS, HiddenRows, Statistic
    from pruning.scores.statistics import ChannelStatistics, load_statistics, save_statistics
    from pruning.scores.weight_gradient import weight_gradient_scores
    from pruning.shrink.prune import PrunedSource, mask_layer, prune_layer
    from pruning.shrink.rounding import QuantizedSource
    from pruning.stages.export import export
    from pruning.stages.job import open_job
    from pruning.stages.sizes import form_of
    from pruning.text.calibration import TokenBatch, calibration_batch
    from pruning.text.source import TextSource
    from pruning.text.windows import make_windows

__all__ = [
    "CANDIDATES",
    "CHANNEL_CRITERIA",
    "EXPERT_CRITERIA",
    "IMPORTANCE",
    "MERGES",
    "PLANNERS",
    "RULES",
    "STATISTICS",
    "Ablation",
    "ChannelScores",
    "ChannelStatistics",
    "Comparison",
    "CompressionRecipe",
    "CompressionReport",
    "Criterion",
    "HiddenRows",
    "InputError",
    "Limits",
    "MergeRule",
    "Objective",
    "PaperOptions",
    "PlaceOptions",
    "PlanOptions",
    "Planner",
    "PlannerOptions",
    "Problem",
    "PrunedSource",
    "PruningPlan",
    "Quality",
    "QuantizedSource",
    "RecoverOptions",
    "RecoveryReport",
    "Rule",
    "Statistic",
    "Steps",
    "TextSource",
    "TokenBatch",
    "TokenView",
    "VerificationError",
    "ablate",
    "apply",
    "apply_plan",
    "audit",
    "audit_plots",
    "calibration_batch",
    "channel_scores",
    "collect_statistics",
    "collect_weights",
    "compare",
    "comparison_plots",
    "compress",
    "estimate",
    "evaluate",
    "evaluate_tasks",
    "expert_loss_curves",
    "export",
    "export_folder",
    "form_of",
    "generation_health",
    "load_recipe",
    "load_statistics",
    "make_windows",
    "mask_layer",
    "measure_quality",
    "nested_plans",
    "objectives",
    "open_job",
    "paper",
    "plan_folder",
    "plan_for_target",
    "plan_pruning",
    "planners",
    "plots",
    "prune_layer",
    "recover",
    "recovery_plots",
    "sample_ablations",
    "save_statistics",
    "score",
    "smooth_layer_loss",
    "spearman",
    "verify",
    "view_tokens",
    "weight_gradient_scores",
]

# Names are imported when they are used: `--help` and the checks of options need no jax.
_HOMES = {
    "budget.candidates": ("CANDIDATES",),
    "budget.several_budgets": ("nested_plans", "plan_for_target"),
    "budget.decide": ("plan_pruning",),
    "budget.importance": ("IMPORTANCE", "PlannerOptions", "smooth_layer_loss"),
    "budget.merging": ("MERGES", "MergeRule"),
    "budget.plan": ("PruningPlan",),
    "budget.planners": ("PLANNERS",),
    "budget.problem": ("Limits", "Objective", "Planner", "Problem"),
    "budget.rule": ("Rule",),
    "budget.rules": ("RULES",),
    "kit.errors": ("VerificationError",),
    "kit.progress": ("Steps",),
    "measure.agreement": ("sample_ablations", "spearman"),
    "measure.loss_curves": ("expert_loss_curves",),
    "measure.quality": ("Quality", "measure_quality"),
    "measure.tokens": ("TokenView", "view_tokens"),
    "recipe.options": ("PlanOptions",),
    "recipe.paper_options": ("PaperOptions",),
    "recipe.place_options": ("PlaceOptions",),
    "recipe.recipe": ("CompressionRecipe", "load_recipe"),
    "report.comparison": ("Comparison",),
    "recipe.recover_options": ("RecoverOptions",),
    "report.compression": ("CompressionReport",),
    "report.recovery": ("RecoveryReport",),
    "runs.apply": ("apply", "apply_plan"),
    "runs.audit": ("audit",),
    "runs.compare": ("compare",),
    "runs.compress": ("compress",),
    "runs.estimate": ("estimate",),
    "runs.evaluate": ("evaluate",),
    "runs.export": ("export_folder",),
    "runs.paper": ("paper",),
    "runs.plan": ("plan_folder",),
    "runs.recover": ("recover",),
    "runs.score": ("score",),
    "runs.health": ("generation_health",),
    "runs.tasks": ("evaluate_tasks",),
    "runs.verify": ("verify",),
    "scores.ablation": ("Ablation", "ablate"),
    "scores.channel_criteria": ("CHANNEL_CRITERIA", "Criterion"),
    "scores.collect": ("collect_statistics", "collect_weights"),
    "scores.criteria": ("ChannelScores", "channel_scores"),
    "scores.expert_criteria": ("EXPERT_CRITERIA",),
    "scores.own": ("STATISTICS", "HiddenRows", "Statistic"),
    "scores.statistics": ("ChannelStatistics", "load_statistics", "save_statistics"),
    "scores.weight_gradient": ("weight_gradient_scores",),
    "shrink.prune": ("PrunedSource", "mask_layer", "prune_layer"),
    "shrink.rounding": ("QuantizedSource",),
    "stages.export": ("export",),
    "stages.job": ("open_job",),
    "stages.sizes": ("form_of",),
    "text.calibration": ("TokenBatch", "calibration_batch"),
    "text.source": ("TextSource",),
    "text.windows": ("make_windows",),
}
_MODULES = {
    "audit_plots": "report.audit_figures",
    "comparison_plots": "report.comparison_page",
    "objectives": "budget.objectives",
    "planners": "budget.planners",
    "plots": "report.figures",
    "recovery_plots": "report.recovery",
}
__getattr__, _ = lazy_face(__name__, _HOMES, _MODULES)


def __dir__() -> list[str]:
    return __all__
