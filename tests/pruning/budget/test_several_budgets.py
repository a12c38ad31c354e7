import functools
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.budget.plan import PruningPlan
from pruning.budget.planners import PLANNERS
from pruning.budget.several_budgets import nested_plans, plan_for_target
from pruning.budget.widths import ALIGNMENTS, WIDTHS
from tests.support.plans import arguments, plan_of
from tests.support.synthetic import statistics

L, E, F = 3, 4, 12
TL = 2  # layers of the plans of a target size
OBJECTIVES = [name for name, planner in PLANNERS.items() if planner.objective]


def assert_nested(plans):
    for larger, smaller in itertools.pairwise(plans):
        assert not (smaller.keep & ~larger.keep).any()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 20),
    rates=st.lists(st.integers(0, 65), min_size=1, max_size=4, unique=True),
    planner=st.sampled_from(sorted(OBJECTIVES)),
    align=st.sampled_from(sorted(ALIGNMENTS)),
    width=st.sampled_from(sorted(WIDTHS)),
    minimum=st.sampled_from([None, 6]),
    block=st.sampled_from([1, 3]),
)
def test_kept_channels_of_smaller_plans_lie_in_larger_ones(
    seed, rates, planner, align, width, minimum, block
):
    stats = statistics(L, E, F, seed=seed)
    options = {"planner": planner, "align": align, "width": width, "block": block}
    options |= {"experts_per_token": 1, "cap": F, "minimum": minimum}
    rates = [0.01 * rate for rate in rates]
    try:
        alone = [plan_of(stats, prune_rate=rate, **options) for rate in rates]
    except ValueError:
        with pytest.raises(ValueError):
            nested_plans(stats, rates, **arguments(**options))
        return
    plans = nested_plans(stats, rates, **arguments(**options))
    order = np.argsort(rates)
    assert_nested([plans[n] for n in order])
    for plan, single in zip(plans, alone, strict=True):
        assert plan.provenance["prune_rate"] == single.provenance["prune_rate"]
        alike = np.array_equal(plan.keep, single.keep)
        assert alike or not plan.provenance["nested_alike"]
        if plan.provenance["nested_in"] is None:
            assert alike
        assert plan.counts.sum() <= max(plan.provenance["budget"], single.counts.sum())


@pytest.mark.parametrize("planner", PLANNERS)
def test_without_alignment_every_plan_is_the_one_of_its_rate_alone(planner):
    stats = statistics(L, E, F)
    rates = [0.6, 0.1, 0.35]
    options = {"planner": planner, "experts_per_token": 2}
    plans = nested_plans(stats, rates, **arguments(**options), notes={"model_hash": "abc"})
    assert_nested([plans[1], plans[2], plans[0]])
    for rate, plan in zip(rates, plans, strict=True):
        single = plan_of(stats, prune_rate=rate, **options)
        np.testing.assert_array_equal(plan.keep, single.keep)
        assert plan.provenance["nested_alike"] and plan.provenance["model_hash"] == "abc"
    assert [plan.provenance["nested_in"] for plan in plans] == [0.35, None, 0.1]


def test_alignment_alone_is_not_nested_and_the_sweep_says_where_it_differs():
    # Some seed among these rounds an expert up at the smaller budget.
    differs = 0
    rates = [0.3, 0.36, 0.42, 0.48]
    for seed in range(10):
        options = {"block": 3, "minimum": 6, "experts_per_token": 1}
        stats = statistics(L, E, F, seed=seed)
        plans = nested_plans(stats, rates, **arguments(**options))
        assert_nested(plans)
        differs += sum(not plan.provenance["nested_alike"] for plan in plans)
    assert differs > 0


def test_bad_sweeps_are_refused():
    stats = statistics(L, E, F)
    for rates in ([], [0.5, 0.5]):
        with pytest.raises(ValueError, match="must be one or more different prune rates"):
            nested_plans(stats, rates, **arguments(experts_per_token=1))
    with pytest.raises(ValueError, match="within belongs to one plan"):
        nested_plans(stats, [0.5], **arguments(experts_per_token=1, within=np.ones((L, E), int)))


# --- the plan of a target size ---


def planner(block):
    return functools.partial(plan, block=block)


def plan(channels, block):
    options = {"block": block, "experts_per_token": 2, "planner": "linear"}
    return plan_of(statistics(TL, E, F), channels=channels, **options)


