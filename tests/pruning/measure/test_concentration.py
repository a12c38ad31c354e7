"""How unevenly channels share a score: by definition, over pairs and over sets of channels."""

import itertools

import numpy as np
import pytest

from pruning.measure.concentration import fraction_holding, gini


def by_pairs(scores) -> float:
    """Half of the mean difference of two channels, over the mean."""
    differences = [abs(a - b) for a in scores for b in scores]
    return np.mean(differences) / (2 * np.mean(scores))


def by_sets(scores, share) -> float:
    """The smallest of all sets of channels that hold enough."""
    enough = share * sum(scores) * (1 - 1e-12)
    sizes = (
        size
        for size in range(1, len(scores) + 1)
        if any(sum(some) >= enough for some in itertools.combinations(scores, size))
    )
    return next(sizes) / len(scores)


@pytest.mark.parametrize("seed", range(4))
def test_numbers_are_those_of_their_definitions(seed):
    scores = np.random.default_rng(seed).exponential(size=(2, 3, 7))
    scores[0, 1, 2:] = 0
    uneven, held = gini(scores), fraction_holding(scores)
    half = fraction_holding(scores, 0.5)
    assert uneven.shape == held.shape == (2, 3)
    for place in np.ndindex(2, 3):
        assert uneven[place] == pytest.approx(by_pairs(scores[place]), rel=1e-12)
        assert held[place] == by_sets(scores[place], 0.9)
        assert half[place] == by_sets(scores[place], 0.5)


def test_the_ends_of_the_range():
    equal, nothing, one = np.full(10, 0.3), np.zeros(10), np.eye(10)[3]
    assert gini(np.stack([equal, nothing, one])) == pytest.approx([0, 0, 0.9], abs=1e-12)
    assert fraction_holding(np.stack([equal, nothing, one])).tolist() == [0.9, 0.9, 0.1]
    assert fraction_holding(equal, 1.0) == 1
