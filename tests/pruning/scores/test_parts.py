"""How a text is dealt to parts, and its windows cut into batches of one part each."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pruning.scores.parts import in_parts, rows_of_parts, windows_at_work
from tests.pruning.scores.test_layer import CONFIG


@pytest.mark.parametrize(
    ("windows", "until_stable", "parts"),
    [(3, False, 3), (4, False, 4), (5, False, 4), (256, False, 4), (257, False, 5),
     (640, False, 10), (9, True, 9), (17, True, 16), (1024, True, 16), (1025, True, 17)],
)  # fmt: skip
def test_windows_are_dealt_like_cards(windows, until_stable, parts):
    found = rows_of_parts(windows, until_stable)
    assert len(found) == parts
    for number, rows in enumerate(found):
        np.testing.assert_array_equal(rows, np.arange(number, windows, parts))


@pytest.mark.parametrize(
    ("windows", "batch", "expected"),
    [(10, 8, (3, 12)), (10, 2, (2, 12)), (10, 3, (3, 12)), (10, 1, (1, 10)), (4, 8, (1, 4)),
     (40, 8, (8, 64)), (40, 10, (10, 40))],
)  # fmt: skip
def test_the_windows_of_all_steps_include_what_fills_batches_up(windows, batch, expected):
    assert windows_at_work(rows_of_parts(windows, False), batch) == expected


def test_no_part_has_no_step():
    assert windows_at_work([], 8) == (8, 0)


@pytest.mark.parametrize("counts", [False, True])
def test_every_batch_is_of_one_part_and_the_last_of_each_is_filled_up(counts):
    tokens = np.arange(1, 41, dtype=np.int32).reshape(10, 4)
    valid = tokens % 7 > 0
    counted = tokens % 3 > 0 if counts else None
    source: Any = SimpleNamespace(config=CONFIG)
    parts = rows_of_parts(10, False)  # of 3, 3, 2 and 2 windows
    found = in_parts(source, tokens, valid, counted, parts, 2)
    assert found.owner == (0, 0, 1, 1, 2, 3)
    assert found.tokens == tuple(int(valid[rows].sum()) for rows in parts)
    batches = found.batches
    assert [(one.start, one.stop) for one in batches.rows] == [(i, i + 2) for i in range(0, 12, 2)]
    assert len(batches.places) == 6 and (batches.counted is None) == (not counts)
    whole = np.array([True, True, True, False, True, True, True, False, True, True, True, True])
    order = np.concatenate(parts)
    np.testing.assert_array_equal(batches.tokens[whole], tokens[order])
    np.testing.assert_array_equal(batches.valid[whole], valid[order])
    assert not batches.valid[~whole].any()
    if counted is not None:
        np.testing.assert_array_equal(batches.counted[whole], counted[order])
    for place, rows in zip(batches.places, batches.rows, strict=True):
        np.testing.assert_array_equal(place.valid, batches.valid[rows])
