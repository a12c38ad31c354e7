"""4-bit weights against a plain Python unpacker and rounding in float64."""

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moe_jax.quant import (
    QTensor,
    dequantize,
    nearest_codes,
    pack_nibbles,
    quantize,
    unpack,
    unpack_nibbles,
)

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
    here = pack_nibbles(codes)
    assert isinstance(here, np.ndarray) and isinstance(unpack_nibbles(here), np.ndarray)
    np.testing.assert_array_equal(here, packed)
    np.testing.assert_array_equal(unpack_nibbles(here), codes)
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


def errors(weight: np.ndarray, scale: np.ndarray, axis: int) -> np.ndarray:
    """Squared rounding error of each group of 8 at given scales, float64."""
    weight = weight.astype(np.float64)
    wide = np.repeat(scale.astype(np.float64), 8, axis=axis)
    error = (np.clip(np.rint(weight / wide), -8, 7) * wide - weight) ** 2
    return error.reshape((2, 8, 24) if axis == 0 else (16, 3, 8)).sum(axis=axis + 1)


def test_no_scale_that_gives_the_largest_weight_code_minus_8_or_clips_it_is_better(case):
    weight, tensor = case
    axis = tensor.axis
    found = errors(weight, np.asarray(tensor.scale), axis)
    groups = weight.reshape((2, 8, 24) if axis == 0 else (16, 3, 8))
    place = np.abs(groups).argmax(axis=axis + 1, keepdims=True)
    largest = np.take_along_axis(groups, place, axis=axis + 1).squeeze(axis + 1)
    sign = np.where(largest > 0, -1, 1)

    def scale(shrink: float) -> np.ndarray:
        size = np.maximum(np.abs(largest) * (shrink / 8), SMALLEST)
        return sign * size.astype(ml_dtypes.bfloat16)

    every = [errors(weight, scale(shrink), axis) for shrink in np.linspace(1, 0.6, 17)]
    np.testing.assert_allclose(found, np.min(every, axis=0), rtol=1e-4, atol=1e-30)
    assert found.sum() < every[0].sum()


@pytest.mark.parametrize("axis", [0, 1])
def test_llama_cpps_4_bits_round_nothing_again(axis):
    weight = np.random.default_rng(1).standard_t(4, size=(64, 96)).astype(np.float32) * 0.02
    tensor = quantize(jnp.asarray(weight), group_size=32, axis=axis, dtype=jnp.float32)
    ours = np.asarray(dequantize(tensor))
    along = np.ascontiguousarray(ours if axis == 1 else ours.T)  # the input is the last axis there
    kind = gguf.GGMLQuantizationType.Q4_0
    for stored in (along, along.astype(np.float16).astype(np.float32)):  # --outtype f32, f16
        theirs = gguf.quants.dequantize(gguf.quants.quantize(stored, kind), kind)
        np.testing.assert_array_equal(theirs, along)


def test_on_normal_weights_the_squared_error_falls_by_more_than_a_quarter():
    weight = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)
    tensor = quantize(jnp.asarray(weight), group_size=128, axis=1)
    scale = np.abs(weight).reshape(64, 4, 128).max(axis=2).repeat(128, axis=1) / 7
    plain = np.square(np.rint(weight / scale) * scale - weight).sum()
    ours = np.square(np.asarray(dequantize(tensor), np.float32) - weight).sum()
    assert ours < 0.75 * plain


