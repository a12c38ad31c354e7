import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.budget.importance import (
    IMPORTANCE,
    PlannerOptions,
    attribution_weights,
    layer_weights,
    paper_weights,
    share_weights,
)
from pruning.budget.objectives import FAIR_OFFSET, fair, linear, max_min, prioritize, utility
from pruning.budget.planners import PLANNERS, select
from pruning.scores.criteria import ChannelScores
from tests.support.plans import planned

L, E, F = 2, 3, 5
NO_FLOOR = np.zeros((L, E), np.int64)


def allocate(priority, scores, weights, total):
    """Counts [G] of one problem with a priority function."""
    value = prioritize(priority, scores, weights)
    return select(value[None], np.array([total]), np.zeros((1, len(scores)), np.int64))[0]


def coverage(row, n):
    return sum(sorted(row, reverse=True)[:n]) / sum(row)


def every_split(groups, width, total):
    splits = itertools.product(range(width + 1), repeat=groups)
    return [split for split in splits if sum(split) == total]


def bisected_counts(scores, weights, budget):
    """The paper's level search for weighted max-min coverage, then the best next channels."""
    best = -np.sort(-scores, axis=1)
    prefix = np.cumsum(best, axis=1)
    mass = prefix[:, -1]

    def counts_at(level):
        target = np.minimum(1.0, level * weights) * mass
        n = (prefix < ((1.0 - 1e-12) * target)[:, None]).sum(axis=1) + 1
        return np.where(target > 0.0, np.minimum(n, scores.shape[1]), 0)

    low, high = 0.0, 1.0 / weights.min()
    if counts_at(high).sum() <= budget:
        low = high
    for _ in range(80):
        middle = 0.5 * (low + high)
        if counts_at(middle).sum() <= budget:
            low = middle
        else:
            high = middle
    counts = counts_at(low)
    while counts.sum() < budget:
        gains = [
            weights[g] * best[g, n] / mass[g] if n < scores.shape[1] else -1.0
            for g, n in enumerate(counts)
        ]
        counts[int(np.argmax(gains))] += 1
    return counts


def random_scores(seed, shape=(L, E, F), sigma=1.0):
    rng = np.random.default_rng(seed)
    return ChannelScores(
        channel=rng.lognormal(sigma=sigma, size=shape),
        expert=rng.lognormal(size=shape[:2]),
        layer=rng.lognormal(size=shape[0]),
    )


@pytest.mark.parametrize("seed", range(20))
def test_max_min_reaches_the_best_worst_coverage_of_all_splits(seed):
    rng = np.random.default_rng(seed)
    scores, weights = rng.lognormal(size=(3, 5)), rng.uniform(0.5, 2.0, 3)
    for total in range(16):
        counts = allocate(max_min, scores, weights, total)
        assert counts.sum() == total

        # A full group cannot do better, so the level is capped by full coverage.
        def level(split):
            return min(
                math.inf if n == 5 else coverage(row, n) / w
                for row, n, w in zip(scores, split, weights, strict=True)
            )

        best = max(level(split) for split in every_split(3, 5, total))
        assert level(counts) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(
    ("priority", "utility"),
    [
        (linear, lambda r: r),
        (fair, lambda r: math.log(r + FAIR_OFFSET)),
        (functools.partial(fair, degree=0.5), lambda r: 2.0 * math.sqrt(r)),
        (functools.partial(fair, degree=2.0), lambda r: -1.0 / (r + FAIR_OFFSET)),
        (functools.partial(fair, degree=3.5), lambda r: -((r + FAIR_OFFSET) ** -2.5) / 2.5),
    ],
    ids=["linear", "fair", "fair0.5", "fair2", "fair3.5"],
)
def test_separable_objectives_reach_the_best_of_all_splits(priority, utility, seed):
    rng = np.random.default_rng(seed)
    scores, weights = rng.lognormal(size=(3, 5)), rng.uniform(0.1, 2.0, 3)
    for total in range(16):
        counts = allocate(priority, scores, weights, total)
        assert counts.sum() == total

        def value(split):
            return sum(
                w * utility(coverage(row, n))
                for row, n, w in zip(scores, split, weights, strict=True)
            )

        best = max(value(split) for split in every_split(3, 5, total))
        assert value(counts) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("degree", [0.0, 0.5, 1.0, 2.0, 3.5])
