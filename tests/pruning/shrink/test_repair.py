"""The least squares of one expert against numpy's own, and the strength that halves choose."""

import numpy as np
import pytest

from pruning.shrink.repair import NONE, HalvedRidge, Missing, Ridge

TOKENS, KEPT, D = 60, 5, 3
STRENGTHS = (0.0, 0.001, 0.01, 0.1, 0.3, 1.0, 3.0, 10.0)


def rows(seed: int, tokens: int = TOKENS) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(KEPT, KEPT))
    return rng.normal(size=(tokens, KEPT)) @ mixed, rng.normal(size=(tokens, D))


def sums(hidden: np.ndarray, lacks: np.ndarray) -> tuple[np.ndarray, Missing]:
    return hidden.T @ hidden, Missing(hidden.T @ lacks, float((lacks**2).sum()))


def by_numpy(hidden: np.ndarray, lacks: np.ndarray, strength: float, channels: int) -> np.ndarray:
    """Rows of the pull below those of the tokens."""
    mean = (hidden**2).sum(axis=0)[: channels or None].mean()
    pull = np.sqrt(strength * mean) * np.eye(hidden.shape[1])
    stacked = np.concatenate([hidden, pull]), np.concatenate([lacks, np.zeros((len(pull), D))])
    return np.linalg.lstsq(*stacked, rcond=None)[0]


@pytest.mark.parametrize("channels", [KEPT, KEPT - 1, 0])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_the_closed_form_is_least_squares_on_stacked_rows(strength, channels):
    hidden, lacks = rows(0)
    gram, missing = sums(hidden, lacks)
    wanted = by_numpy(hidden, lacks, strength, channels)
    np.testing.assert_allclose(Ridge(gram, channels).change(missing.cross, strength), wanted)


def test_errors_on_other_tokens_are_those_of_the_rows_themselves():
    (hidden, lacks), (others, wanted) = rows(0), rows(1)
    gram, missing = sums(hidden, lacks)
    ridge, (other, there) = Ridge(gram, KEPT), sums(others, wanted)
    found = ridge.errors(missing.cross, ridge.turned(other), there)
    for strength, error in zip(STRENGTHS, found, strict=True):
        left = wanted - others @ by_numpy(hidden, lacks, strength, KEPT)
        np.testing.assert_allclose(error, (left**2).sum())


def halves(noise: float, tokens: int = TOKENS, first: int = 0) -> tuple[list, np.ndarray]:
    """Hidden rows of two halves, whose lack is linear in them but for noise."""
    true, found = np.random.default_rng(9).normal(size=(KEPT, D)), []
    for seed in (first, first + 1):
        hidden, other = rows(seed, tokens)
        found.append((hidden, hidden @ true + noise * other))
    return found, true


def fitted(found) -> tuple[np.ndarray | None, float]:
    (a, first), (b, second) = (sums(*half) for half in found)
    return HalvedRidge((a, b), KEPT).fit((first, second))


def test_what_the_kept_channels_span_is_restored_exactly():
    found, true = halves(noise=0.0)
    change, strength = fitted(found)
    assert change is not None
    assert strength == 0.0
    for hidden, lacks in found:
        np.testing.assert_allclose(hidden @ change, lacks, atol=1e-6)
    np.testing.assert_allclose(change, true, atol=1e-6)


def test_the_strength_is_that_of_least_error_on_the_other_half():
    seen = set()
    for first in range(0, 40, 2):
        found, _ = halves(noise=4.0, tokens=8, first=first)
        change, strength = fitted(found)
        (a, y), (b, z) = found
        errors = [
            ((z - b @ by_numpy(a, y, s, KEPT)) ** 2).sum() / (z**2).sum()
            + ((y - a @ by_numpy(b, z, s, KEPT)) ** 2).sum() / (y**2).sum()
            for s in STRENGTHS
        ]
        wanted = STRENGTHS[int(np.argmin(errors))] if min(errors) < 2 else NONE
        assert strength == wanted, first
        seen.add(strength)
        if change is not None:
            both = np.concatenate([a, b]), np.concatenate([y, z])
            np.testing.assert_allclose(change, by_numpy(*both, strength, KEPT))
    assert len(seen) > 3


def test_the_unit_of_what_is_lacking_changes_no_strength():
    found, _ = halves(noise=4.0, tokens=8)
    change, strength = fitted(found)
    small, same = fitted([(hidden, 1e-6 * lacks) for hidden, lacks in found])
    assert change is not None and small is not None
    assert same == strength > 0
    np.testing.assert_allclose(small, 1e-6 * change, rtol=1e-9)


def test_what_two_parts_of_a_text_say_adds_up():
    a, b = (sums(*half)[1] for half in halves(noise=1.0)[0])
    both = a + b
    np.testing.assert_array_equal(both.cross, a.cross + b.cross)
    assert both.square == a.square + b.square


def test_nothing_moves_where_the_halves_contradict_each_other_or_lack_nothing():
    (a, y), _ = halves(noise=0.0)[0]
    assert fitted([(a, y), (a, -y)]) == (None, NONE)
    assert fitted([(a, y), (a, 0 * y)]) == (None, NONE)


def test_directions_that_no_token_has_do_not_move():
    found, _ = halves(noise=0.1)
    flat = [(np.c_[hidden[:, :-1], hidden[:, :1]], lacks) for hidden, lacks in found]
    change, _ = fitted(flat)
    assert change is not None
    np.testing.assert_allclose(change[0], change[-1], atol=1e-6)  # the smallest of many that fit


def test_directions_below_the_resolution_of_float32_sums_do_not_move():
    """Of the largest eigenvalue, 1, they have less than a millionth; more of it does move."""
    values, cross = np.array([1.0, 0.1, 1e-5, 5e-7, 0.0]), np.ones((KEPT, D))
    turned, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(KEPT, KEPT)))
    change = Ridge((turned * values) @ turned.T, KEPT).change(turned @ cross, 0.0)
    wanted = np.array([1.0, 10.0, 1e5, 0.0, 0.0])[:, None] * cross
    np.testing.assert_allclose(turned.T @ change, wanted, rtol=1e-6, atol=1e-6)
