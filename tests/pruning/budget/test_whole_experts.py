import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.budget.whole_experts import (
    keep_experts,
    naee,
    replacement_vectors,
)
from pruning.scores.expert_criteria import EXPERT_CRITERIA
from tests.support.synthetic import statistics


def outputs(seed, experts, tokens=20, width=6):
    """Weighted expert outputs of a layer, and their products summed over tokens."""
    u = np.random.default_rng(seed).normal(size=(experts, tokens, width))
    u *= np.random.default_rng(seed + 1).lognormal(size=(experts, 1, 1))
    return u, np.einsum("itd,jtd->ij", u, u)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kept", [1, 3, 5, 6])
def test_up_to_eight_experts_the_best_subset_is_found(seed, kept):
    u, gram = outputs(seed, 6)
    mask = naee(gram[None], kept)[0]
    assert mask.sum() == kept

    def error(keep):
        return ((u.sum(axis=0) - u[list(keep)].sum(axis=0)) ** 2).sum()

    best = min(error(keep) for keep in itertools.combinations(range(6), kept))
    assert error(np.flatnonzero(mask)) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_beyond_eight_experts_each_removal_adds_least(seed):
    u, gram = outputs(seed, 12)
    for kept in range(11, 0, -1):
        now = set(np.flatnonzero(naee(gram[None], kept)[0]))
        before = set(np.flatnonzero(naee(gram[None], kept + 1)[0]))
        assert now < before

        def error(keep):
            return ((u.sum(axis=0) - u[sorted(keep)].sum(axis=0)) ** 2).sum()

        best = min(error(before - {expert}) for expert in before)
        assert error(now) == pytest.approx(best, rel=1e-9)


def test_ties_keep_the_lower_experts_in_both_searches():
    for experts in (4, 10):
        mask = naee(np.eye(experts)[None], 2)[0]
        assert np.flatnonzero(mask).tolist() == [0, 1]


def test_layers_may_keep_different_numbers_of_experts():
    gram = np.stack([outputs(seed, 5)[1] for seed in range(3)])
    assert naee(gram, np.array([1, 4, 5])).sum(axis=1).tolist() == [1, 4, 5]
    with pytest.raises(ValueError, match=r"kept=0 must lie in \[1, 5\]"):
        naee(gram, 0)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-2, 2), min_size=12, max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.integers(0, 12),
    st.booleans(),
)
def test_the_experts_of_largest_value_stay(values, reserved, kept, per_layer):
    value, reserved = np.reshape(values, (3, 4)) * 1.0, np.reshape(reserved, (3, 4))
    quota = [kept // 3 + (layer < kept % 3) for layer in range(3)] if per_layer else [kept]
    groups = value.reshape(len(quota), -1).shape
    held = reserved.reshape(groups)
    if (held.sum(axis=1) > quota).any():
        with pytest.raises(ValueError, match="must leave the"):
            keep_experts(value, kept, reserved=reserved, per_layer=per_layer)
        return
    mask = keep_experts(value, kept, reserved=reserved, per_layer=per_layer)
    for row, flags, n, got in zip(
        value.reshape(groups), held, quota, mask.reshape(groups), strict=True
    ):
        order = sorted(range(len(row)), key=lambda e: (not flags[e], -row[e] * (not flags[e]), e))
        assert np.flatnonzero(got).tolist() == sorted(order[:n])


def test_constant_experts_score_zero_and_are_replaced_by_their_constant():
    rng = np.random.default_rng(0)
    z = rng.normal(size=(2, 7, 5))
    z[1] = z[1, 0]
    sums, squares = z.sum(axis=1)[None], (z**2).sum(axis=1)[None]
    tokens, mass = np.full((1, 2), 7.0), np.array([[2.0, 3.0]])
    stats = statistics(
        1, 2, 4, output_sum=sums, output_coordinate_square=squares, tokens=tokens,
        probability_mass=mass, total_tokens=10.0,
    )  # fmt: skip
    scores = EXPERT_CRITERIA["mone"](stats)
    assert scores[0, 0] == pytest.approx(np.linalg.norm(z[0].std(axis=0)) * 0.2)
    assert scores[0, 1] == pytest.approx(0.0, abs=1e-7)
    (vectors,) = replacement_vectors(sums, tokens, np.array([[3, 0]]))
    np.testing.assert_allclose(vectors, z[1, :1], rtol=1e-6)
    (unrouted,) = replacement_vectors(np.zeros((1, 1, 5)), np.zeros((1, 1)), np.zeros((1, 1), int))
    np.testing.assert_array_equal(unrouted, np.zeros((1, 5)))
