"""What a pruning rule is, and its plan at a budget that all rules can keep exactly."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from moe_jax.errors import InputError
from pruning.budget.decide import PruningPlan, plan_pruning
from pruning.scores.statistics import ChannelStatistics

# (statistics, whole experts the budget pays for, experts per token) -> options of `plan_pruning`.
Prepare = Callable[[ChannelStatistics, int, int], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One way to decide what stays.

    Attributes:
      about: what it is and where it comes from, one line.
      family: what it is compared with, a word for tables and colours.
      options: arguments of `plan_pruning`.
      needs: names of `pruning.budget.rules.GROUPS` that must have been collected.
      prepare: further arguments, computed from the statistics.
      seeds: how often it is run, once unless it is random.
    """

    about: str
    family: str
    options: Mapping[str, Any]
    needs: frozenset[str] = frozenset()
    prepare: Prepare | None = None
    seeds: tuple[int, ...] = (0,)


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
    provenance: Mapping[str, Any] | None = None,
) -> PruningPlan:
    """The plan of a rule, which keeps the budget to the channel.

    Args:
      rule: an entry of `pruning.budget.rules.RULES`.
      statistics: with the groups that the rule needs.
      budget: channels to keep, from `common_budget`.
      block, experts_per_token, layer_indices, seed, provenance: see `plan_pruning`.

    Raises:
      InputError: the rule cannot keep this budget, or statistics are missing.
    """
    kept = budget // statistics.shape[2]
    more = rule.prepare(statistics, kept, experts_per_token) if rule.prepare else {}
    plan = plan_pruning(
        statistics,
        channels=budget,
        **{
            **rule.options,
            **more,
            "block": block,
            "experts_per_token": experts_per_token,
            "layer_indices": layer_indices,
            "seed": seed,
            "provenance": provenance,
        },
    )
    if plan.keep.sum() != budget:
        raise InputError(f"the rule keeps {plan.keep.sum()} channels instead of {budget}")
    return plan