def size(counts):
    """Three matrices of 10 rows, a router row per expert that is left, and the rest."""
    return 30.0 * counts.sum() + 10.0 * (counts > 0).sum() + 1000.0


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.sampled_from([1, 3, 4]), st.floats(1.0, 1.2 * 3960.0))
def test_the_plan_is_within_the_target_and_one_step_more_would_not_be(block, target):
    fewest = TL * 2 * block
    options = {"channels": TL * E * F, "fewest": fewest, "step": block}
    costs = {n: size(plan(n, block).counts) for n in range(fewest, TL * E * F + 1, block)}
    if target < costs[fewest]:
        with pytest.raises(ValueError, match=f"smallest feasible plan takes {costs[fewest]:.0f}"):
            plan_for_target(planner(block), size, target, **options)
        return
    got = plan_for_target(planner(block), size, target, **options)
    budget = got.provenance["budget"]
    assert size(got.counts) == got.provenance["cost"] <= target
    assert budget == TL * E * F or costs[budget + block] > target


def test_few_plans_are_made():
    made = []

    def counted(channels):
        made.append(channels)
        return plan(channels, 1)

    plan_for_target(counted, size, 2500.0, channels=TL * E * F, fewest=4)
    assert len(made) <= 8


def test_a_target_above_the_dense_size_keeps_everything():
    got = plan_for_target(planner(4), size, 1e9, channels=TL * E * F, fewest=16, step=4)
    assert got.keep.all()
    assert got.provenance["target"] == 1e9 and got.provenance["target_unit"] == "bytes"


def test_bad_targets_are_refused():
    with pytest.raises(ValueError, match="target=nan must be finite"):
        plan_for_target(planner(1), size, np.nan, channels=96, fewest=4)
    with pytest.raises(ValueError, match=r"fewest=0 in \[1, 96\]"):
        plan_for_target(planner(1), size, 1.0, channels=96, fewest=0)


@pytest.mark.parametrize(
    ("power", "target", "expected"),
    [(1, 4567, [1, 1000, 456, 728, 457]), (1, 4560, [1, 1000, 456, 728, 457]),
     (1, 9995, [1, 1000, 999]), (1, 10, [1, 1000, 2]), (1, 8555, [1, 1000, 855, 856]),
     (3, 10 * 500.5**3, None),
     (8, 10 * 900.5**8, None), (0.1, 10 * 3.5**0.1, None)],
)  # fmt: skip
def test_budgets_are_guessed_on_a_straight_line_and_halved_where_it_bends(power, target, expected):
    tried = []

    def made(channels):
        tried.append(channels)
        return PruningPlan(np.arange(1000).reshape(1, 1, -1) < channels, (0,))

    cost = lambda counts: 10 * float(counts.sum()) ** power  # noqa: E731
    got = plan_for_target(made, cost, target, channels=1000, fewest=1)
    assert got.counts.sum() == max(n for n in range(1, 1001) if 10 * n**power <= target)
    assert expected is None or tried == expected
    assert len(tried) <= 2 + 2 * 10  # every other one halves what is left of a thousand


def test_budgets_are_multiples_of_the_step_between_the_fewest_and_all():
    tried = []

    def made(channels):
        tried.append(channels)
        return PruningPlan(np.arange(50).reshape(1, 1, -1) < channels, (0,))

    options = {"channels": 50, "fewest": 10, "step": 7, "unit": "parameters"}
    got = plan_for_target(made, np.sum, 29, **options)
    assert got.counts.sum() == 28 and set(tried) <= {14, 21, 28, 35, 42, 49, 50}
    assert (got.provenance["cost"], got.provenance["target_unit"]) == (28.0, "parameters")
    assert plan_for_target(made, np.sum, 50, **options).keep.all() and tried[-2:] == [14, 50]
    assert plan_for_target(made, np.sum, 14, **options).counts.sum() == 14
    with pytest.raises(ValueError, match=r"target=13 parameters cannot be met: .* takes 14; raise"):
        plan_for_target(made, np.sum, 13, **options)
    for wrong in ({"fewest": 51}, {"step": 0}):
        with pytest.raises(
            ValueError, match=rf"fewest=\d+ in \[1, 50\], step={wrong.get('step', 7)}"
        ):
            plan_for_target(made, np.sum, 20, **{**options, **wrong})
    assert plan_for_target(made, np.sum, 50, **{**options, "fewest": 50, "step": 1}).keep.all()
