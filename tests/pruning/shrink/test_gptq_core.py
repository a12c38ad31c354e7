"""GPTQ of one matrix against the textbook algorithm in float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moe_jax.quant import dequantize, quantize
from pruning.shrink.gptq_core import gptq


def rounded_scale(group: np.ndarray) -> np.ndarray:  # [out, g] -> [out]
    """Of 17 scales that give the largest weight code -8 or clip it, the least wrong one."""
    largest = np.take_along_axis(group, np.abs(group).argmax(axis=1)[:, None], axis=1)[:, 0]
    found, least = np.zeros(len(group)), np.full(len(group), np.inf)
    for shrink in np.linspace(1, 0.6, 17):
        size = np.maximum(np.abs(largest) * (shrink / 8), 2.0**-14).astype(ml_dtypes.bfloat16)
        scale = size.astype(np.float64) * np.where(largest > 0, -1, 1)
        codes = np.clip(np.rint(group / scale[:, None]), -8, 7)
        error = np.square(codes * scale[:, None] - group).sum(axis=1)
        found, least = np.where(error < least, scale, found), np.minimum(error, least)
    return found


def textbook(weight: np.ndarray, moments: np.ndarray, group_size: int, damping: float = 0.01):
    """The paper's loop: invert H, factor the inverse, round a column, correct all later ones."""
    w, h = weight.astype(np.float64), moments.astype(np.float64)
    active = np.diag(h)[np.diag(h) > 0]
    h = h + damping * active.mean() * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    codes, scales = np.zeros(w.shape), []
    for j in range(w.shape[1]):
        if j % group_size == 0:
            scale = rounded_scale(w[:, j : j + group_size])
            scales.append(scale)
        codes[:, j] = np.clip(np.rint(w[:, j] / scale), -8, 7)
        error = (w[:, j] - codes[:, j] * scale) / upper[j, j]
        w[:, j + 1 :] -= np.outer(error, upper[j, j + 1 :])
    return codes, np.stack(scales, axis=1)


