"""What a comparison measures: every rule at rates and at sizes, in 16 bits and in fewer."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from convert.export_format import STORAGES
from moe_jax.errors import InputError
from pruning.budget.rules import RULES
from pruning.recipe.options import PlanOptions
from pruning.recipe.values import check_rate, check_whole
from pruning.report.compared import AUTO, CHOSEN, UNPRUNED, Repaired
from pruning.runs.compared_sizes import (
    all_channels,
    budget_step,
    common_budgets,
    formats,
    most_channels,
)
from pruning.runs.compared_task import Task
from pruning.shrink.fewer_experts import Fewer
from pruning.stages.job import Job
from pruning.stages.sizes import dense_bytes

MOST_DRAWS = 100  # each is scored


@dataclasses.dataclass(frozen=True, kw_only=True)
class Controls:
    """What is varied beside the rules.

    Attributes:
      rates: prune rates; all rules keep the same number of channels at one.
      bits: of weights, 16 or fewer; of fewer there is a row without pruning too. `AUTO` is, at the
        sizes, a choice for each layer.
      target_bytes: sizes that each rule, in each of the bits, comes as near to as it can.
      target_factors: the same by how many times smaller than the model's files.
      repair: measure every plan repaired in this way as well.
      repaired: the rules whose plans are; () for all.
      chooses: whether what planner auto takes is among the rules.
      draws: how often the calibration text is drawn anew, for plans of their own.
      top_k: experts per token, fewer than the model's, of whole models in each of the bits.
      skip_below: the same, experts that weigh less than these shares of a token's best skipped.
      sets: other calibration texts, the files of each by its name.
      merges: names of `MERGES`, at the same rates.
      cut_router: measure rules that drop whole experts with the dropped ones' rows of the router
        gone as well.
    """

    rates: Sequence[float] = ()
    bits: Sequence[int] = (16,)
    target_bytes: Sequence[int] = ()
    target_factors: Sequence[float] = ()
    repair: Repaired = ""
    repaired: Sequence[str] = ()
    chooses: bool = False
    draws: int = 0
    top_k: Sequence[int] = ()
    skip_below: Sequence[float] = ()
    sets: Mapping[str, Sequence[str]] = dataclasses.field(default_factory=dict)
    merges: Sequence[str] = ()
    cut_router: bool = False

    def __post_init__(self) -> None:
        for rate in self.rates:
            check_rate("prune_rate", rate)
        known = (*STORAGES, AUTO)
        if not self.bits or (wrong := [one for one in self.bits if one not in known]):
            raise InputError(f"bits={wrong if self.bits else []} must be some of 16, 8, 4 and auto")
        if self.has_auto and not (self.target_bytes or self.target_factors):
            raise InputError(
                "bits 'auto' are those of the least loss within a size; give one with "
                "--target-bytes or --target-factor"
            )
        if self.has_auto and (self.draws or self.sets):
            raise InputError(
                "bits 'auto' are measured on one calibration text; leave out --draws and "
                "--calibration-sets"
            )
        if self.chooses and (self.draws or self.sets):
            raise InputError(
                f"rule {CHOSEN!r} is chosen on one calibration text; leave out --draws and "
                "--calibration-sets"
            )
        if self.chooses and (self.target_bytes or self.target_factors):
            raise InputError(
                f"rule {CHOSEN!r} is chosen at prune rates, not at sizes; leave out --target-bytes "
                "and --target-factor"
            )
        if self.draws == 1 or not 0 <= self.draws <= MOST_DRAWS:
            raise InputError(
                f"draws={self.draws} must lie in [2, {MOST_DRAWS}], of which an error can be told; "
                "choose 3, or leave it away"
            )
        if self.draws and self.sets:
            raise InputError("draws are of one calibration text; leave out --calibration-sets")
        for size in self.target_bytes:  # their ranges are those of a plan
            PlanOptions(target_bytes=size)
        for factor in self.target_factors:
            PlanOptions(target_factor=factor)
        for k in self.top_k:
            check_whole("top_k", k, 1)
        for share in self.skip_below:
            if not share:
                raise InputError("skip_below=0 skips no expert; choose e.g. 0.1")
            Fewer(1, share)
        if self.merges and not self.rates:
            raise InputError("experts are merged at prune rates; add --prune-rate, e.g. 0.25 0.5")

    @property
    def has_auto(self) -> bool:
        """Whether each layer gets bits of its own."""
        return AUTO in self.bits

    @property
    def keeps_out(self) -> bool:
        """Whether something is decided on windows that are kept out of the calibration text."""
        return self.has_auto or self.chooses

    @property
    def stored(self) -> tuple[int, ...]:
        """Bits of weights that are stored by some plan."""
        return tuple(STORAGES) if self.has_auto else tuple(self.bits)

    @property
    def rounds(self) -> bool:
        """Whether some weights are rounded."""
        return any(bits < 16 for bits in self.stored)

    def fewer(self, experts_per_token: int) -> list[Fewer]:
        """All that is asked of where tokens go.

        Raises:
          InputError: no fewer experts than the model has for a token.
        """
        for k in self.top_k:
            if k >= experts_per_token:
                raise InputError(
                    f"top_k={k} must lie in [1, {experts_per_token - 1}], because a token of this "
                    f"model goes to {experts_per_token} experts"
                )
        if self.skip_below and experts_per_token == 1:
            raise InputError("a token of this model goes to one expert, so --skip-below skips none")
        found = [Fewer(k) for k in self.top_k]
        found += [Fewer(experts_per_token, share) for share in self.skip_below]
        return list(dict.fromkeys(found))

    def targets(self, job: Job) -> list[int]:
        """Bytes to keep to, those of factors among them."""
        whole = dense_bytes(job.base.about) if self.target_factors else 0
        given = [*self.target_bytes, *(int(whole / factor) for factor in self.target_factors)]
        return list(dict.fromkeys(given))


def tasks(job: Job, names: Sequence[str], controls: Controls) -> dict[Task, int]:
    """All that is measured, each with the channels that it keeps; 0 where nothing is small enough.

    Args:
      job: opened and resolved for all of the bits.
      names: of rules.
      controls: what is varied beside them.

    Raises:
      InputError: a rate that no budget suits, or a size that nothing comes down to.
    """
    repairs: tuple[Repaired, ...] = ("", controls.repair) if controls.repair else ("",)
    whole, budgets = all_channels(job), common_budgets(job, controls.rates)
    choices = controls.fewer(job.base.config.moe.experts_per_token)
    # What the dense model loses is known, but not what a token reads of it.
    equal = [one for one in controls.bits if one != AUTO]
    found = {Task(UNPRUNED, 0.0, bits=one): whole for one in equal if one < 16 or choices}
    for choice in map(dataclasses.asdict, choices):
        found |= {Task(UNPRUNED, 0.0, bits=bits, **choice): whole for bits in equal}
    for how in repairs:
        own = [name for name in names if not how or name in (controls.repaired or names)]
        for rate, budget in budgets.items():
            for name in own:
                for seed in _seeds(name):
                    found |= {Task(name, rate, seed, how, bits): budget for bits in equal}
        for target in controls.targets(job):
            for bits in equal:
                found |= _at_target(job, own, target, bits, how)
            if controls.has_auto:
                alone = [name for name in own if len(_seeds(name)) == 1]
                found |= {Task(name, 0.0, 0, how, AUTO, target): 0 for name in alone}
    again = {task: budget for task, budget in found.items() if task.rule != UNPRUNED}
    others: list[dict[str, Any]] = [{"draw": 1 + number} for number in range(controls.draws)]
    for text in (*others, *({"calibration": name} for name in controls.sets)):
        found |= {dataclasses.replace(one, **text): budget for one, budget in again.items()}
    if controls.cut_router:
        dropping = droppers(names)
        of_text = {
            task: budget
            for task, budget in again.items() if not task.repair and task.bits != AUTO
        }  # fmt: skip
        found |= {
            dataclasses.replace(task, cut=True): budget
            for task, budget in of_text.items() if task.rule in dropping
        }  # fmt: skip
    for rate, budget in budgets.items():
        for name in controls.merges:
            found |= {Task(name, rate, bits=bits): budget for bits in equal}
    return found


def droppers(names: Sequence[str]) -> list[str]:
    """The rules that drop whole experts and put nothing in their place.

    Raises:
      InputError: none does.
    """
    found = [
        name for name in names
        if name != CHOSEN
        and (own := RULES[name].options).width == "experts" and own.emptied == "zero"
    ]  # fmt: skip
    if not found:
        raise InputError(
            "--cut-router removes the router's rows of dropped experts, and none of the --rules "
            "drops whole experts; name one, such as experts-reap-layer, or leave it away"
        )
    return found


def _seeds(name: str) -> tuple[int, ...]:
    return (0,) if name == CHOSEN else RULES[name].seeds


def _at_target(
    job: Job, names: Sequence[str], target: int, bits: int, how: Repaired
) -> dict[Task, int]:
    whole, form = all_channels(job), formats(job, [bits])[bits]

    @functools.cache
    def most(step: int) -> int:
        return most_channels(job, form, target, step)

    if most(whole) == whole:
        return {Task(UNPRUNED, 0.0, 0, "", bits, target): whole}
    found = {}
    for name in names:
        budget = most(budget_step(job, RULES[name]))
        rate = round(1.0 - budget / whole, 6)
        for seed in RULES[name].seeds:
            found[Task(name, rate, seed, how, bits, target)] = budget
    return found
