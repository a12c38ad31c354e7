"""Plans for several budgets whose kept channels contain each other."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from moe_jax.errors import InputError
from pruning.budget.decide import plan_pruning
from pruning.budget.plan import PruningPlan

if TYPE_CHECKING:
    from pruning.scores.statistics import ChannelStatistics


def nested_plans(
    statistics: "ChannelStatistics", rates: Sequence[float], **options: Any
) -> list[PruningPlan]:
    """Plan the largest budget first, and every further one within the one before.

    Without alignment the planners are nested by themselves and this changes nothing. Alignment is
    not: a larger budget can round an expert down that a smaller one rounds up. Then every plan but
    the largest may differ from the one its rate would get alone; its provenance says so.

    Args:
      statistics: sums of a calibration sweep.
      rates: prune rates, in any order.
      **options: of `plan_pruning`, except the budget and `within`.

    Returns:
      One plan per rate, in the order given. Each has `nested_in`, the next smaller rate (none for
      the smallest), and `nested_alike`, whether it equals the plan of its rate alone.

    Raises:
      InputError: no rate, a rate twice, options that are infeasible for one of the rates, or a
        choice that cannot be nested, such as a list of experts.
    """
    if not rates or len(set(rates)) != len(rates):
        raise InputError(f"rates={list(rates)} must be one or more different prune rates")
    for name in ("within", "prune_rate", "channels", "experts"):
        if options.get(name) is not None:
            raise InputError(f"{name} belongs to one plan; leave it to the sweep over rates")
    notes = dict(options.pop("provenance", None) or {})
    made: dict[float, PruningPlan] = {}
    larger: PruningPlan | None = None
    for rate in sorted(rates):
        alone = plan_pruning(statistics, prune_rate=rate, **options)
        plan = alone
        if larger is not None and (alone.counts > larger.counts).any():
            plan = plan_pruning(statistics, prune_rate=rate, within=larger.counts, **options)
        outer = None if larger is None else larger.provenance["prune_rate"]
        record = {"nested_in": outer, "nested_alike": plan is alone}
        larger = dataclasses.replace(plan, provenance={**plan.provenance, **record, **notes})
        made[rate] = larger
    return [made[rate] for rate in rates]
