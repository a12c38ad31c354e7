"""What a recipe and a rule each decide of a candidate of planner auto, and what it is called."""

import dataclasses

import pytest

from moe_jax.errors import InputError
from pruning.budget.candidates import CANDIDATES, candidate, candidate_name
from pruning.budget.rules import RULES
from pruning.recipe.options import PlanOptions

RECIPE = PlanOptions(planner="auto", width="free", prune_rate=0.5, block=8, minimum=16, seed=3,
                     emptied="mean", skip_layers=(2,))  # fmt: skip
# criterion, attribution, planner, alignment and, where the rule has one, width
SAID = {
    "fair-shapley": ("shapley", "ala", "fair", "paper", None),
    "fair2-shapley": ("shapley", "ala", "fair2", "paper", None),
    "paper-shapley": ("shapley", "ala", "paper", "paper", None),
    "paper-act": ("act", "ala", "paper", "paper", None),
    "maxmin-act": ("act", "ala", "maxmin", "paper", None),
    "hull-fair-energy": ("energy", "ala", "fair", "hull", None),
    "hull-fair-obs": ("obs", "ala", "fair", "hull", None),
    "uniform-energy": ("energy", "ala", "paper", "paper", "uniform"),
}


@pytest.mark.parametrize("name", CANDIDATES)
def test_a_candidate_is_the_recipe_under_the_rule(name):
    criterion, attribution, planner, align, width = SAID[name]
    found = candidate(CANDIDATES[name], RECIPE, frozenset({"obs"} if criterion == "obs" else ()))
    assert found == dataclasses.replace(
        RECIPE, criterion=criterion, attribution=attribution, planner=planner, align=align,
        width=width or "free",
    )  # fmt: skip
    assert candidate_name(name, CANDIDATES[name], RECIPE) == name


def test_what_the_recipe_names_of_a_rule_holds_and_stands_in_the_name():
    given = dataclasses.replace(RECIPE, criterion="energy", rho_max=0.9)
    rule = CANDIDATES["fair2-shapley"]
    found = candidate(rule, given, frozenset())
    assert (found.criterion, found.rho_max, found.planner) == ("energy", 0.9, "fair2")
    assert (
        candidate_name("fair2-shapley", rule, given) == "fair2-shapley criterion=energy rho_max=0.9"
    )
    same = dataclasses.replace(RECIPE, criterion="shapley")
    assert candidate_name("fair2-shapley", rule, same) == "fair2-shapley"


@pytest.mark.parametrize("width", ["uniform", "layer", "free", "capped", "experts", "combined"])
def test_one_width_for_all_stays_where_the_recipes_width_allows_for_it(width):
    more = {"capped": {"cap": 8}, "combined": {"expert_rate": 0.5}}.get(width, {})
    given = dataclasses.replace(RECIPE, width=width, **more)
    assert candidate(CANDIDATES["paper-act"], given, frozenset()).width == width
    if width in ("uniform", "layer", "free"):
        found = candidate(CANDIDATES["uniform-energy"], given, frozenset())
        assert found.width == "uniform"
        return
    with pytest.raises(InputError, match=f"has width uniform, the recipe asks for {width}"):
        candidate(CANDIDATES["uniform-energy"], given, frozenset())


def test_a_rule_of_another_width_than_one_for_all_is_not_taken():
    rule = CANDIDATES["paper-act"]
    layer = dataclasses.replace(rule, options=dataclasses.replace(rule.options, width="layer"))
    with pytest.raises(InputError, match="has width layer, the recipe asks for free"):
        candidate(layer, RECIPE, frozenset())


def test_what_a_rule_needs_must_have_been_collected():
    rule = CANDIDATES["paper-act"]
    needy = dataclasses.replace(rule, options=dataclasses.replace(rule.options, criterion="fisher"))
    with pytest.raises(InputError, match="statistics of --gradients, which were not collected"):
        candidate(needy, RECIPE, frozenset({"expert-details"}))
    assert candidate(needy, RECIPE, frozenset({"gradients"})).criterion == "fisher"
    with pytest.raises(InputError, match="--gradients"):  # the recipe's own needs count too
        candidate(rule, dataclasses.replace(RECIPE, criterion="fisher"), frozenset())
    beforehand = next(rule for rule in RULES.values() if rule.prepare is not None)
    with pytest.raises(InputError, match="fixes experts beforehand"):
        candidate(beforehand, RECIPE, frozenset())
