"""4-bit weights against a plain Python unpacker and rounding in float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax.quant import QTensor, dequantize, pack_nibbles, quantize, unpack_nibbles

SMALLEST = 2.0**-14


def unpack_in_python(tensor: QTensor) -> list[list[int]]:
    """Codes of a QTensor, byte by byte: low nibble first, stored with 8 added."""
    rows = []
    for line in np.asarray(tensor.packed).tolist():
        rows.append([nibble - 8 for byte in line for nibble in (byte % 16, byte // 16)])
    return rows


def spread_scale(tensor: QTensor) -> np.ndarray:
    """The scale of every single weight, float64."""
    scale = np.asarray(tensor.scale).astype(np.float64)
    return np.repeat(scale, tensor.group_size, axis=tensor.axis)


@pytest.fixture(scope="module", params=[0, 1])
def case(request) -> tuple[np.ndarray, QTensor]:
    """Weights whose groups differ by orders of magnitude, along either axis."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(16, 24)) * 10.0 ** rng.integers(-6, 3, (16, 24))
    weight[:8, :8] = 0
    weight[8:, :8] *= 1e-9  # far below the smallest scale
    weight = weight.astype(np.float32)
    return weight, quantize(
        jnp.asarray(weight), group_size=8, axis=request.param, dtype=jnp.float32
    )


@settings(max_examples=25, deadline=None, database=None, derandomize=True)
@given(hnp.arrays(np.int8, (3, 8), elements=st.integers(-8, 7)))
def test_packing_and_unpacking_give_every_code_back(codes):
    packed = pack_nibbles(jnp.asarray(codes))
    assert packed.dtype == jnp.uint8 and packed.shape == (3, 4)
    np.testing.assert_array_equal(unpack_nibbles(packed), codes)
    tensor = QTensor(packed=packed, scale=jnp.ones((3, 1)), group_size=8, axis=1)
    np.testing.assert_array_equal(unpack_in_python(tensor), codes)
    np.testing.assert_array_equal(dequantize(tensor), codes)


def test_the_first_column_sits_in_the_low_nibble():
    assert pack_nibbles(jnp.asarray([[-8, 7]], jnp.int8)).tolist() == [[0xF0]]


def test_dequantised_weights_are_codes_times_scales(case):
    _, tensor = case
    expected = np.asarray(unpack_in_python(tensor)) * spread_scale(tensor)
    np.testing.assert_array_equal(dequantize(tensor), expected)
    assert tensor.shape == expected.shape


def test_codes_are_the_nearest_multiples_of_the_scale(case):
    weight, tensor = case
    nearest = np.rint(weight.astype(np.float64) / spread_scale(tensor))
    np.testing.assert_array_equal(unpack_in_python(tensor), np.clip(nearest, -8, 7))


def test_no_weight_moves_by_more_than_half_a_scale(case):
    weight, tensor = case
    error = np.abs(weight.astype(np.float64) - np.asarray(dequantize(tensor), np.float64))
    # The bfloat16 scale may fall 2^-9 short, so the largest weight is at most 7.02 scales: no clip.
    assert (error <= 0.5 * spread_scale(tensor)).all()


def test_scales_fit_bfloat16_and_are_a_seventh_of_the_largest_weight(case):
    weight, tensor = case
    scale = np.asarray(tensor.scale)
    np.testing.assert_array_equal(scale.astype(ml_dtypes.bfloat16).astype(np.float32), scale)
    assert scale.min() == SMALLEST
    split = (2, 8, 24) if tensor.axis == 0 else (16, 3, 8)
    largest = np.abs(weight).reshape(split).max(axis=tensor.axis + 1)
    np.testing.assert_allclose(scale, np.maximum(largest / 7, SMALLEST), rtol=2.0**-8)


def test_a_group_of_zeros_stays_zero(case):
    weight, tensor = case
    np.testing.assert_array_equal(np.asarray(unpack_in_python(tensor))[weight == 0], 0)
    assert (np.asarray(dequantize(tensor))[:8, :8] == 0).all()


def test_halves_go_to_the_even_code():
    weight = jnp.asarray([[7.0, 0.5, 1.5, -0.5, -1.5, 2.5, -6.5, 3.5]])
    tensor = quantize(weight, group_size=8, axis=1)
    assert unpack_in_python(tensor) == [[7, 0, 2, 0, -2, 2, -6, 4]]


def test_the_scale_dtype_is_the_dtype_of_the_weight():
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32))
    short = quantize(weight, group_size=4, axis=1)
    assert short.dtype == dequantize(short).dtype == jnp.bfloat16
    long = quantize(weight, group_size=4, axis=1, dtype=jnp.float32)
    np.testing.assert_array_equal(short.packed, long.packed)
    np.testing.assert_array_equal(short.scale.astype(jnp.float32), long.scale)


@pytest.mark.parametrize(
    ("shape", "group", "axis"), [((8, 12), 5, 1), ((9, 12), 4, 0), ((8, 7), 4, 0)]
)
def test_sizes_that_do_not_fit_are_refused_by_name(shape, group, axis):
    with pytest.raises(ValueError, match=f"group_size={group} must divide axis {axis}"):
        quantize(jnp.zeros(shape), group_size=group, axis=axis)


def test_plain_arrays_pass_through_dequantize():
    weight = jnp.ones((2, 2))
    assert dequantize(weight) is weight
