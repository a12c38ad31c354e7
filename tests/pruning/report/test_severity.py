"""One word for a loss, by thresholds that stand in one place."""

import numpy as np
import pytest

from pruning.report.severity import SCALE, Scale, severity


@pytest.mark.parametrize(
    ("added", "of_random", "word"),
    [
        (-0.01, None, "small"), (0.0499, None, "small"), (0.05, None, "noticeable"),
        (0.2499, 0.1, "noticeable"), (0.25, 0.1, "severe"), (9.0, None, "severe"),
        # no better than chance
        (0.06, 0.79, "noticeable"), (0.06, 0.8, "severe"), (0.0499, 2.0, "small"),
        (0.06, -1.0, "noticeable"),
    ],
)  # fmt: skip
def test_a_loss_has_the_word_of_its_place_on_the_scale(added, of_random, word):
    assert severity(added, of_random) == word


def test_more_loss_never_sounds_better():
    order = ["small", "noticeable", "severe"]
    for chance in (None, 0.5, 1.0):
        found = [order.index(severity(added, chance)) for added in np.linspace(-1, 1, 401)]
        assert found == sorted(found) and set(found) >= {0, 2}


def test_the_scale_in_words_has_its_numbers():
    words = Scale(noticeable=0.1, severe=0.7, chance=0.6).words()
    assert all(number in words for number in ("0.1", "0.7", "60%"))
    assert severity(0.65, None, Scale(noticeable=0.1, severe=0.7)) == "noticeable"
    # as the glossary and the docstring say: 5% and 28% more perplexity
    assert round(np.expm1(SCALE.noticeable), 2) == 0.05
    assert round(np.expm1(SCALE.severe), 2) == 0.28