def test_the_utility_is_increasing_and_concave(degree):
    value = utility(np.linspace(0.0, 1.0, 101), degree)
    assert (np.diff(value) > 0.0).all()
    assert (np.diff(value, 2) <= 1e-12).all()


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rho_max", [0.5, 0.8, 0.99])
def test_coverage_beyond_the_cap_counts_nothing(seed, rho_max):
    rng = np.random.default_rng(seed)
    scores, weights = rng.lognormal(size=(3, 5)), rng.uniform(0.1, 2.0, 3)
    for total in range(16):
        value = prioritize(linear, scores, weights, rho_max)
        counts = select(value[None], np.array([total]), np.zeros((1, 3), np.int64))[0]

        def capped(split):
            covered = [min(coverage(row, n), rho_max) for row, n in zip(scores, split, strict=True)]
            return float(weights @ covered)

        best = max(capped(split) for split in every_split(3, 5, total))
        assert capped(counts) == pytest.approx(best, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("rho_max", [0.5, 0.8, 0.99])
def test_max_min_under_a_cap_reaches_the_best_level_of_all_splits(seed, rho_max):
    rng = np.random.default_rng(seed)
    scores, weights = rng.lognormal(size=(3, 5)), rng.uniform(0.5, 2.0, 3)
    for total in range(16):
        value = prioritize(max_min, scores, weights, rho_max)
        counts = select(value[None], np.array([total]), np.zeros((1, 3), np.int64))[0]

        def level(split):
            return min(
                math.inf if n == 5 or coverage(row, n) >= rho_max else coverage(row, n) / w
                for row, n, w in zip(scores, split, weights, strict=True)
            )

        best = max(level(split) for split in every_split(3, 5, total))
        assert level(counts) == pytest.approx(best, rel=1e-12)


def test_satisfied_groups_wait_for_the_others_but_not_for_channels_without_score():
    scores = np.array([[8.0, 1.0, 1.0, 0.0], [4.0, 3.0, 2.0, 1.0]])
    value = prioritize(max_min, scores, np.ones(2), 0.8)
    counts = [select(value[None], np.array([n]), np.zeros((1, 2), int))[0] for n in range(9)]
    # Group 0 is satisfied by its first channel, group 1 by its third.
    assert [c.tolist() for c in counts[4:8]] == [[1, 3], [2, 3], [3, 3], [3, 4]]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.75, 0.97])
def test_max_min_equals_the_papers_bisection(seed, share):
    rng = np.random.default_rng(seed)
    scores, weights = rng.lognormal(sigma=1.5, size=(12, 64)), rng.uniform(0.2, 2.0, 12)
    total = round(share * scores.size)
    expected = bisected_counts(scores, weights, total)
    np.testing.assert_array_equal(allocate(max_min, scores, weights, total), expected)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_the_papers_planner_equals_bisection_at_both_levels(seed, share):
    scores = random_scores(seed, (4, 6, 32), sigma=1.5)
    budget = round(share * scores.channel.size)
    loss = np.sqrt(scores.layer)
    loss = np.clip(loss, loss.mean() - loss.std(ddof=1), loss.mean() + loss.std(ddof=1))
    totals = bisected_counts(scores.channel.reshape(4, -1), loss / loss.mean(), budget)
    expected = []
    for layer, total in enumerate(totals):
        weights = np.sqrt(scores.expert[layer])
        weights = np.maximum(weights / weights.sum(), 1e-3 / 6)
        expected.append(bisected_counts(scores.channel[layer], weights, total))
    got = planned("paper", scores, budget)
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("planner", PLANNERS)
@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.sampled_from([0.0, 1e-9, 0.5, 1.0, 1e6]), min_size=30, max_size=30),
    experts=st.lists(st.sampled_from([0.0, 1e-12, 1.0, 3.0]), min_size=6, max_size=6),
    layers=st.lists(st.sampled_from([0.0, 0.2, 1.0]), min_size=2, max_size=2),
    budget=st.integers(0, 30),
    floors=st.lists(st.integers(0, 5), min_size=6, max_size=6),
)
def test_every_planner_spends_the_budget_exactly_above_its_floors(
    planner, values, experts, layers, budget, floors
):
    scores = ChannelScores(
        channel=np.reshape(values, (L, E, F)),
        expert=np.reshape(experts, (L, E)),
        layer=np.array(layers),
    )
    floor = np.reshape(floors, (L, E))
    # layer_topk splits the budget evenly over layers, so its floors must fit each half.
    if floor.sum(axis=1).max() > budget // L:
        floor = NO_FLOOR
    counts = planned(planner, scores, budget, floor)
    assert counts.dtype == np.int64 and counts.shape == (L, E)
    assert counts.sum() == budget
    assert (floor <= counts).all() and (counts <= F).all()
    np.testing.assert_array_equal(counts, planned(planner, scores, budget, floor))


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_larger_budget_never_takes_channels_away(planner):
    scores = random_scores(7)
    floor = np.array([[1, 0, 0], [0, 2, 0]])
    counts = [planned(planner, scores, budget, floor) for budget in range(4, L * E * F + 1)]
    assert (np.diff(counts, axis=0) >= 0).all()
    np.testing.assert_array_equal(counts[-1], np.full((L, E), F))


