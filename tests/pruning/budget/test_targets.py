import functools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.budget.decide import plan_pruning
from pruning.budget.targets import plan_for_target
from tests.support.synthetic import statistics

L, E, F = 2, 4, 12


def planner(block):
    return functools.partial(plan, block=block)


def plan(channels, block):
    options = {"block": block, "experts_per_token": 2, "planner": "linear"}
    return plan_pruning(statistics(L, E, F), channels=channels, **options)


def size(counts):
    """Three matrices of 10 rows, a router row per expert that is left, and the rest."""
    return 30.0 * counts.sum() + 10.0 * (counts > 0).sum() + 1000.0


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 3, 4]), st.floats(1.0, 1.2 * 3960.0))
def test_the_plan_is_within_the_target_and_one_step_more_would_not_be(block, target):
    fewest = L * 2 * block
    options = {"channels": L * E * F, "fewest": fewest, "step": block}
    costs = {n: size(plan(n, block).counts) for n in range(fewest, L * E * F + 1, block)}
    if target < costs[fewest]:
        with pytest.raises(ValueError, match=f"smallest feasible plan takes {costs[fewest]:.0f}"):
            plan_for_target(planner(block), size, target, **options)
        return
    got = plan_for_target(planner(block), size, target, **options)
    budget = got.provenance["budget"]
    assert size(got.counts) == got.provenance["cost"] <= target
    assert budget == L * E * F or costs[budget + block] > target


def test_few_plans_are_made():
    made = []

    def counted(channels):
        made.append(channels)
        return plan(channels, 1)

    plan_for_target(counted, size, 2500.0, channels=L * E * F, fewest=4)
    assert len(made) <= 8


def test_a_target_above_the_dense_size_keeps_everything():
    got = plan_for_target(planner(4), size, 1e9, channels=L * E * F, fewest=16, step=4)
    assert got.keep.all()
    assert got.provenance["target"] == 1e9 and got.provenance["target_unit"] == "bytes"


def test_bad_targets_are_refused():
    with pytest.raises(ValueError, match="target=nan must be finite"):
        plan_for_target(planner(1), size, np.nan, channels=96, fewest=4)
    with pytest.raises(ValueError, match=r"fewest=0 in \[1, 96\]"):
        plan_for_target(planner(1), size, 1.0, channels=96, fewest=0)
