"""Groups of experts against plain loops over clusters, pairs and layers."""

import itertools

import numpy as np
import pytest

from moe_jax.errors import InputError
from pruning.budget.merging import (
    MERGES,
    by_usage,
    check_counts,
    evenly,
    hierarchical,
    most_used,
    salient,
    select_merges,
    shares,
)
from pruning.kit.errors import BudgetError
from pruning.scores.likeness import Likeness

RNG = np.random.default_rng(3)


def seen(experts: int, **given) -> Likeness:
    """Random likenesses, some of them given."""
    rng = np.random.default_rng(experts)
    names = {"outputs": (experts, 4), "cosine": (experts,) * 2, "routing": (experts,) * 2,
             "saliency": (experts,), "hidden": (experts, 3, 2)}  # fmt: skip
    return Likeness(**{name: rng.normal(size=shape) for name, shape in names.items()} | given)


def averaged_linkage(points: np.ndarray, groups: int) -> set[frozenset[int]]:
    """The two clusters of the least mean distance between members become one, again and again."""
    clusters = [frozenset([one]) for one in range(len(points))]
    while len(clusters) > groups:

        def distance(pair) -> float:
            return np.mean(
                [np.linalg.norm(points[a] - points[b]) for a in pair[0] for b in pair[1]]
            )

        one, other = min(itertools.combinations(clusters, 2), key=distance)
        clusters = [c for c in clusters if c not in (one, other)] + [one | other]
    return set(clusters)


def groups_of(leaders: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(leaders == one).tolist()) for one in leaders.tolist()}


@pytest.mark.parametrize("groups", [1, 2, 4, 7, 9])
def test_near_outputs_go_together_and_the_one_used_most_leads(groups):
    points, tokens = RNG.normal(size=(9, 4)), RNG.integers(1, 90, 9).astype(float)
    leaders = hierarchical(seen(9, outputs=points), tokens, groups)
    found = groups_of(leaders)
    assert found == averaged_linkage(points, groups) and len(found) == groups
    for group in found:
        (leader,) = {int(leaders[one]) for one in group}
        assert tokens[leader] == max(tokens[one] for one in group)


def test_outputs_that_are_the_same_still_leave_as_many_groups_as_asked():
    for groups in range(1, 6):
        leaders = hierarchical(seen(5, outputs=np.zeros((5, 4))), np.zeros(5), groups)
        assert len(set(leaders.tolist())) == groups
    assert hierarchical(seen(1), np.ones(1), 1).tolist() == [0]


def test_experts_join_the_one_used_most_whose_logits_are_likest():
    routing = np.eye(5)
    routing[0, 3] = routing[2, 1] = 0.9
    routing[0, 1], routing[2, 3] = 0.8, -0.9
    routing[4, 0] = 2.0  # which leads nothing
    leaders = most_used(seen(5, routing=routing), np.array([1.0, 9.0, 1.0, 7.0, 0.0]), 2)
    assert leaders.tolist() == [3, 1, 1, 3, 1]  # at a tie the one used more


def test_the_most_salient_take_the_likest_that_are_left_up_to_their_size():
    alike = np.zeros((6, 6))
    alike[4] = [0.1, 0.5, 0.9, 0.3, 1.0, 0.2]
    alike[2] = [0.3, 0.2, 1.0, 0.1, 0.9, 0.9]
    value = np.array([1.0, 0.0, 8.0, 7.0, 9.0, 2.0])
    # Three lead, 4 before 2 before 3, and take one each: 1 is 4's, for 2 and 3 lead themselves.
    found = salient(seen(6, saliency=value, cosine=2 * alike, routing=0 * alike), value, 3)
    assert found.tolist() == [3, 4, 2, 3, 4, 2]
    # Both kinds of likeness count the same.
    more = np.zeros((6, 6))
    more[4, 0] = 3.0
    found = salient(seen(6, saliency=value, cosine=2 * alike, routing=more), value, 3)
    assert found.tolist() == [4, 3, 2, 3, 4, 2]
    # Of 32 an eighth, led by the best, with three more each, until none are left.
    many = salient(seen(32, saliency=np.arange(32.0)), np.ones(32), 24)
    sizes = np.bincount(many, minlength=32)
    assert sizes[[31, 30, 29, 8]].tolist() == [4, 4, 3, 1] and (sizes > 0).sum() == 24
    # And where few lead, as many as all need.
    few = salient(seen(32, saliency=np.arange(32.0)), np.ones(32), 3)
    assert np.bincount(few, minlength=32)[29:].tolist() == [10, 11, 11]


def test_layers_have_as_many_groups_or_as_many_as_their_experts_are_used():
    tokens = np.array([[5.0, 4.0, 3.0, 0.0], [9.0, 1.0, 1.0, 1.0], [2.0, 2.0, 1.0, 1.0]])
    assert evenly(tokens, 7).tolist() == [3, 2, 2] and evenly(tokens, 6).tolist() == [2, 2, 2]
    assert by_usage(tokens, 4).tolist() == [2, 1, 1]  # 5, 9 and one each; then 4
    assert by_usage(tokens, 5).tolist() == [3, 1, 1]
    assert by_usage(tokens, 6).tolist() == [3, 1, 2]
    assert by_usage(tokens, 12).tolist() == [4, 4, 4]
    check_counts(MERGES["m-smoe"], np.array([1, 4]), 2)
    check_counts(MERGES["ream"], np.array([2, 4]), 2)
    with pytest.raises(BudgetError, match="would keep 1 merged experts, fewer than the 2 that its"):
        check_counts(MERGES["ream"], np.array([4, 1]), 2)
    with pytest.raises(BudgetError, match="would keep 0 merged experts, fewer than the 1"):
        check_counts(MERGES["hc-smoe"], np.array([1, 0]), 2)


def test_shares_are_those_of_weights_and_alike_where_nothing_weighs():
    leaders = np.array([0, 3, 0, 3, 4, 5, 5])
    found = shares(leaders, np.array([1.0, 0.0, 3.0, 7.0, 0.0, 0.0, 0.0]))
    assert found.tolist() == [0.25, 0.0, 0.75, 1.0, 1.0, 0.5, 0.5]


def test_rules_are_chosen_by_name_pattern_or_all():
    assert select_merges(()) == [] and select_merges(("all", "ream")) == list(MERGES)
    assert select_merges(("ream", "hc*")) == ["ream", "hc-smoe", "hc-smoe-aligned"]
    with pytest.raises(InputError, match="merge='reem' is unknown; did you mean 'ream'"):
        select_merges(("reem",))
