"""What is made of the sums of parts, from sums made up beforehand: no text is swept."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pruning.budget.plan import PruningPlan
from pruning.recipe.recipe import CompressionRecipe
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import parts
from pruning.stages.parts import collect_parts, jaccard
from tests.support.synthetic import statistics

L, E, F = 2, 3, 4


def sets(*rows: str) -> list[np.ndarray]:
    return [np.array([mark == "x" for mark in row]) for row in rows]


def test_the_overlap_is_of_members_of_both_over_members_of_either():
    one, two, none = sets("xxx..", ".xxx.", ".....")
    assert jaccard(one, two) == 2 / 4 and jaccard(one, one) == 1.0
    assert jaccard(one, none) == 0.0 and jaccard(none, none) == 0.0
    assert jaccard(None, one) is None and jaccard(one, None) is None


def part(number: int) -> ChannelStatistics:
    found = statistics(L, E, F, seed=number, gradients=False, expert_details=False)
    norms = {name: getattr(statistics(L, E, F), name) for name in
             ("down_norm", "up_norm", "gate_norm", "down_l1", "up_l1", "gate_l1")}  # fmt: skip
    return dataclasses.replace(found, **norms, total_tokens=np.array(10.0 * (number + 1)))


class Swept:
    """A sweep that is over."""

    def part(self, number):
        return part(number)

    def finished(self, total, count):
        return total.replace(extra={"parts": np.array(float(count))})


class Said:
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture
def swept(monkeypatch):
    """collect_parts of so many windows, and what it asked and said."""

    def collect(windows, until_stable=None, changes=None, whole_text=False):
        recipe = CompressionRecipe(model="m", output="o", until_stable=until_stable,
                                   planner="fair", criterion="act")  # fmt: skip
        job: Any = SimpleNamespace(
            recipe=recipe, base=SimpleNamespace(fingerprint="abc", about=None),
            calibration=SimpleNamespace(tokens=np.zeros((windows, 2))),
        )  # fmt: skip
        asked, said = [], Said()

        def sweep(job, identity, rows, steps):
            asked.append((identity, rows))
            return Swept()

        def plan(recipe, statistics, notes, about):
            # After t tokens the first t channels of ten are kept, or what is said here.
            count = int(statistics.total_tokens) if changes is None else changes.pop(0)
            keep = np.arange(2000).reshape(1, 1, -1) < count
            assert notes == {"model_hash": "abc"} and recipe.criterion == "act"
            return PruningPlan(keep, (0,))

        monkeypatch.setattr(parts, "_swept", sweep)
        monkeypatch.setattr(parts.planning, "plan", plan)
        if whole_text:
            name = recipe.fixed().used_criterion
            entry = dataclasses.replace(parts.CHANNEL_CRITERIA[name], whole_text=True)
            monkeypatch.setitem(parts.CHANNEL_CRITERIA, name, entry)
        return *collect_parts(job, {"id": 1}, said), asked, said.lines

    return collect


def merged(*numbers: int) -> ChannelStatistics:
    total = part(numbers[0])
    for number in numbers[1:]:
        total = total.merge(part(number))
    return total


def test_all_parts_count_and_their_overlaps_are_told(swept):
    total, rows, stability, asked, said = swept(9)
    ((identity, dealt),) = asked
    assert identity == {"id": 1} and len(dealt) == 4
    np.testing.assert_array_equal(rows, np.arange(9))
    wanted = merged(0, 1, 2, 3)
    np.testing.assert_array_equal(total.energy, wanted.energy)
    assert float(total.extra["parts"]) == 4 and float(total.total_tokens) == 100
    # 10, 30, 60 and 100 channels; of the even parts 40, of the odd ones 60.
    assert stability == {"tokens": [10, 30, 60, 100], "jaccard": [None, 10 / 30, 30 / 60, 60 / 100],
                         "halves": 40 / 60}  # fmt: skip
    changes = (("66.7%", 20), ("50.0%", 30), ("40.0%", 40))
    assert said == [f"kept set changed by {c} since the last {n} tokens" for c, n in changes]


@pytest.mark.parametrize(("limit", "count"), [(0.5, 3), (0.51, 4), (0.3, 2), (0.999, 16)])
def test_until_stable_no_more_parts_count_than_it_takes(swept, limit, count):
    total, rows, stability, _, said = swept(33, limit)
    assert float(total.extra["parts"]) == count == len(stability["tokens"]) == len(said) + 1
    np.testing.assert_array_equal(rows, [row for row in range(33) if row % 16 < count])
    np.testing.assert_array_equal(total.energy, merged(*range(count)).energy)
    assert float(total.total_tokens) == 5 * count * (count + 1)


def test_a_text_of_one_window_has_no_halves(swept):
    total, rows, stability, _, said = swept(1)
    assert stability == {"tokens": [10], "jaccard": [None], "halves": None} and not said
    assert list(rows) == [0] and float(total.extra["parts"]) == 1


def test_of_a_criterion_that_needs_the_whole_text_nothing_is_known_on_the_way(swept):
    total, rows, stability, _, said = swept(33, 0.1, whole_text=True)
    assert stability["jaccard"] == [None] * 16 and stability["halves"] is None and not said
    assert float(total.extra["parts"]) == 16 and len(rows) == 33


def test_where_nothing_is_kept_nothing_divides(swept):
    _, _, stability, _, said = swept(2, changes=[0, 0, 0, 0])
    assert stability["jaccard"] == [None, 0.0] and said[0].startswith("kept set changed by 100.0%")
