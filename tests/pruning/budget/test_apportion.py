import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.budget.apportion import apportion

groups = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        st.lists(st.sampled_from([0.0, 1e-3, 0.3, 1.0, 1.0, 7.5, 1e6]), min_size=n, max_size=n),
        st.lists(
            st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted), min_size=n, max_size=n
        ),
    )
)


@settings(max_examples=300, deadline=None)
@given(groups, st.floats(0.0, 1.0))
def test_the_total_is_split_exactly_within_bounds_and_in_the_order_of_the_shares(case, part):
    shares, bounds = np.array(case[0]), np.array(case[1])
    low, high = bounds[:, 0], bounds[:, 1]
    total = round(low.sum() + part * (high.sum() - low.sum()))
    units = apportion(shares, total, low, high)
    assert units.dtype == np.int64 and units.sum() == total
    assert (low <= units).all() and (units <= high).all()
    for more in range(shares.size):
        for less in range(shares.size):
            if shares[more] > shares[less] and units[more] < high[more]:
                assert units[more] >= units[less] or units[less] == low[less]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.integers(0, 200))
def test_without_bounds_it_is_the_largest_remainder_rule(shares, total):
    exact = [total * share / sum(shares) for share in shares]
    units = apportion(np.array(shares) * 1.0, total)
    assert all(abs(u - x) < 1.0 + 1e-9 for u, x in zip(units, exact, strict=True))
    raised = [x - math.floor(x) for u, x in zip(units, exact, strict=True) if u > math.floor(x)]
    left = [x - math.floor(x) for u, x in zip(units, exact, strict=True) if u == math.floor(x)]
    assert min(raised, default=1.0) >= max(left, default=0.0) - 1e-9


def test_an_even_split_gives_the_rest_to_the_first():
    assert apportion(np.ones(4), 14).tolist() == [4, 4, 3, 3]
    assert apportion(np.zeros(3), 4).tolist() == [2, 1, 1]


def test_what_a_full_group_cannot_take_goes_to_the_others_in_proportion():
    assert apportion(np.array([8.0, 1.0, 2.0]), 16, 0, 10).tolist() == [10, 2, 4]
    assert apportion(np.array([8.0, 1.0, 1.0]), 20, np.array([0, 6, 0]), 20).tolist() == [12, 6, 2]
    assert apportion(np.array([1.0, 0.0, 0.0]), 7, 0, 5).tolist() == [5, 1, 1]


def test_impossible_totals_and_shares_are_refused():
    with pytest.raises(ValueError, match=r"11 cannot be split: .* at least 0 and at most 10"):
        apportion(np.ones(2), 11, 0, 5)
    with pytest.raises(ValueError, match=r"1 cannot be split: .* at least 2"):
        apportion(np.ones(2), 1, 1, 5)
    with pytest.raises(ValueError, match="must be non-negative and finite"):
        apportion(np.array([1.0, -1.0]), 1)
