"""How a text is dealt to parts, and its windows cut into batches of one part each."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.spread import Spread
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
     (40, 8, (5, 40)), (40, 10, (10, 40))],
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
    sampled = np.array([4, 0, 0, 0, 0, 4, 0, 0, 0, 0])  # of ten windows the first and the sixth
    np.testing.assert_array_equal(found.sampled[whole], sampled[order])
    assert not found.sampled[~whole].any()
    np.testing.assert_array_equal(batches.tokens[whole], tokens[order])
    np.testing.assert_array_equal(batches.valid[whole], valid[order])
    assert not batches.valid[~whole].any()
    if counted is not None:
        np.testing.assert_array_equal(batches.counted[whole], counted[order])
    for place, rows in zip(batches.places, batches.rows, strict=True):
        np.testing.assert_array_equal(place.valid, batches.valid[rows])


@pytest.mark.parametrize(
    ("processes", "devices", "owners", "counts"),
    [
        (2, 1, [(0, 1, 2), (0, 1, 3)], (3, 3)),
        (4, 1, [(0, 2), (0, 3), (1,), (1,)], (2, 2, 2, 2)),
        (7, 1, [(0,), (0,), (1,), (1,), (2,), (3,), ()], (1,) * 7),
        (1, 4, [(0, 0, 1, 1, 2, 3)], (8,)),
        (2, 2, [(0, 1, 2), (0, 1, 3)], (4, 4)),
    ],
)
def test_batches_are_dealt_and_what_is_missing_is_padding(processes, devices, owners, counts):
    tokens = np.arange(1, 41, dtype=np.int32).reshape(10, 4)
    valid, counted = tokens % 7 > 0, tokens % 3 > 0
    source: Any = SimpleNamespace(config=CONFIG)
    parts = rows_of_parts(10, False)
    whole = in_parts(source, tokens, valid, counted, parts, 2)
    for process in range(processes):
        found = in_parts(
            source, tokens, valid, counted, parts, 2, Devices(devices, process, processes)
        )
        assert found.owner == owners[process] and found.tokens == whole.tokens
        assert len(found.sampled) == 2 * counts[process]
        batches, size = found.batches, 2 * devices
        assert [(one.start, one.stop) for one in batches.rows] == [
            (start, start + size) for start in range(0, 2 * counts[process], size)
        ]
        own = np.arange(12).reshape(6, 2)[process::processes].ravel()  # windows of the batches
        np.testing.assert_array_equal(found.sampled[: len(own)], whole.sampled[own])
        assert not found.sampled[len(own) :].any()
        for name in ("tokens", "valid", "counted"):
            ours, theirs = getattr(batches, name), getattr(whole.batches, name)
            np.testing.assert_array_equal(ours[: len(own)], theirs[own])
            assert len(ours) == 2 * counts[process] and not ours[len(own) :].any()
        cos = np.concatenate([place.cos for place in whole.batches.places])
        for place, rows in zip(batches.places, batches.rows, strict=True):
            np.testing.assert_array_equal(place.valid, batches.valid[rows])
            windows = own[rows]
            np.testing.assert_array_equal(place.cos[: len(windows)], cos[windows])


def test_a_process_for_which_no_batch_is_left_has_padding_alone():
    tokens, source = np.ones((2, 4), np.int32), SimpleNamespace(config=CONFIG)
    valid = tokens > 0
    one, two = (
        in_parts(source, tokens, valid, None, [np.arange(2)], 2, Devices(1, process, 2))  # type: ignore[arg-type]
        for process in (0, 1)
    )
    assert one.owner == (0,) and two.owner == () and one.tokens == two.tokens == (8,)
    np.testing.assert_array_equal(one.batches.tokens, tokens)
    assert two.batches.tokens.shape == (2, 4) and not two.batches.valid.any()


class Devices(Spread):
    """So many devices, whose arrays all lie on the one there is."""

    def __init__(self, devices: int, process: int, processes: int):
        super().__init__(None, process, processes)
        object.__setattr__(self, "_devices", devices)

    @property
    def devices(self) -> int:
        return self._devices  # type: ignore[attr-defined]