@pytest.mark.parametrize("planner", ["paper", "maxmin", "fair", "linear"])
def test_channels_without_score_come_after_all_others(planner):
    scores = random_scores(1)
    scores.channel[0, 1] = 0.0
    scores.channel[1, :, 3:] = 0.0
    positive = (scores.channel > 0.0).sum(axis=2)
    budget = int(positive.sum())
    if planner == "paper":  # the layer level must hand over what each layer can use
        np.testing.assert_array_equal(positive.sum(axis=1), [10, 9])
    np.testing.assert_array_equal(planned(planner, scores, budget, NO_FLOOR), positive)


@pytest.mark.parametrize("planner", ["paper", "maxmin", "uniform"])
def test_equal_scores_and_weights_give_equal_widths(planner):
    scores = ChannelScores(channel=np.ones((L, E, F)), expert=np.ones((L, E)), layer=np.ones(L))
    for width in range(F + 1):
        counts = planned(planner, scores, width * L * E, NO_FLOOR)
        np.testing.assert_array_equal(counts, np.full((L, E), width))


def test_a_budget_below_one_channel_each_goes_to_the_experts_of_largest_gain():
    scores = random_scores(5)
    gain = (
        scores.channel.max(axis=2)
        / scores.channel.sum(axis=2)
        * paper_weights(scores, PlannerOptions())
    )
    counts = planned("maxmin", scores, 2, NO_FLOOR)
    assert set(np.flatnonzero(counts)) == set(np.argsort(gain, axis=None)[-2:])


def test_ties_go_to_the_lower_layer_then_the_lower_expert():
    scores = ChannelScores(channel=np.ones((L, E, F)), expert=np.ones((L, E)), layer=np.ones(L))
    counts = planned("maxmin", scores, 2 * L * E + 4, NO_FLOOR)
    assert counts.tolist() == [[3, 3, 3], [3, 2, 2]]


def test_global_selection_is_the_best_of_the_sorted_pool():
    scores = random_scores(3)
    threshold = np.sort(scores.channel, axis=None)[-11]
    expected = (scores.channel >= threshold).sum(axis=2)
    np.testing.assert_array_equal(planned("global_topk", scores, 11, NO_FLOOR), expected)


def test_normalized_selection_ignores_the_scale_of_a_layer():
    scores = random_scores(3)
    scaled = scores.replace(channel=scores.channel * np.array([1.0, 1e6])[:, None, None])
    one, two = (planned("normalized_topk", s, 11, NO_FLOOR) for s in (scores, scaled))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(planned("global_topk", scaled, 15, NO_FLOOR).sum(axis=1), [0, 15])


