"""What a second rounding did to weights: squares summed by hand, of just the weights it changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.quant import QTensor, dequantize
from moe_jax.quantized import quantize_layer
from moe_jax.stream import mapped
from moe_jax.transformer import init
from pruning.shrink.prune import prune_layer
from pruning.shrink.rounding import (
    ROWS_AT_ONCE,
    QuantizedSource,
    RoundingError,
    bfloat16_experts,
    compared,
    rounded_as_cut,
    rounded_layer,
)
from tests.pruning.scores.test_layer import CONFIG
from tests.support.threads import together


def test_what_processes_were_told_adds_up_to_the_bits_of_one(monkeypatch):
    rng = np.random.default_rng(0)
    pairs = [(rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) * 10.0**n) for n in range(7)]
    alone = RoundingError()
    for pair in pairs:
        alone(*pair)

    def work(spread):
        error = RoundingError()
        for number in spread.in_a_row(len(pairs)):
            error(*pairs[number])
        error.share(spread)
        return error.wrong, error.total

    assert together(monkeypatch, 3, work) == [(alone.wrong, alone.total)] * 3


@pytest.mark.parametrize("rows", [1, ROWS_AT_ONCE - 1, ROWS_AT_ONCE, 2 * ROWS_AT_ONCE + 1])
def test_errors_are_squares_over_squares_of_all_that_is_told(rows):
    rng = np.random.default_rng(rows)
    error, wrong, total = RoundingError(), 0.0, 0.0
    assert error.relative == 0.0
    for columns in (1, 3):
        before = rng.standard_normal((rows, columns)).astype(np.float32)
        after = before + rng.standard_normal((rows, columns)).astype(np.float32) / 8
        error(before, after)
        wrong += ((after.astype(float) - before.astype(float)) ** 2).sum()
        total += (before.astype(float) ** 2).sum()
    assert (error.wrong, error.total) == pytest.approx((wrong, total), rel=1e-12)
    assert error.relative == pytest.approx(wrong / total, rel=1e-12)
    same = RoundingError()
    same(before, before)
    assert same.relative == same.wrong == 0.0 < same.total


def test_every_weight_that_is_rounded_is_told_before_and_after():
    model = init(CONFIG, jax.random.key(0))
    told: list[tuple[np.ndarray, np.ndarray]] = []
    source = compared(model, lambda base: QuantizedSource(base, 4), lambda *pair: told.append(pair))
    for index in range(len(source)):
        told.clear()
        found = source.layer(index)
        wanted = quantize_layer(model.layer(index), 4)
        leaves = [
            jax.tree.leaves(layer, is_leaf=lambda leaf: isinstance(leaf, QTensor))
            for layer in (model.layer(index), wanted, found)
        ]
        pairs = [(old, new) for old, new, _ in zip(*leaves, strict=True)
                 if isinstance(new, QTensor)]  # fmt: skip
        assert len(told) == len(pairs) >= 6
        for (before, after), (old, new) in zip(told, pairs, strict=True):
            np.testing.assert_array_equal(before, old)
            np.testing.assert_array_equal(after, dequantize(new))


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_what_is_kept_is_rounded_as_in_the_model_that_has_nothing_else(storage):
    """Groups of down-projections lie along the channels that are left, all others across them."""
    layer = init(CONFIG, jax.random.key(0)).layer(2)
    rng = np.random.default_rng(0)
    channels, group = CONFIG.moe.d_expert, 4
    counts = [8, 0, 12, 4, 8, 4]
    keep = np.array([rng.permutation(np.arange(channels) < count) for count in counts])
    cut = prune_layer(layer, keep, width=channels, rows=sum(counts) + 4, block=4)
    wanted = rounded_layer(cut, group, storage).mlp.experts
    dense = rounded_layer(layer, group, storage)
    found = rounded_as_cut(dense, layer, keep, group, storage).mlp.experts
    for name in ("w_gate", "w_up", "w_down"):
        rows, cut_rows = (np.asarray(dequantize(getattr(one, name))) for one in (found, wanted))
        np.testing.assert_array_equal(rows[keep.ravel()], cut_rows[: sum(counts)])
    assert not np.asarray(found.w_down)[~keep.ravel()].any()
    away = np.asarray(dequantize(dense.mlp.experts.w_down))[keep.ravel()]
    assert (away != np.asarray(found.w_down)[keep.ravel()]).any()
    keep[3, np.flatnonzero(~keep[3])[:2]] = True
    with pytest.raises(InputError, match=r"keeps 6 channels, .*no whole groups of 4 .*--block 4"):
        rounded_as_cut(dense, layer, keep, group)


def test_experts_alone_are_narrowed_to_bfloat16():
    model = init(CONFIG, jax.random.key(0))
    quantised = mapped(model, lambda index, layer: quantize_layer(layer, 4))
    found = bfloat16_experts(quantised)
    for index in range(len(model)):
        ours, theirs = found.layer(index), quantised.layer(index)
        if index in CONFIG.dense_layers:
            old, new = (jax.tree.leaves(layer) for layer in (theirs, ours))
            assert all(np.array_equal(a, b) for a, b in zip(old, new, strict=True))
            continue
        for name in ("w_gate", "w_up", "w_down"):
            weight = getattr(ours.mlp.experts, name)
            assert weight.dtype == jnp.bfloat16
            wanted = dequantize(getattr(theirs.mlp.experts, name)).astype(jnp.bfloat16)
            np.testing.assert_array_equal(weight, wanted)
        assert isinstance(ours.attention.w_q, QTensor)
        assert isinstance(ours.mlp.shared.mlp.w_down, QTensor)
