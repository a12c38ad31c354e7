"""Super-channels: which they are, and that plans keep them."""

import numpy as np
import pytest

from pruning.budget.outliers import reserve, super_channels, with_super_channels
from pruning.budget.planners import PLANNERS
from pruning.budget.problem import Allocation, Problem
from pruning.scores.criteria import ChannelScores
from tests.support.plans import plan_of
from tests.support.synthetic import statistics

L, E, F = 2, 3, 8


def layer(*large: float) -> np.ndarray:
    """One layer of scores of which most are 1: the median is 1."""
    scores = np.ones((1, E, F))
    scores[0, 1, : len(large)] = large
    return scores


def test_a_super_channel_is_beyond_a_thousand_medians_and_holds_a_hundredth_of_its_layer():
    assert np.argwhere(super_channels(layer(1001.0))).tolist() == [[0, 1, 0]]
    assert not super_channels(layer(1000.0)).any()
    # 1 % of 1,500 + 148,479 + 21 ones is 1,500.
    assert super_channels(layer(1500.0, 148_478.0)).sum() == 2
    assert np.argwhere(super_channels(layer(1500.0, 148_480.0))).tolist() == [[0, 1, 1]]


def test_the_median_is_of_channels_with_a_score_and_of_the_layer_alone():
    scores = layer(1001.0)
    scores[0, 2] = 0.0
    both = np.concatenate([scores, np.full((1, E, F), 1e-9), np.zeros((1, E, F))])
    assert np.argwhere(super_channels(both)).tolist() == [[0, 1, 0]]
    # With the zeros the median would be 0.5, and 600 enough.
    scores = layer(600.0)
    scores[0, 2], scores[0, 0, :4] = 0.0, 0.0
    assert not super_channels(scores).any()


def test_experts_with_super_channels_are_reserved_as_far_as_there_is_room():
    held = np.array([[True, False, False], [False, False, True]])
    outliers = np.zeros((L, E, F), bool)
    outliers[0, 0, 1] = outliers[0, 2, 3] = outliers[1, 0, 0] = outliers[1, 1, 7] = True
    before = held.copy()
    assert reserve(held, outliers, 9).tolist() == [[True, False, True], [True, True, True]]
    assert reserve(held, outliers, 2).tolist() == [[True, False, True], [True, False, True]]
    assert reserve(held, outliers, -1).tolist() == before.tolist() == held.tolist()


def problem(**changes) -> Problem:
    scores = ChannelScores(np.ones((L, E, F)), np.ones((L, E)), np.ones(L))
    given = {
        "budget": 24, "floor": np.zeros((L, E), int), "most": np.full((L, E), F), "least": 2,
        "block": 2, "planner": PLANNERS["linear"],
    }  # fmt: skip
    return Problem(scores=scores, **given | changes)


def widened(counts, needs, **changes):
    counts = np.array(counts)
    outliers = np.zeros((L, E, F), bool)
    for (at, e), number in needs.items():
        outliers[at, e, :number] = True
    allocation = Allocation(counts, counts.copy())
    found = with_super_channels(problem(**changes), allocation, outliers)
    assert found.unaligned is allocation.unaligned
    return found.counts.tolist()


def test_a_narrow_expert_gets_blocks_of_the_widest_of_its_layer_until_it_fits():
    # Three super-channels need two blocks of two.
    assert widened([[2, 8, 4], [8, 2, 4]], {(0, 0): 3}) == [[4, 6, 4], [8, 2, 4]]
    assert widened([[2, 8, 4], [8, 2, 4]], {(0, 0): 7}) == [[8, 2, 4], [8, 2, 4]]
    assert widened([[2, 6, 8], [8, 2, 4]], {(0, 0): 5}) == [[6, 4, 6], [8, 2, 4]]
    # Wide enough, or emptied: nothing moves.
    assert widened([[4, 8, 2], [8, 0, 4]], {(0, 0): 4, (1, 1): 2}) == [[4, 8, 2], [8, 0, 4]]


def test_nobody_goes_below_its_own_need_or_the_least_width():
    assert widened([[2, 6, 2], [2, 2, 2]], {(0, 0): 8, (0, 1): 5}) == [[2, 6, 2], [2, 2, 2]]
    assert widened([[4, 8, 4], [4, 4, 4]], {(0, 0): 8}, least=4) == [[8, 4, 4], [4, 4, 4]]
    assert widened([[4, 6, 6], [4, 4, 4]], {(0, 0): 8}, least=4) == [[8, 4, 4], [4, 4, 4]]
    tight = widened([[1, 2, 1], [1, 1, 1]], {(0, 0): 3, (0, 1): 2}, block=1, least=1)
    assert tight == [[1, 2, 1], [1, 1, 1]]
    most = np.array([[5, 8, 8], [8, 8, 8]])
    assert widened([[2, 8, 8], [2, 2, 2]], {(0, 0): 8}, most=most) == [[4, 6, 8], [2, 2, 2]]


@pytest.mark.parametrize("width", ["free", "capped", "combined"])
def test_a_plan_keeps_the_super_channels_of_its_score_and_of_the_energy(width):
    stats = statistics(L, E, F, seed=1)
    worst = {}
    for at in range(L):
        expert = int(stats.phi[at].argmin()) if width != "combined" else int(stats.phi[at].argmax())
        worst[at, expert] = 1e7
        stats.energy[at, expert, 5] = 1e7 * stats.energy.max()
    given = {"criterion": "weight", "width": width, "cap": 6, "expert_rate": 1 / 3}
    plan = plan_of(stats, prune_rate=0.75, experts_per_token=1, **given)
    for at, expert in worst:
        assert plan.keep[at, expert, 5]
    said = [[at, expert, 5] for at, expert in worst]
    assert plan.provenance["super_channels"] == said
    assert plan.provenance["super_channels_removed"] == 0


def test_chance_has_no_guard_and_what_a_policy_cannot_keep_is_counted():
    stats = statistics(L, E, F, seed=1)
    expert = int(stats.phi[0].argmin())
    stats.energy[0, expert, 5] = 1e7 * stats.energy.max()
    given = {"experts_per_token": 1, "prune_rate": 0.5}
    chance = plan_of(stats, criterion="random", planner="random", **given)
    assert chance.provenance["super_channels"] == []
    choice = np.ones((L, E), bool)
    choice[0, expert] = choice[1, 0] = False
    whole = plan_of(stats, criterion="weight", width="experts", prune_rate=1 / 3,
                    experts_per_token=1, experts=choice)  # fmt: skip
    assert whole.provenance["super_channels"] == [[0, expert, 5]]
    assert whole.provenance["super_channels_removed"] == 1
