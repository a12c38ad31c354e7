"""Plans of a sweep with the sizes of their exports and the losses that were measured."""

from collections.abc import Mapping, Sequence

import numpy as np

from convert.checkpoint import Checkpoint
from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import ResolvedRecipe
from pruning.report.rates import Sweep, SweepPoint
from pruning.scores.criteria import channel_scores
from pruning.scores.statistics import ChannelStatistics
from pruning.stages.sizes import export_sizes


def sweep_of(
    recipe: ResolvedRecipe,
    rates: Sequence[float],
    plans: Sequence[PruningPlan],
    statistics: ChannelStatistics,
    base: Checkpoint,
    quality: Mapping[float | None, dict[str, dict]] | None = None,
) -> Sweep:
    """Sizes, coverage and losses of the plans of a sweep.

    Args:
      recipe: resolved; its exports are those whose sizes are predicted.
      rates: prune rate of every plan.
      plans: one per rate.
      statistics: what the plans were made from.
      base: the dense model.
      quality: by rate, and None for the dense model: text -> nll, perplexity, tokens, kl, top1.

    Returns:
      The sweep, rates rising.
    """
    channel = channel_scores(
        statistics,
        criterion=recipe.used_criterion,
        attribution=recipe.used_attribution,
        seed=recipe.seed,
    ).channel

    def point(rate: float | None, plan: PruningPlan) -> SweepPoint:
        sizes = export_sizes(base.about, plan, recipe)
        return SweepPoint(
            rate=rate or 0.0,
            kept=int(plan.counts.sum()),
            coverage=float(plan.layer_coverage(channel).mean()),
            sizes={name: size["bytes"] for name, size in sizes.items()},
            quality=dict(quality[rate]) if quality else {},
        )

    whole = PruningPlan(np.ones_like(plans[0].keep), plans[0].layer_indices)
    order = sorted(zip(rates, plans, strict=True), key=lambda pair: pair[0])
    return Sweep(recipe.used_criterion, point(None, whole), tuple(point(*pair) for pair in order))