@pytest.mark.parametrize("axis", [0, 1])
def test_codes_of_8_bits_are_nearest_under_the_best_of_the_scales(axis):
    """In float64; columns may be odd, since no two codes share a byte."""
    rng = np.random.default_rng(5)
    weight = (rng.normal(size=(16, 24)) * 10.0 ** rng.integers(-1, 3, (16, 24))).astype(np.float32)
    weight[:8, :8] = 0
    tensor = quantize(jnp.asarray(weight), group_size=8, axis=axis, dtype=jnp.float32, bits=8)
    codes = np.asarray(tensor.packed).astype(int) - 128
    wide = spread_scale(tensor)
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / wide), -128, 127))
    np.testing.assert_array_equal(np.asarray(unpack(tensor)), codes)
    np.testing.assert_array_equal(np.asarray(dequantize(tensor)), (codes * wide).astype(np.float32))
    assert tensor.shape == (16, 24) and not codes[:8, :8].any() and codes.min() == -128
    largest = np.abs(weight.reshape((2, 8, 24) if axis == 0 else (16, 3, 8))).max(axis=axis + 1)
    wrong = np.abs(codes * wide - weight).reshape((2, 8, 24) if axis == 0 else (16, 3, 8))
    assert (wrong.max(axis=axis + 1) <= np.maximum(largest / 100, SMALLEST)).all()
    odd = quantize(jnp.asarray(weight[:, :7]), group_size=8, axis=0, bits=8)
    assert odd.shape == (16, 7)


def test_scales_fit_bfloat16_and_the_normal_range_of_float16(case):
    _, tensor = case
    scale = np.asarray(tensor.scale)
    np.testing.assert_array_equal(scale.astype(ml_dtypes.bfloat16).astype(np.float32), scale)
    assert np.abs(scale).min() == SMALLEST and scale.min() < 0 < scale.max()


def test_a_matrix_is_rounded_alike_whole_and_in_parts(case):
    weight, tensor = case
    halves = [
        quantize(jnp.asarray(part), group_size=8, axis=tensor.axis, dtype=jnp.float32)
        for part in (weight[:8], weight[8:])
    ]
    np.testing.assert_array_equal(np.concatenate([h.packed for h in halves]), tensor.packed)


def test_a_group_of_zeros_stays_zero(case):
    weight, tensor = case
    np.testing.assert_array_equal(np.asarray(unpack_in_python(tensor))[weight == 0], 0)
    assert (np.asarray(dequantize(tensor))[:8, :8] == 0).all()


def test_halves_go_to_the_even_code():
    weights = jnp.asarray([7.0, 0.5, 1.5, -0.5, -1.5, 2.5, -6.5, 3.5, 9.0, -9.0])
    codes = nearest_codes(weights * 0.125, jnp.asarray(0.125))
    assert codes.tolist() == [7, 0, 2, 0, -2, 2, -6, 4, 7, -8]
    mirrored = nearest_codes(-weights * 0.125, jnp.asarray(-0.125))
    assert mirrored.tolist() == codes.tolist()


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


@pytest.mark.parametrize(
    ("shape", "group", "axis"),
    [((4096 + 256, 4), 128, 0), ((4032 + 192, 4), 96, 0), ((4096 + 8, 128), 128, 1)],
)
def test_a_second_block_of_rows_has_its_own_groups_in_their_places(shape, group, axis):
    """More rows than are rounded at once, and groups that do not divide that number."""
    rng = np.random.default_rng(4)
    weight = rng.normal(size=shape)
    places = np.arange(shape[axis]) // group if axis == 0 else np.arange(shape[0])
    weight *= 2.0 ** (places % 11 - 5)[:, None]  # no group is like its neighbour
    tensor = quantize(jnp.asarray(weight.astype(np.float32)), group_size=group, axis=axis,
                      dtype=jnp.float32)  # fmt: skip
    assert tensor.scale.shape == tuple(n // group if i == axis else n for i, n in enumerate(shape))
    weight = weight.astype(np.float32).astype(np.float64)
    codes = np.asarray(unpack_in_python(tensor))
    np.testing.assert_array_equal(codes, np.clip(np.rint(weight / spread_scale(tensor)), -8, 7))
    split = (-1, group, shape[1]) if axis == 0 else (shape[0], -1, group)
    largest = np.abs(weight).reshape(split).max(axis=axis + 1)
    part = 8 * np.abs(np.asarray(tensor.scale, np.float64)) / largest
    assert 0.59 < part.min() and part.max() < 1.01  # code -8, or clipped by 40 % at most
    np.testing.assert_array_equal(dequantize(tensor), codes * spread_scale(tensor))
