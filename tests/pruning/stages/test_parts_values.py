"""What is made of the sums of parts, from sums made up beforehand: no text is swept."""

import contextlib
import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.spread import ALONE, Spread
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.recipe.recipe import CompressionRecipe
from pruning.scores.asked import Asked
from pruning.scores.own import STATISTICS
from pruning.scores.parts import rows_of_parts
from pruning.scores.states import state_bytes
from pruning.scores.statistics import ChannelStatistics
from pruning.stages import parts
from pruning.stages.parts import collect_parts, jaccard
from tests.pruning.scores.test_layer import CONFIG
from tests.support.synthetic import statistics
from tests.support.told import Told

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
        asked, said = [], Told()

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


# --- the sweep ---


class Model:
    """As much of a model as is read before a sweep, and what happened to it."""

    def __init__(self, happened: list, weights_hash: str | None):
        self.happened, self.weights_hash = happened, weights_hash
        self.file_hash, self.config = "files", CONFIG

    def __len__(self):
        return 3

    @contextlib.contextmanager
    def checking(self, *, mtp: bool):
        self.happened.append(f"check {mtp}")
        yield
        self.happened.append("checked")


@pytest.fixture
def sweeping(monkeypatch, tmp_path):
    """Sweep a text of 9 windows of 5 tokens with made-up layers; what happened, step by step."""

    def sweep(
        steps_before: int = 0, weights_hash: str | None = None, spread: Spread = ALONE, **options
    ):
        happened: list[Any] = []
        recipe = CompressionRecipe(model="m", output=str(tmp_path), scratch=str(tmp_path / "s"),
                                   **{"mtp": "drop", "batch": 2, **options})  # fmt: skip
        base = Model(happened, weights_hash)
        valid = np.ones((9, 5), bool)
        text = SimpleNamespace(tokens=np.zeros((9, 5), np.int32), valid=valid, counted=valid)
        job: Any = SimpleNamespace(recipe=recipe, base=base, output=tmp_path, calibration=text,
                                   dtype="bfloat16", spread=spread)  # fmt: skip

        class Sweep:
            def __init__(self, source, parts_, asked, dtype, states, log, on_step, spread, scratch):
                assert scratch == tmp_path / "s"
                size = None if states is None else states.state_size
                happened.append((source is base, parts_.owner, asked, dtype, size, log.done))
                self.log, self.left = log, asked.steps(base.config) - log.done

            def forward(self):
                happened.append("forward")

            def backward(self):
                happened.append("backward")
                for _ in range(self.left):
                    self.log.add({"x": np.zeros((1, 1))})

        class Slots:
            def __init__(self, slots, shape, dtype, file):
                assert file.seek(0, 2) == state_bytes(slots, shape, dtype)
                self.state_size = (slots, shape, dtype)

        monkeypatch.setattr(parts, "TextSweep", Sweep)
        monkeypatch.setattr(parts, "States", Slots)
        monkeypatch.setattr(parts, "remember", lambda *given: happened.append("remember"))
        rows = rows_of_parts(9, False)
        log = parts.sweep_folder(job)
        if steps_before:
            told = {"id": 1, "files": "files", "asked": (), "own": sorted(STATISTICS), "batch": 2,
                    "parts": 4}  # fmt: skip
            size = state_bytes(2, (10, 5, 16), "bfloat16")
            with log.states(told, 3, tmp_path / "s", size):
                for _ in range(steps_before):
                    log.add({"x": np.zeros((1, 1))})
        found = parts._swept(job, {"id": 1}, rows, Steps(quiet=True))
        return found, happened

    return sweep


# Of three, two, two and two windows, each in whole batches of two.
OWNER, WINDOWS = (0, 0, 1, 2, 3), 10


@pytest.mark.parametrize("mtp", ["drop", "keep"])
def test_the_first_reading_checks_the_weights_and_identifies_the_model(sweeping, mtp, tmp_path):
    found, happened = sweeping(mtp=mtp)
    first, *rest = happened
    shape = (WINDOWS, 5, CONFIG.d_model)
    assert first == (True, OWNER, Asked(), "bfloat16", (2, shape, "bfloat16"), 0)
    assert rest == [f"check {mtp != 'drop'}", "forward", "checked", "remember", "backward"]
    # States go, the sums stay until the statistics are written.
    assert not [*(tmp_path / "s").iterdir()] and found.log.done == 3


def test_what_is_collected_is_what_the_recipe_says(sweeping):
    _, happened = sweeping(gradients=True, expert_details=True, until_stable=0.9)
    asked = Asked(gradients=True, expert_details=True, each_prefix=True)
    assert happened[0][2] == asked and happened[0][4][0] == asked.slots(CONFIG) == 8


@pytest.mark.parametrize(
    ("until_stable", "devices", "expected"),
    [(None, {"data": 1, "expert": 1}, True), (0.9, {"data": 1, "expert": 1}, False),
     (None, {"data": 1, "expert": 2}, False)],
)  # fmt: skip
def test_obs_is_of_the_sweep_where_all_of_the_text_and_of_a_layer_is_at_hand(
    sweeping, until_stable, devices, expected
):
    mesh: Any = SimpleNamespace(shape=devices)
    _, happened = sweeping(obs=True, until_stable=until_stable, spread=Spread(mesh))
    assert happened[0][2].obs == expected


@pytest.mark.parametrize(
    ("done", "weights_hash", "checked"),
    [(2, "w", True), (3, None, True), (3, "w", False), (0, "w", True)],
)
def test_weights_that_were_all_read_and_are_known_are_not_read_again(
    sweeping, done, weights_hash, checked
):
    _, happened = sweeping(done, weights_hash)
    assert happened[0][5] == done and (happened[0][4] is None) == (done == 3)
    assert ("check False" in happened) == checked


def test_progress_of_other_options_is_not_gone_on_with(sweeping):
    assert sweeping(2, batch=2)[1][0][5] == 2
    assert sweeping(2, gradients=True)[1][0][5] == 0
