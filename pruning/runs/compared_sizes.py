"""Formats, channels and bytes of the plans of a comparison."""

import bisect
import dataclasses
import math
from collections.abc import Sequence

from convert.export import Export
from convert.export_format import FORMATS, MIXED, STORAGES, ExportFormat, FormatName
from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.budget.rule import Rule, common_budget
from pruning.recipe.recipe import CompressionRecipe, ResolvedRecipe
from pruning.stages.bit_curves import whole_plan
from pruning.stages.job import Job, resolved
from pruning.stages.size_bounds import byte_range
from pruning.stages.sizes import export_of, form_of


def rounded_recipe(job: Job, recipe: CompressionRecipe, stored: Sequence[int]) -> ResolvedRecipe:
    """The recipe of a job whose plans are rounded too: group size and blocks suit fewer bits.

    Args:
      job: opened for 16 bits.
      recipe: as it was given.
      stored: bits of weights that some plan has.

    Raises:
      InputError: the model has no such format, stores codes that exports would take over, or a
        group of weights would be incomplete.
    """
    base, names = job.base.about, formats(job, stored)
    given = dataclasses.replace(
        recipe, model=job.recipe.model, bits=min(stored), export=tuple(names.values()),
        planner=job.recipe.planner, repair="none",
    )  # fmt: skip
    found = resolved(given, base)
    for name in names.values():
        if export_of(base, whole_plan(job), form_of(found, name)).native is not None:
            raise InputError(
                f"{base.folder} stores its weights in few bits, whose codes {name} takes over: "
                "rounding them would be another model; compare with --bits 16"
            )
    return dataclasses.replace(
        job.recipe, group_size=found.group_size, block=found.block, minimum=found.minimum
    )


def formats(job: Job, bits: Sequence[int]) -> dict[int, FormatName]:
    """The format of each number of bits, that with a width per expert if there is one.

    Raises:
      InputError: the model's family has none.
    """
    found: dict[int, FormatName] = {}
    known = job.base.about.family.formats
    for one in bits:
        fitting: list[FormatName] = [
            n for n in FORMATS if n in known and ExportFormat(n).storage == STORAGES[one]
        ]
        if not fitting:
            raise InputError(
                f"bits={one} is no format of this model's family, which has {', '.join(known)}; "
                "leave it out of --bits"
            )
        found[one] = fitting[0]
    return found


def written(job: Job, plan: PruningPlan, bits: int) -> Export:
    """The folder that a plan would be written as."""
    name = MIXED if plan.layer_bits else formats(job, [bits])[bits]
    return export_of(job.base.about, plan, form_of(job.recipe, name, plan))


def most_channels(job: Job, form: FormatName, target: int, step: int) -> int:
    """Most channels, in steps, that a folder of so many bytes surely holds; 0 if none."""

    def is_too_large(steps: int) -> bool:
        return byte_range(job.base.about, job.recipe, form, steps * step)[1] > target

    counts = range(1, all_channels(job) // step + 1)
    return step * bisect.bisect_left(counts, True, key=is_too_large)


def budget_step(job: Job, rule: Rule) -> int:
    """Channels by which a rule's budgets differ."""
    c, options = job.base.config, rule.options
    layers, experts = len(c.moe_layers), c.moe.num_experts
    if options.width == "uniform":
        return layers * experts * job.recipe.block
    if options.width == "experts":
        return c.moe.d_expert * (layers if options.per_layer else 1)
    return job.recipe.block


def all_channels(job: Job) -> int:
    """Channels of all experts of the dense model."""
    c = job.base.config
    return len(c.moe_layers) * c.moe.num_experts * c.moe.d_expert


def common_budgets(job: Job, rates: Sequence[float]) -> dict[float, int]:
    """Channels that all rules keep at each rate."""
    # By the rate that is really kept: two asked for may round to one.
    c = job.base.config
    shape = (len(c.moe_layers), c.moe.num_experts, c.moe.d_expert)
    found = {}
    for rate in rates:
        budget = common_budget(shape, rate, job.recipe.block)
        found[round(1.0 - budget / math.prod(shape), 6)] = budget
    return found
