"""The rules that planner auto measures. `CANDIDATES` is open: one line adds a rule of a user's own.

They differ in what they look at and in how they divide, so that where one fails another does not;
all others of `RULES` are near one of these.
"""

import dataclasses
from collections.abc import Mapping
from typing import TypeVar

from moe_jax.errors import InputError
from pruning.budget.rule import Rule
from pruning.budget.rules import RULES
from pruning.recipe.options import PlanOptions
from pruning.recipe.plan_options import RULE

CANDIDATES: dict[str, Rule] = {
    "fair-shapley": RULES["fair-shapley"],  # the usual rule
    "fair2-shapley": RULES["fair2-shapley"],
    "paper-shapley": RULES["paper-shapley"],
    "paper-act": RULES["paper-act"],
    "maxmin-act": RULES["maxmin-act"],
    "hull-fair-energy": RULES["hull-fair-energy"],
    "hull-fair-obs": RULES["hull-fair-obs"],  # repair's own selection
    "uniform-energy": RULES["uniform-energy"],
}
# Widths of a recipe that hold a rule of one width for all as a special case.
WIDER = frozenset({"uniform", "layer", "free"})

Given = TypeVar("Given", bound=PlanOptions)


def candidate_name(name: str, rule: Rule, options: PlanOptions) -> str:
    """A candidate's name, with what the recipe names instead of what the rule chooses."""
    changed = {one: getattr(options, one) for one in options.named}
    changed = {one: v for one, v in changed.items() if v != getattr(rule.options, one)}
    return " ".join([name, *(f"{one}={value}" for one, value in changed.items())])


def candidate(rule: Rule, options: Given, collected: frozenset[str]) -> Given:
    """A recipe's own options under a rule: what it names of a rule holds, the rest is the rule's.

    Budget, blocks, emptied experts and what else any plan must keep to are the recipe's. A rule of
    one width for all keeps it where the recipe's width allows for that.

    Args:
      rule: an entry of `CANDIDATES`.
      options: of a recipe whose planner is auto.
      collected: statistics beyond the forward sums, names of `GROUPS`.

    Raises:
      InputError: the rule has another width, needs what is not collected or no recipe can say, or
        contradicts the rest.
    """
    if rule.prepare is not None:
        raise InputError("it fixes experts beforehand, for which a recipe has no option")
    said: Mapping[str, object] = {
        name: getattr(options if name in options.named else rule.options, name) for name in RULE
    }
    width = rule.options.width or options.width
    if width != options.width and not (width == "uniform" and options.width in WIDER):
        raise InputError(f"it has width {width}, the recipe asks for {options.width}")
    changed = {**said, "planner": rule.options.used_planner, "width": width}
    asked = dataclasses.replace(rule, options=dataclasses.replace(rule.options, **said))
    if missing := sorted(asked.needs - collected):
        raise InputError(f"it needs statistics of --{missing[0]}, which were not collected")
    return dataclasses.replace(options, **changed)