def test_layer_selection_keeps_the_best_of_each_layer():
    scores = random_scores(3)
    counts = planned("layer_topk", scores, 13, NO_FLOOR)
    for layer, total in enumerate((7, 6)):
        pool = [(-s, e) for e, row in enumerate(scores.channel[layer]) for s in row]
        kept = [e for _, e in sorted(pool)[:total]]
        assert counts[layer].tolist() == [kept.count(e) for e in range(E)]


def test_random_counts_follow_the_seed_and_are_fair_on_average():
    scores = random_scores(0)
    draws = [planned("random", scores, 12, NO_FLOOR, seed=seed) for seed in range(400)]
    assert any((draws[0] != draw).any() for draw in draws)
    np.testing.assert_array_equal(draws[3], planned("random", scores, 12, NO_FLOOR, seed=3))
    # Mean 2 channels, standard deviation below 1.1: five standard errors are 0.28.
    np.testing.assert_allclose(np.mean(draws, axis=0), 2.0, atol=0.28)


def test_selection_refuses_a_budget_outside_what_is_possible():
    value = np.zeros((2, 3, 5))
    floor = np.full((2, 3), 2)
    with pytest.raises(ValueError, match="budget 5 must lie between the floors' sum 6 and the 15"):
        select(value, np.array([6, 5]), floor)
    with pytest.raises(ValueError, match="budget 16 must lie"):
        select(value, np.array([16, 6]), floor)


def test_expert_weights_are_shares_with_a_floor_and_equal_without_attribution():
    shares = share_weights(np.array([[3.0, 1.0, 0.0], [0.0, 0.0, 0.0]]))
    np.testing.assert_allclose(shares, [[0.75, 0.25, 1e-3 / 3], [1 / 3] * 3])


def test_one_level_weights_carry_the_layer():
    scores = ChannelScores(
        channel=np.ones((2, 2, 1)), expert=np.array([[4.0, 1.0], [9.0, 9.0]]), layer=np.ones(2)
    )
    np.testing.assert_allclose(
        attribution_weights(scores, PlannerOptions()), [[4.0, 1.0], [9.0, 9.0]]
    )
    np.testing.assert_allclose(
        paper_weights(scores, PlannerOptions()), [[2 / 3, 1 / 3], [0.5, 0.5]]
    )


def test_linear_coverage_weighted_by_its_own_mass_is_the_pooled_ranking():
    for seed in range(5):
        scores = random_scores(seed)
        for budget in range(0, L * E * F + 1, 3):
            one = planned("linear", scores, budget, weights="mass")
            np.testing.assert_array_equal(one, planned("global_topk", scores, budget))
            two = planned("linear", scores, budget, weights="normalized_mass")
            np.testing.assert_array_equal(two, planned("normalized_topk", scores, budget))


def test_one_level_covers_at_least_what_two_levels_do():
    for seed in range(10):
        scores = random_scores(seed)
        weights = paper_weights(scores, PlannerOptions())
        for budget in range(L * E * F + 1):
            values = []
            for name in ("linear", "linear_two_level"):
                counts = planned(name, scores, budget, weights="paper")
                shares = [
                    coverage(scores.channel[at], counts[at]) for at in np.ndindex(*counts.shape)
                ]
                values.append(weights.ravel() @ shares)
            assert values[0] >= values[1] - 1e-12


def test_layer_weights_follow_the_options():
    scores = ChannelScores(
        channel=np.ones((2, 2, 1)),
        expert=np.array([[4.0, 1.0], [9.0, 6.0]]),
        layer=np.array([1.0, 9.0]),
    )
    np.testing.assert_allclose(layer_weights(scores, PlannerOptions(passes=0)), [0.2, 1.8])
    # Roots 1 and 3; mean 2, deviation sqrt(2): not clipped.
    np.testing.assert_allclose(layer_weights(scores, PlannerOptions()), [0.5, 1.5])
    attributed = PlannerOptions(layer_loss="attribution", smoothing="identity")
    np.testing.assert_allclose(layer_weights(scores, attributed), [0.5, 1.5])
    given = PlannerOptions(layer_weights=(0.3, 7.0))
    np.testing.assert_allclose(layer_weights(scores, given), [0.3, 7.0])
    # Logarithms see the unit of the loss: ln(1 + 5 x) of 0.1 x 1 and 0.1 x 9.
    logs = np.log1p([0.5, 4.5])
    scaled = PlannerOptions(smoothing="log5", loss_scale=0.1)
    np.testing.assert_allclose(layer_weights(scores, scaled), logs / logs.mean())
    with pytest.raises(ValueError, match="layer_weights has 3 entries, the model has 2 layers"):
        layer_weights(scores, PlannerOptions(layer_weights=(1.0, 1.0, 1.0)))


