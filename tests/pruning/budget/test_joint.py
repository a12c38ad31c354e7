"""One option of each layer, against every combination; errors between those measured, by hand."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pruning.budget.joint import cheapest, error_between
from pruning.kit.errors import BudgetError

OPTIONS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 100)), min_size=1, max_size=4)
LAYERS = st.lists(OPTIONS, min_size=1, max_size=4)


def split(layers) -> tuple[list[np.ndarray], list[np.ndarray]]:
    cost = [np.array([option[0] for option in layer]) for layer in layers]
    return cost, [np.array([float(option[1]) for option in layer]) for layer in layers]


def best(layers, budget: int) -> float | None:
    fitting = [
        sum(option[1] for option in every)
        for every in itertools.product(*layers)
        if sum(option[0] for option in every) <= budget
    ]
    return min(fitting, default=None)


@given(LAYERS, st.integers(0, 100))
def test_no_combination_within_the_budget_errs_less(layers, budget):
    wanted = best(layers, budget)
    if wanted is None:
        with pytest.raises(BudgetError, match=f"takes more than the {budget} bytes left"):
            cheapest(*split(layers), budget)
        return
    chosen = cheapest(*split(layers), budget)
    picked = [layer[option] for layer, option in zip(layers, chosen, strict=True)]
    assert sum(cost for cost, _ in picked) <= budget
    assert sum(error for _, error in picked) == wanted


@given(LAYERS, st.integers(20, 100))
def test_a_coarse_table_stays_within_the_budget_and_loses_a_unit_a_layer_at_most(layers, budget):
    unit = -(-budget // 20)
    room = budget // unit * unit - len(layers) * (unit - 1)
    wanted = best(layers, room) if room >= 0 else None
    try:
        chosen = cheapest(*split(layers), budget, grid=20)
    except BudgetError:
        assert wanted is None
        return
    picked = [layer[option] for layer, option in zip(layers, chosen, strict=True)]
    assert sum(cost for cost, _ in picked) <= budget
    assert wanted is None or sum(error for _, error in picked) <= wanted


def test_errors_between_those_measured_are_lines_of_their_logarithms():
    points, errors = np.array([100, 80, 40, 20]), np.array([0.0, 0.01, 0.09, 0.9])
    found = error_between(np.array([100, 90, 80, 60, 40, 30, 20, 19]), points, errors)
    wanted = [0.0, 0.01 / 4, 0.01, 0.03, 0.09, (0.09 * 0.9) ** 0.5, 0.9, np.inf]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    # Less that is kept never errs less, in whatever order it was measured.
    noisy = error_between(np.array([60, 40, 20]), points[::-1], np.array([0.9, 0.005, 0.01, 0.0]))
    np.testing.assert_allclose(noisy, [0.01, 0.01, 0.9], rtol=1e-12)
    # A layer that was never measured with less is left as it is.
    np.testing.assert_array_equal(
        error_between(np.array([100, 90]), np.array([100, 100]), np.zeros(2)), [0.0, np.inf]
    )
    assert (error_between(np.array([50, 20]), points, np.zeros(4)) > 0).all()
