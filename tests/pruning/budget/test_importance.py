import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pruning.budget.importance import SMOOTHINGS, smooth_layer_loss


def test_smoothing_one_pass_by_hand():
    # Roots 1, 2, 9; mean 4, sample standard deviation sqrt(19); only 9 is clipped.
    upper = 4.0 + math.sqrt(19.0)
    expected = np.array([1.0, 2.0, upper]) * 3.0 / (3.0 + upper)
    np.testing.assert_allclose(smooth_layer_loss(np.array([1.0, 4.0, 81.0])), expected, rtol=1e-12)


def test_each_further_pass_narrows_the_weights():
    loss = np.random.default_rng(0).lognormal(size=24)
    spread = [np.ptp(smooth_layer_loss(loss, passes=n)) for n in range(5)]
    assert all(after < before for before, after in itertools.pairwise(spread))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(0.0, 1e6), min_size=1, max_size=30),
    st.sampled_from(sorted(SMOOTHINGS)),
)
def test_smoothed_weights_average_one_and_keep_the_order(loss, how):
    loss = np.array(loss)
    weights = smooth_layer_loss(loss, how)
    assert weights.mean() == pytest.approx(1.0)
    assert (np.diff(weights[np.argsort(loss)]) >= -1e-9).all()
    assert (weights >= 0.0).all()


@pytest.mark.parametrize("loss", [[3.0], [2.0, 2.0, 2.0], [0.0, 0.0]])
def test_layers_that_do_not_differ_weigh_one(loss):
    assert smooth_layer_loss(np.array(loss)).tolist() == [1.0] * len(loss)


def test_bad_smoothing_options_are_refused():
    with pytest.raises(ValueError, match="passes=-1 must be 0 or more"):
        smooth_layer_loss(np.ones(2), passes=-1)
    with pytest.raises(ValueError, match=r"smoothing='sqr'.*'sqrt'"):
        smooth_layer_loss(np.ones(2), "sqr")


def test_four_passes_are_nearly_a_uniform_target_and_one_pass_is_not():
    # The published curve: one pass spans 0.79 to 1.25, four passes 0.987 to 1.013.
    for seed in range(20):
        loss = np.random.default_rng(seed).lognormal(sigma=0.8, size=24)
        one, four = (smooth_layer_loss(loss, passes=n) for n in (1, 4))
        assert np.ptp(one) > 0.25
        assert np.ptp(four) < 0.1 * np.ptp(one)


def test_one_pass_of_the_root_stays_within_one_deviation_of_the_mean():
    loss = np.random.default_rng(3).lognormal(sigma=2.0, size=24)
    root = np.sqrt(loss)
    weights = smooth_layer_loss(loss)
    unit = weights / np.clip(root, root.mean() - root.std(ddof=1), root.mean() + root.std(ddof=1))
    np.testing.assert_allclose(unit, unit[0], rtol=1e-12)


def test_the_huber_tail_keeps_small_losses_and_bends_large_ones_without_a_jump():
    compress = SMOOTHINGS["huber"]
    loss = np.array([1.0, 1.0, 1.0, 1.0, 6.0])
    # Mean 2, sample deviation sqrt(5): the bend is at 3.118.
    bend = 2.0 + 0.5 * math.sqrt(5.0)
    expected = math.sqrt(bend * (12.0 - bend))
    np.testing.assert_allclose(compress(loss), [1.0, 1.0, 1.0, 1.0, expected], rtol=1e-12)
    many = np.linspace(0.0, 10.0, 2001)
    assert np.abs(np.diff(compress(many))).max() <= 10.0 / 2000 * (1 + 1e-9)
    assert (np.diff(compress(many)) > 0.0).all()


def test_powers_lie_between_a_uniform_target_and_the_raw_loss():
    loss = np.random.default_rng(1).lognormal(sigma=0.3, size=24)
    names = ("power0.25", "sqrt", "power0.75", "identity")
    spread = [np.ptp(smooth_layer_loss(loss, name)) for name in names]
    assert 0.0 < spread[0] < spread[1] < spread[2] < spread[3]
