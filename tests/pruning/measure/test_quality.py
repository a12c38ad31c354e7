"""Evaluation windows and quality numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_jax.errors import InputError
from moe_jax.transformer import Head, init
from pruning.measure.quality import Reference, measure_quality, quality_of, window_losses
from pruning.text.windows import make_windows
from tests.pruning.scores.test_layer import CONFIG


@given(st.integers(2, 90), st.integers(2, 20), st.data())
def test_every_token_but_the_first_is_scored_exactly_once(length, window, data):
    stride = data.draw(st.integers(1, window - 1))
    windows = make_windows(list(range(length)), window=window, stride=stride)
    targets = windows.tokens[:, 1:][windows.scored]
    assert sorted(targets.tolist()) == list(range(1, length))
    assert windows.valid[:, 1:][windows.scored].all()


@pytest.fixture(scope="module")
def model():
    return init(CONFIG, jax.random.key(1))


def test_nll_equals_a_softmax_by_hand_and_a_model_agrees_with_itself(model):
    tokens = np.random.default_rng(0).integers(0, 64, 40)
    windows = make_windows(tokens, window=16, stride=15)
    quality, reference = measure_quality(model, windows, batch=2)
    forward = jax.jit(lambda model, tokens, valid: model(tokens, valid))
    logits = np.asarray(
        forward(model, jnp.asarray(windows.tokens), jnp.asarray(windows.valid)), np.float64
    )
    total = 0.0
    for row, text, scored in zip(logits, windows.tokens, windows.scored, strict=True):
        for t in np.flatnonzero(scored):
            total += np.log(np.exp(row[t]).sum()) - row[t, text[t + 1]]
    assert quality.nll == pytest.approx(total / 39, rel=1e-5)
    assert quality.tokens == 39
    again, _ = measure_quality(model, windows, reference=reference, batch=2)
    assert again.kl == pytest.approx(0, abs=1e-6)
    assert again.top1 == 1.0


def test_another_model_disagrees(model):
    windows = make_windows(np.arange(30), window=16)
    _, reference = measure_quality(model, windows)
    other, _ = measure_quality(init(CONFIG, jax.random.key(2)), windows, reference=reference)
    assert other.kl > 0 and other.top1 < 1


def test_divergence_and_agreement_equal_those_of_the_logits_by_hand(model):
    tokens = np.random.default_rng(1).integers(0, 64, 300)  # more than one block of positions
    windows = make_windows(tokens, window=16, stride=15)
    other = init(CONFIG, jax.random.key(2))
    _, reference = measure_quality(model, windows)
    quality, _ = measure_quality(other, windows, reference=reference)
    forward = jax.jit(lambda model, tokens, valid: model(tokens, valid))
    dense, small = (
        np.asarray(forward(m, jnp.asarray(windows.tokens), jnp.asarray(windows.valid)), np.float64)
        for m in (model, other)
    )
    p, q = (np.exp(v) / np.exp(v).sum(axis=-1, keepdims=True) for v in (dense, small))
    kl = (p * np.log(p / q)).sum(axis=-1)[:, :-1][windows.scored]
    same = (dense.argmax(-1) == small.argmax(-1))[:, :-1][windows.scored]
    assert quality.kl == pytest.approx(kl.mean(), rel=1e-4)
    assert quality.top1 == pytest.approx(same.mean())
    assert quality.tokens == 299


def by_hand(head: Head, x: np.ndarray) -> np.ndarray:
    """Logarithms of probabilities, float64."""
    x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + head.norm_eps)
    logits = (x * np.asarray(head.norm, np.float64)) @ np.asarray(head.weight, np.float64).T
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


@pytest.mark.parametrize("length", [9, 257, 258, 700])
def test_states_are_scored_where_windows_say_whatever_number_of_positions(length):
    rng = np.random.default_rng(length)
    heads = [Head(norm=rng.random(8, np.float32) + 0.5, weight=rng.random((11, 8), np.float32) * 3,
                  norm_eps=1e-3) for _ in range(2)]  # fmt: skip
    windows = make_windows(
        rng.integers(0, 11, length), window=40, stride=33, counted=rng.random(length) < 0.9
    )
    shape, losses = (*windows.tokens.shape, 8), np.zeros(len(windows.tokens))
    dense, small = (Reference(h, rng.standard_normal(shape, np.float32)) for h in heads)
    loss = kl = agree = count = 0
    for row, scored in enumerate(windows.scored):
        for t in np.flatnonzero(scored):
            p, q = (by_hand(r.head, r.hidden[row, t].astype(np.float64)) for r in (dense, small))
            loss -= q[windows.tokens[row, t + 1]]
            losses[row] -= q[windows.tokens[row, t + 1]]
            kl += (np.exp(p) * (p - q)).sum()
            agree, count = agree + (p.argmax() == q.argmax()), count + 1
    found = quality_of(small, windows, dense)
    assert found.tokens == count and found.top1 == agree / count
    np.testing.assert_allclose([found.nll, found.kl], [loss / count, kl / count], rtol=1e-5)
    assert found.perplexity == math.exp(found.nll)
    np.testing.assert_allclose(window_losses(small, windows), losses, rtol=1e-5)
    alone = quality_of(small, windows)
    assert alone.nll == pytest.approx(found.nll, rel=1e-6) and alone.tokens == count
    assert alone.to_dict() | {"kl": None, "top1": None} == alone.to_dict()


def test_a_model_that_gives_no_number_is_broken_and_a_bad_one_has_a_large_perplexity():
    windows = make_windows(np.zeros(5, int), window=5)
    states = np.ones((1, 5, 1), np.float32)

    def model(scale: float) -> Reference:
        norm, weight = np.ones(1, np.float32), np.array([[-scale], [scale]], np.float32)
        return Reference(Head(norm=norm, weight=weight, norm_eps=0.0), states)

    assert quality_of(model(300.0), windows).perplexity == math.exp(600.0)
    assert quality_of(model(400.0), windows).perplexity == math.exp(700.0)
    for scale in (np.nan, np.inf):
        with pytest.raises(InputError, match="weights are broken"):
            quality_of(model(scale), windows)
        with pytest.raises(InputError, match="weights are broken"):
            window_losses(model(scale), windows)


def test_bad_windows_are_refused():
    with pytest.raises(ValueError, match="1 tokens"):
        make_windows([3], window=8)
    with pytest.raises(ValueError, match="stride=8"):
        make_windows([3, 4], window=8, stride=8)
