"""Channels that take over what others gave, beside least squares on stacked rows."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pruning.scores.grams import Seen
from pruning.shrink import taken_over as taking
from pruning.shrink.taken_over import moved, taken_over
from tests.pruning.shrink.test_masked import D, model

__all__ = ["model"]  # the fixture


@pytest.mark.parametrize(("tokens", "pull"), [(4000, 1e-2), (1600, 1e-2), (800, 2e-2), (40, 0.4)])
def test_kept_rows_move_to_where_least_squares_with_a_pull_has_them(tokens, pull):
    assert (taking.PULL, taking.PULL_OF_TOKENS) == (1e-2, 4)
    rng = np.random.default_rng(0)
    hidden, down = rng.normal(size=(30, 7)) @ rng.normal(size=(7, 7)), rng.normal(size=(7, 3))
    keep = np.array([True, False, True, True, False, False, True])
    found = moved(hidden.T @ hidden, down, keep, tokens)
    size = np.sqrt(pull * (hidden[:, keep] ** 2).sum(axis=0).mean())
    rows = np.concatenate([hidden[:, keep], size * np.eye(4)])
    wanted = np.concatenate([hidden[:, ~keep] @ down[~keep], np.zeros((4, 3))])
    np.testing.assert_allclose(found, np.linalg.lstsq(rows, wanted, rcond=None)[0], rtol=1e-8)


def test_nothing_moves_of_channels_that_were_never_seen():
    keep = np.array([True, False, True])
    gram = np.diag([0.0, 3.0, 0.0])
    np.testing.assert_array_equal(moved(gram, np.ones((3, 2)), keep, 9), np.zeros((2, 2)))


def test_experts_take_over_what_they_can_each_for_itself(model):
    layer = model.layers[0]
    rng = np.random.default_rng(4)
    hidden = rng.normal(size=(6, 40, 12)) @ rng.normal(size=(12, 12))
    grams = np.einsum("erf,erg->efg", hidden, hidden).astype(np.float32)
    seen = Seen(grams, np.einsum("erf,erf->ef", hidden, hidden), np.array([40, 40, 0, 40, 40, 40]))
    keep = rng.random((6, 12)) < 0.5
    keep[1], keep[3] = False, True  # emptied, and whole; the third no token reached
    before = np.asarray(layer.mlp.experts.w_down).reshape(6, 12, D)
    found = taken_over(layer, seen, jnp.asarray(keep))
    after = np.asarray(found.mlp.experts.w_down).reshape(6, 12, D)
    for expert in range(6):
        wanted = before[expert].copy()
        if expert not in (1, 2, 3):
            own = keep[expert]
            wanted[own] += moved(seen.gram(expert), before[expert], own, 40)
            assert np.abs(wanted - before[expert])[own].max() > 0.01
        np.testing.assert_allclose(after[expert], wanted, rtol=1e-5, atol=1e-6)
    same = dataclasses.replace(
        found, mlp=dataclasses.replace(found.mlp, experts=layer.mlp.experts)
    )  # fmt: skip
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, same, layer))
