"""Which windows are a sample, and what it says of channels by itself: numbers made up."""

import numpy as np
import pytest

from pruning.scores.grams import Seen, sample_lengths, sample_size, sampled


@pytest.mark.parametrize(
    ("windows", "length", "share", "expected"),
    [(100, 64, 1 / 8, (12, 64)), (100, 256, 1 / 8, (12, 256)), (100, 512, 1 / 8, (25, 256)),
     (100, 2048, 1 / 8, (100, 256)), (100, 4096, 1 / 8, (100, 256)), (3, 64, 1 / 8, (1, 64)),
     (13, 64, 1 / 8, (2, 64)), (10, 64, 1.0, (10, 64))],
)  # fmt: skip
def test_a_share_of_the_tokens_is_taken_of_as_many_windows_as_possible(windows, length, share,
                                                                       expected):  # fmt: skip
    assert sample_size(windows, length, share) == expected


@pytest.mark.parametrize(("windows", "length", "share"), [(7, 300, 0.4), (9, 8, 0.25), (1, 9, 0.1)])
def test_the_lengths_of_a_sample_are_those_of_its_windows(windows, length, share):
    tokens = np.arange(windows * length).reshape(windows, length)
    lengths = sample_lengths(windows, length, share)
    wanted, _ = sampled(tokens, tokens >= 0, share)
    assert lengths.shape == (windows,)
    found = [row[:size] for row, size in zip(tokens, lengths, strict=True) if size]
    np.testing.assert_array_equal(found, wanted)


def test_a_sample_is_the_beginning_of_windows_evenly_spread():
    tokens = np.arange(7 * 300).reshape(7, 300)
    found, valid = sampled(tokens, tokens % 5 > 0, 0.4)
    assert found.shape == (3, 256)
    np.testing.assert_array_equal(found, tokens[[0, 2, 4], :256])
    np.testing.assert_array_equal(valid, found % 5 > 0)


def test_a_gram_has_the_squares_of_the_text_and_the_likeness_of_the_sample():
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(2, 9, 4))
    hidden[1, :, 2] = 0  # a channel that the sample has not seen
    grams = np.einsum("erf,erg->efg", hidden, hidden).astype(np.float32)
    squares = rng.uniform(1, 9, (2, 4))
    squares[0, 3] = 0  # and one that the text has not
    seen = Seen(grams, squares, np.array([9, 9]))
    for expert in range(2):
        found = seen.gram(expert)
        assert found.dtype == np.float64
        np.testing.assert_array_equal(np.diagonal(found), squares[expert])
        for i, j in np.ndindex(4, 4):
            if i == j:
                continue
            one, two = hidden[expert, :, i], hidden[expert, :, j]
            size = np.linalg.norm(one) * np.linalg.norm(two)
            like = 0.0 if not size else one @ two / size
            wanted = like * np.sqrt(squares[expert, i] * squares[expert, j])
            assert found[i, j] == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    np.testing.assert_array_equal(seen.grams, grams)  # as it was
