"""Rounding to MXFP4 against nearest neighbours in a table of all its values."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert.formats.mxfp4 import pack, unpack
from moe_jax.mxfp4 import rounded

GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
GRID = np.unique(np.concatenate([GRID, -GRID]))


def nearest(block: np.ndarray, exponent: int) -> np.ndarray:
    """Distance of each weight to the nearest value, float64."""
    grid = GRID * 2.0**exponent
    return np.abs(block[:, None] - grid[None]).min(axis=1)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.floats(0.01, 30), size=st.integers(-40, 40))
def test_every_code_is_the_nearest_and_the_scale_the_better_of_two(seed, spread, size):
    rng = np.random.default_rng(seed)
    weight = np.sign(rng.normal(size=(3, 64))) * np.exp(
        spread * rng.normal(size=(3, 64)).clip(-2, 1)
    )
    weight = np.ldexp(weight.astype(np.float32), size)
    packed = pack(weight)
    found = unpack(packed["weight_blocks"], packed["weight_scales"]).astype(np.float64)
    for row, g in np.ndindex(3, 2):
        block, value = (m[row, 32 * g : 32 * g + 32].astype(np.float64) for m in (weight, found))
        exponent = int(packed["weight_scales"][row, g]) - 127
        np.testing.assert_array_equal(np.abs(block - value), nearest(block, exponent))
        error = np.square(block - value).sum()
        least = int(np.floor(np.log2(np.abs(block).max()))) - 2
        for other in (least, least + 1):
            assert error <= np.square(nearest(block, other)).sum() * (1 + 1e-5)


@settings(max_examples=50, deadline=None)
@given(codes=st.lists(st.integers(0, 255), min_size=16, max_size=16), scale=st.integers(4, 250))
def test_what_was_rounded_once_keeps_its_value(codes, scale):
    blocks = np.array(codes, np.uint8).reshape(1, 1, 16)
    value = unpack(blocks, np.array([[scale]], np.uint8))
    packed = pack(value.astype(np.float32))
    again = unpack(packed["weight_blocks"], packed["weight_scales"])
    np.testing.assert_array_equal(value.astype(np.float64), again.astype(np.float64))
    np.testing.assert_array_equal(np.asarray(rounded(value, 1)), value)


@pytest.mark.parametrize(
    ("weight", "value"),
    [(0.25, 0), (0.75, 1), (1.25, 1), (1.75, 2), (2.5, 2), (3.5, 4), (5, 4), (-0.75, -1)],
)
def test_ties_go_to_the_even_code(weight, value):
    block = np.zeros((1, 32), np.float32)
    block[0, :2] = 6, weight  # 6 fixes the scale at 1
    packed = pack(block)
    assert packed["weight_scales"] == 127
    assert unpack(packed["weight_blocks"], packed["weight_scales"])[0, 1] == value


def test_zero_is_code_zero_at_scale_one_and_blocks_may_lie_along_either_axis():
    packed = pack(np.zeros((2, 32), np.float32))
    assert not packed["weight_blocks"].any() and (packed["weight_scales"] == 127).all()
    weight = np.random.default_rng(0).normal(size=(64, 96)).astype(np.float32)
    np.testing.assert_array_equal(rounded(weight, 0), np.asarray(rounded(weight.T.copy(), 1)).T)
    np.testing.assert_array_equal(rounded(weight[:, :70], 1)[:, :64], rounded(weight, 1)[:, :64])


def test_two_scales_beat_the_one_of_the_specification():
    weight = np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32)
    found = np.asarray(rounded(weight, 1))
    blocks = weight.reshape(64, 2, 32).astype(np.float64)
    least = np.floor(np.log2(np.abs(blocks).max(axis=2))) - 2
    single = sum(
        np.square(nearest(blocks[place], int(least[place]))).sum() for place in np.ndindex(64, 2)
    )
    assert np.square(found - weight).sum() < 0.97 * single
