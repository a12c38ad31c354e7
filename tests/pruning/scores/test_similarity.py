"""Similarity of experts by kernels written out."""

import numpy as np
import pytest

from pruning.scores.similarity import linear_cka


def test_similarity_by_explicit_kernels():
    rng = np.random.default_rng(0)
    for tokens, width in ((9, 4), (4, 9)):
        outputs = rng.normal(size=(3, tokens, width))
        got = linear_cka(outputs)
        centre = np.eye(tokens) - 1.0 / tokens
        kernels = [centre @ x @ x.T @ centre for x in outputs]
        for i, one in enumerate(kernels):
            for j, two in enumerate(kernels):
                expected = np.trace(one @ two) / (np.linalg.norm(one) * np.linalg.norm(two))
                assert got[i, j] == pytest.approx(expected, rel=1e-10)
    np.testing.assert_allclose(np.diagonal(got), 1.0)


def test_cka_ignores_rotation_and_scale_and_a_constant_expert_is_like_none():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(12, 5))
    rotation = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    got = linear_cka(np.stack([x, 3.0 * x @ rotation + 7.0, np.ones((12, 5))]))
    np.testing.assert_allclose(got[:2, :2], 1.0, rtol=1e-10)
    np.testing.assert_array_equal(got[2], 0.0)
