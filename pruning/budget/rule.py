"""What a rule of `compare` is, and its plan at a budget that all rules can keep exactly."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax.errors import InputError, choose
from pruning.budget.decide import plan_pruning
from pruning.budget.plan import PruningPlan
from pruning.budget.problem import Limits
from pruning.kit.errors import BudgetError
from pruning.recipe.options import PlanOptions
from pruning.scores.channel_criteria import CHANNEL_CRITERIA
from pruning.scores.expert_criteria import expert_criterion
from pruning.scores.statistics import ChannelStatistics

# (statistics, whole experts the budget pays for, experts per token) -> what is fixed beforehand.
Prepare = Callable[[ChannelStatistics, int, int], Limits]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to decide what stays.

    Attributes:
      about: what it is and where it comes from, one line.
      family: what it is compared with, a word for tables and colours.
      options: of the plan; budget, block and seed come from the comparison.
      prepare: what is fixed beforehand, computed from the statistics.
      prepare_needs: what `prepare` reads beyond the forward sums, names of `GROUPS`.
      seeds: how often it is run, once unless it is random.
    """

    about: str
    family: str
    options: PlanOptions
    prepare: Prepare | None = None
    prepare_needs: frozenset[str] = frozenset()
    seeds: tuple[int, ...] = (0,)

    @property
    def needs(self) -> frozenset[str]:
        """All that must be collected beyond the forward sums, names of `GROUPS`."""
        channel = choose(CHANNEL_CRITERIA, self.options.used_criterion, "criterion")
        expert = expert_criterion(self.options.used_attribution)
        details = ("expert-details",) if self.options.emptied == "mean" else ()
        found = {channel.needs, expert.needs, *details, *self.prepare_needs}
        return frozenset(name for name in found if name is not None)


def common_budget(shape: tuple[int, int, int], rate: float, block: int) -> int:
    """Channels that every rule can keep exactly, nearest to a prune rate.

    A multiple of a block in every expert (one width for all) and of a whole expert.

    Args:
      shape: L, E, F.
      rate: fraction to remove, in [0, 1).
      block: widths are multiples of it.

    Raises:
      InputError: nothing or everything would stay.
    """
    layers, experts, width = shape
    step = math.lcm(layers * experts * block, width)
    total = layers * experts * width
    budget = step * round((1.0 - rate) * total / step)
    if not 0 < budget < total:
        fits = ", ".join(f"{1 - n * step / total:.4g}" for n in range(1, total // step)[:8])
        raise InputError(
            f"prune_rate={rate} keeps {budget} of {total} channels when one width must suit all "
            f"experts; possible are {fits or 'none'}; choose one of these, or a smaller --block"
        )
    return budget


def make_plan(
    rule: Rule,
    statistics: ChannelStatistics,
    *,
    budget: int,
    block: int,
    experts_per_token: int,
    layer_indices: Sequence[int],
    seed: int = 0,
    notes: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """The plan of a rule, which keeps the budget to the channel.

    Args:
      rule: an entry of `pruning.budget.rules.RULES`.
      statistics: with what the rule needs.
      budget: channels to keep, from `common_budget`.
      block, seed: of the plan's options.
      experts_per_token, layer_indices, notes: see `plan_pruning`.

    Raises:
      BudgetError: the rule cannot keep this budget.
      InputError: statistics are missing.
    """
    kept = budget // statistics.shape[2]
    plan = plan_pruning(
        statistics,
        dataclasses.replace(rule.options, block=block, seed=seed),
        channels=budget,
        limits=rule.prepare(statistics, kept, experts_per_token) if rule.prepare else Limits(),
        experts_per_token=experts_per_token,
        layer_indices=layer_indices,
        notes=notes,
    )
    if plan.keep.sum() != budget:
        raise BudgetError(f"the rule keeps {plan.keep.sum()} channels instead of {budget}")
    return plan