@pytest.mark.parametrize("planner", PLANNERS)
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 20),
    bounds=st.lists(
        st.tuples(st.integers(0, F), st.integers(0, F)).map(sorted), min_size=6, max_size=6
    ),
    part=st.floats(0.0, 1.0),
    weights=st.sampled_from([None, *IMPORTANCE]),
    rho_max=st.sampled_from([0.7, 1.0]),
)
def test_every_planner_keeps_within_floors_and_ceilings(
    planner, seed, bounds, part, weights, rho_max
):
    floor, most = np.moveaxis(np.reshape(bounds, (L, E, 2)), 2, 0)
    budget = round(floor.sum() + part * (most.sum() - floor.sum()))
    options = {"weights": weights, "rho_max": rho_max}
    allocate = functools.partial(planned, planner, random_scores(seed), **options)
    counts = allocate(budget, floor, most)
    assert counts.sum() == budget
    assert (floor <= counts).all() and (counts <= most).all()
    with pytest.raises(ValueError, match=r"budget|cannot be split"):
        allocate(int(most.sum()) + 1, floor, most)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho_max": 0.0}, r"rho_max=0\.0 must lie in \(0, 1\]"),
        ({"rho_max": 1.5}, "rho_max=1.5 must lie"),
        ({"weights": "papr"}, "weights='papr' is unknown; did you mean 'paper'"),
        ({"smoothing": "x"}, "smoothing='x' is unknown"),
        ({"passes": -1}, "passes=-1 must be at least 0"),
        ({"layer_loss": "x"}, "layer_loss='x' is unknown"),
        ({"loss_scale": 0.0}, r"loss_scale=0\.0 must be positive"),
        ({"layer_weights": (1.0, 0.0)}, "must be positive and finite"),
        ({"layer_weights": (1.0, math.nan)}, "must be positive and finite"),
    ],
)
def test_bad_planner_options_name_value_and_expectation(options, message):
    with pytest.raises(ValueError, match=message):
        PlannerOptions(**options)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 1000), st.integers(0, L * E * F))
def test_moe_i2_widths_are_in_proportion_to_importance(seed, budget):
    scores = random_scores(seed)
    counts = planned("moe_i2", scores, budget, NO_FLOOR)
    # Divisor rule: no channel would move to another group by the ratio of half-ranks to weight.
    for shares, widths, most in [
        (scores.expert.sum(axis=1), counts.sum(axis=1), E * F),
        *((scores.expert[layer], counts[layer], F) for layer in range(L)),
    ]:
        last = max(((n - 0.5) / s for n, s in zip(widths, shares, strict=True) if n), default=0.0)
        following = [(n + 0.5) / s for n, s in zip(widths, shares, strict=True) if n < most]
        assert last <= min(following, default=math.inf) * (1.0 + 1e-9)


def test_cd_moe_condenses_the_least_divergent_layers_to_their_always_on_experts():
    scores = ChannelScores(
        channel=np.ones((3, 3, 4)),
        expert=np.array([[1.0, 3.0, 2.0], [3.0, 2.0, 1.0], [2.0, 1.0, 3.0]]),
        layer=np.array([0.3, 0.1, 0.2]),
    )
    floor = np.array([[0, 1, 0], [1, 0, 0], [0, 0, 1]])
    counts = planned("cd_moe", scores, 24, floor)
    # Layer 1 keeps its best expert, then layer 2 loses its worst and the budget is met.
    assert counts.tolist() == [[4, 4, 4], [4, 0, 0], [4, 0, 4]]
    assert planned("cd_moe", scores, 21, floor)[2].tolist() == [1, 0, 4]
