"""What a plan says of itself, value by value."""

import numpy as np
import pytest

from moe_jax.errors import InputError
from pruning.budget.importance import PlannerOptions
from pruning.budget.planners import PLANNERS
from pruning.budget.problem import Limits, Objective, Planner, Problem
from pruning.budget.record import recorded_options
from pruning.scores.criteria import ChannelScores
from tests.support.plans import plan_of
from tests.support.synthetic import statistics

L, E, F = 2, 4, 12


def said(**options) -> dict:
    return plan_of(statistics(L, E, F), experts_per_token=2, **options).provenance


def test_a_plan_says_its_options_its_budget_and_what_it_left():
    found = said(channels=37, block=3, planner="fair", criterion="energy", attribution="reap",
                 minimum=5, seed=3, align="hull")  # fmt: skip
    assert found["prune_rate"] == 1 - 37 / 96 and found["budget"] == 37
    assert found["kept"] + found["unspent"] == 37 and found["unspent"] in (1, 4)
    expected = {"criterion": "energy", "attribution": "reap", "planner": "fair", "width": "free",
                "block": 3, "minimum": 6, "seed": 3, "keep_experts": False, "align": "hull",
                "grid": None, "cap": None, "expert_rate": None, "per_layer": False,
                "layer_rates": {}, "experts_per_token": 2, "emptied": "zero"}  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    assert said(prune_rate=0.3)["prune_rate"] == 0.3
    assert said(prune_rate=0.3, keep_experts=True)["keep_experts"]
    assert said(prune_rate=0.5, layer_rates={1: 0.25})["layer_rates"] == {"1": 0.25}


def test_a_budget_is_some_channels_or_all():
    assert said(channels=96)["kept"] == 96 and said(channels=96)["prune_rate"] == 0.0
    for wrong in (0, -1, 97):
        with pytest.raises(InputError, match=rf"channels={wrong} must lie in \[1, 96\]"):
            said(channels=wrong)
    for wrong in ({}, {"channels": 9, "prune_rate": 0.5}):
        with pytest.raises(InputError, match="give either prune_rate="):
            said(**wrong)


@pytest.mark.parametrize(
    ("width", "planner", "expert_rate"),
    [("free", "fair", None), ("uniform", None, None), ("experts", None, None),
     ("combined", "fair", 0.25), ("layer", "fair", None)],
)  # fmt: skip
def test_what_decided_nothing_is_not_said(width, planner, expert_rate):
    found = said(prune_rate=0.5, planner="fair", width=width, expert_rate=0.25)
    assert (found["planner"], found["expert_rate"]) == (planner, expert_rate)


def test_options_come_back_from_what_a_plan_says():
    found = recorded_options(said(prune_rate=0.5, block=4, layer_rates={0: 0.25}, seed=3))
    assert found["layer_rate"] == ["0=0.25"] and found["seed"] == 3
    assert not {"prune_rate", "block", "minimum", "grid"} & set(found)
    assert recorded_options({}) == {"layer_rate": []}
    given = {"planner_options": {"weights": "mass", "rho": None}, "kept": 3, "seed": 0}
    assert recorded_options(given) == {"weights": "mass", "seed": 0, "layer_rate": []}


def problem(**changes) -> Problem:
    rng = np.random.default_rng(0)
    scores = ChannelScores(rng.random((3, E, F)), rng.random((3, E)), rng.random(3))
    floor = np.arange(3 * E).reshape(3, E) % 3
    given = {"scores": scores, "budget": 50, "floor": floor, "most": floor + 7}
    return Problem(**{**given, "planner": PLANNERS["fair"], **changes})


def test_without_a_planners_objective_it_is_the_plain_mean_of_coverage():
    plain = Planner(lambda problem: problem.most)
    assert problem(planner=plain).objective == Objective(0.0, "equal")
    assert problem().objective == PLANNERS["fair"].objective
    np.testing.assert_array_equal(plain(problem()), problem().most)


def test_a_problem_of_some_layers_has_all_that_is_theirs():
    layers = np.array([2, 0])
    whole = problem(experts=np.random.default_rng(1).random((3, E)) < 0.5,
                    options=PlannerOptions(layer_weights=(1.0, 2.0, 3.0)), seed=4)  # fmt: skip
    part = whole.of_layers(layers, 17)
    assert (part.budget, part.seed, part.planner) == (17, 4, whole.planner)
    assert part.options.layer_weights == (3.0, 1.0)
    for name in ("floor", "most", "experts"):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[layers])
    for name in ("channel", "expert", "layer"):
        ours, theirs = (getattr(one.scores, name) for one in (part, whole))
        np.testing.assert_array_equal(ours, theirs[layers])
    np.testing.assert_array_equal(part.reserved, part.floor > 0)
    assert problem().of_layers(layers, 17).experts is None


def test_limits_must_suit_the_model():
    shape = (2, 3)
    np.testing.assert_array_equal(Limits().most(shape, 7), np.full(shape, 7))
    within = np.array([[0, 7, 3], [1, 2, 3]], np.int32)
    found = Limits(within=within).most(shape, 7)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, within)
    for wrong in (within - 1, within + 1, within.T):
        with pytest.raises(InputError, match=r"expected \[2, 3\] in \[0, 7\]; take the counts"):
            Limits(within=wrong).most(shape, 7)
    experts = np.array([[True, True, False], [True, True, True]])
    Limits().check_experts(shape, 9)
    Limits(experts=experts).check_experts(shape, 2)
    with pytest.raises(InputError, match=r"experts keeps 2 in one layer, every token needs 3"):
        Limits(experts=experts).check_experts(shape, 3)
    for wrong in (experts.T, experts.astype(int)):
        with pytest.raises(InputError, match=r"expected bool\(2, 3\)"):
            Limits(experts=wrong).check_experts(shape, 1)