def example(outputs: int, inputs: int, rows: int, seed: int = 0):
    """A random weight and correlated inputs [rows, in]."""
    rng = np.random.default_rng(seed)
    common = rng.normal(size=(rows, inputs // 4)) @ rng.normal(size=(inputs // 4, inputs))
    x = (common + 2 * rng.normal(size=(rows, inputs))).astype(np.float32)
    return rng.normal(size=(outputs, inputs)).astype(np.float32), x


def run(weight, x, group_size, **arguments):
    found = gptq(jnp.asarray(weight), jnp.asarray(x.T @ x), group_size=group_size, **arguments)
    assert bool(found.solved)
    return np.asarray(found.codes), np.asarray(found.scale)


def values(codes, scale, group_size) -> np.ndarray:
    return codes * np.repeat(scale, group_size, axis=1)


@pytest.mark.parametrize(("inputs", "group_size"), [(64, 32), (128, 128), (256, 64)])
def test_codes_and_scales_are_those_of_the_textbook_algorithm(inputs, group_size):
    weight, x = example(24, inputs, 4 * inputs)
    codes, scale = run(weight, x, group_size)
    expected, expected_scale = textbook(weight, x.T @ x, group_size)
    # float32 sums may turn a near-tie, after which that row goes its own way.
    same = (codes == expected).all(axis=1) & (scale == expected_scale).all(axis=1)
    assert same.mean() > 0.7
    error = lambda w: np.square((w - weight).astype(np.float64) @ x.T).sum()  # noqa: E731
    found = error(values(codes, scale, group_size))
    assert found == pytest.approx(error(values(expected, expected_scale, group_size)), rel=0.02)


@pytest.mark.parametrize("group_size", [32, 64])
def test_output_error_falls_and_weight_error_rises_against_rounding(group_size):
    weight, x = example(48, 128, 4096)
    ours = values(*run(weight, x[:2048], group_size), group_size)
    nearest = np.asarray(
        dequantize(quantize(jnp.asarray(weight), group_size=group_size, axis=1, dtype=jnp.float32))
    )
    held_out = x[2048:].astype(np.float64)
    output = lambda w: np.square((w - weight) @ held_out.T).sum()  # noqa: E731
    assert output(ours) < 0.7 * output(nearest)
    assert np.square(ours - weight).sum() > np.square(nearest - weight).sum()


def test_independent_inputs_are_rounded_to_nearest_bit_for_bit():
    weight, _ = example(16, 64, 1)
    moments = jnp.diag(jnp.linspace(0.1, 9.0, 64))
    found = gptq(jnp.asarray(weight), moments, group_size=32)
    nearest = quantize(jnp.asarray(weight), group_size=32, axis=1, dtype=jnp.float32)
    np.testing.assert_array_equal(found.scale, nearest.scale)
    np.testing.assert_array_equal(
        values(np.asarray(found.codes), np.asarray(found.scale), 32), dequantize(nearest)
    )


def test_the_last_input_is_chosen_best_given_all_others():
    """Exhaustive search over the last code of each row."""
    weight, x = example(8, 32, 256)
    codes, scale = run(weight, x, 32)
    moments = (x.T @ x).astype(np.float64)
    moments += 0.01 * np.diag(moments).mean() * np.eye(32)  # the damped loss is what is minimised
    for row in range(8):
        losses = []
        for last in range(-8, 8):
            error = weight[row] - scale[row, 0] * np.append(codes[row, :-1], last)
            losses.append(error @ moments @ error)
        assert np.argmin(losses) - 8 == codes[row, -1]


def test_inputs_that_never_fire_are_rounded_and_disturb_nobody():
    weight, x = example(12, 64, 512)
    dead = np.array([3, 40])
    x[:, dead] = 0
    weight[:, dead] *= 0.1  # never the largest of its group, which sets the scale
    codes, scale = run(weight, x, 32)
    expected = np.clip(np.rint(weight[:, dead] / scale[:, dead // 32]), -8, 7)
    np.testing.assert_array_equal(codes[:, dead], expected)
    live = np.setdiff1d(np.arange(64), dead)
    changed = weight.copy()
    changed[:, dead] *= -1  # rounds as badly, so it asks for the same scale
    again, _ = run(changed, x, 32)
    np.testing.assert_array_equal(again[:, live], codes[:, live])


def test_padding_with_dead_inputs_and_zero_outputs_changes_nothing_and_gets_code_zero():
    weight, x = example(12, 64, 512)
    codes, scale = run(weight, x, 32)
    wide, wide_scale = run(np.pad(weight, ((0, 4), (0, 32))), np.pad(x, ((0, 0), (0, 32))), 32)
    np.testing.assert_array_equal(wide[:12, :64], codes)
    np.testing.assert_array_equal(wide_scale[:12, :2], scale)
    assert not wide[12:].any() and not wide[:, 64:].any()
    assert (wide_scale[12:] == 2.0**-14).all() and (wide_scale[:, 2:] == 2.0**-14).all()


def test_fewer_rows_than_inputs_still_give_finite_codes():
    weight, x = example(8, 64, 5)
    codes, scale = run(weight, x, 32)
    assert np.isfinite(scale).all() and codes.min() >= -8 and codes.max() <= 7


@pytest.mark.parametrize("moments", [np.zeros((32, 32)), -np.eye(32), np.full((32, 32), np.nan)])
def test_moments_that_cannot_be_factored_are_reported_and_leave_no_nan(moments):
    weight, _ = example(4, 32, 1)
    found = gptq(jnp.asarray(weight), jnp.asarray(moments, jnp.float32), group_size=32)
    assert not bool(found.solved)
    assert not np.asarray(found.codes).any() and not np.asarray(found.scale).any()


def test_scales_fit_bfloat16_and_never_fall_below_the_smallest_normal_float16():
    weight, x = example(6, 64, 300)
    weight[2] *= 1e-7
    _, scale = run(weight, x, 32)
    assert np.abs(scale).min() == 2.0**-14 and scale.min() < 0 < scale.max()
    np.testing.assert_array_equal(scale.astype(ml_dtypes.bfloat16).astype(np.float32), scale)


def test_a_group_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="group_size=48 must divide the 64 inputs"):
        gptq(jnp.zeros((2, 64)), jnp.eye(64), group_size=48)
