"""Which plans are measured on windows kept out, how many at a time, and what is remembered of it:
no model runs."""

import json
import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.stages import rule_losses
from pruning.stages.rule_losses import CHOICE, measured_losses
from pruning.text.calibration import TokenBatch
from pruning.text.kept_out import kept_out_note
from tests.support.told import Told

D, LAYERS = 4, 3
TEXT = TokenBatch(
    np.arange(40, dtype=np.int32).reshape(5, 8), np.ones((5, 8), bool), (),
    np.arange(40).reshape(5, 8) % 3 > 0, np.array([0, 1, 1, 2, 0]),
)  # fmt: skip
PLANS = [PruningPlan(np.arange(8).reshape(1, 2, 4) < kept, (1,)) for kept in (2, 4, 6)]
WHOLE = PruningPlan(np.ones((1, 2, 4), bool), (1,))


class Base:
    fingerprint, head = "abc", "the head"
    config = SimpleNamespace(d_model=D)

    def __len__(self):
        return LAYERS


def loss(plan: PruningPlan) -> list[float]:
    """Made up: 100 times the channels kept, and the window."""
    return [100.0 * plan.keep.sum() + window for window in range(5)]


@pytest.fixture
def measure(tmp_path, monkeypatch):
    """Losses of plans, the groups that ran together, and what was said."""
    found = SimpleNamespace(groups=[], opened=0, steps=Told(), text=TEXT, samples=[])

    def masked_hidden(base, tokens, valid, plans, *, sample, batch, dtype, on_layer):
        assert tokens is found.text.tokens and valid is found.text.valid
        found.groups.append([int(plan.keep.sum()) for plan in plans])
        found.samples.append((sample, batch, np.dtype(dtype).name))
        for layer in range(LAYERS):
            on_layer(layer)
        return [plan.keep.sum() for plan in plans]

    def window_losses(reference, windows):
        assert reference.head == "the head"
        np.testing.assert_array_equal(windows.scored, found.text.scored)
        return np.array([100.0 * reference.hidden + window for window in range(5)])

    def sample(base, tokens, valid, statistics, *, batch, dtype):
        return ("sample", tokens.shape, statistics, batch, np.dtype(dtype).name)

    monkeypatch.setattr(rule_losses, "masked_hidden", masked_hidden)
    monkeypatch.setattr(rule_losses, "window_losses", window_losses)
    monkeypatch.setattr(rule_losses, "Sample", sample)
    calibration = TokenBatch(np.zeros((48, 8), np.int32), np.ones((48, 8), bool))

    def of(plans, repair="none", batch=4, dtype="float32", **known):
        def opened():
            found.opened += 1
            return SimpleNamespace(kept_out=found.text, calibration=calibration)

        recipe: Any = SimpleNamespace(
            output=str(tmp_path), repair=repair, dtype=dtype, batch=batch, window=8
        )  # fmt: skip
        provenance = {"kept_out": kept_out_note(TEXT), **known}
        base: Any = Base()
        steps: Any = found.steps
        return measured_losses(plans, recipe, "statistics", provenance, base, opened, steps)

    of.found, of.file = found, tmp_path / CHOICE
    return of


def test_the_whole_model_is_measured_with_the_plans(measure):
    got = measure(PLANS)
    assert measure.found.groups == [[8, 2, 4, 6]]
    assert got.dense == loss(WHOLE)
    assert got.plans == {plan.content_hash: loss(plan) for plan in PLANS}
    assert got.tokens == TEXT.scored.sum(axis=1).tolist() and got.files == [0, 1, 1, 2, 0]
    stored = json.loads(measure.file.read_text())
    assert stored.pop("key") == {"model_hash": "abc", "dtype": "float32", "repaired": False,
                                 **kept_out_note(TEXT)}  # fmt: skip
    assert stored == {"dense": got.dense, "plans": got.plans, "tokens": got.tokens,
                      "files": got.files}  # fmt: skip
    (line,) = measure.found.steps.details
    assert line == f"  4 plans on {TEXT.scored.sum()} predictions"
    assert measure.found.steps.bars["measure rules"] == [(4, 12), (8, 12), (12, 12)]


def test_nothing_is_measured_twice(measure):
    first = measure(PLANS[:2])
    assert measure(PLANS[:2]) == measure(PLANS[1:2]) == first
    assert measure.found.opened == 1 and measure.found.groups == [[8, 2, 4]]
    got = measure([PLANS[2], PLANS[0], PLANS[2]])
    assert measure.found.groups[1:] == [[6]] and measure.found.opened == 2
    assert got.plans == {plan.content_hash: loss(plan) for plan in PLANS}
    assert got.dense == first.dense
    measure(PLANS, dtype="bfloat16")
    assert measure.found.groups[2:] == [[8, 2, 4, 6]]
    measure(PLANS[:1], repair="layer")
    assert measure.found.groups[3:] == [[8, 2]]


@pytest.mark.parametrize(("states", "groups"), [
    (0.5, [[8], [2], [4], [6]]), (1, [[8], [2], [4], [6]]), (2.5, [[8, 2], [4, 6]]),
    (3, [[8, 2, 4], [6]]),
])  # fmt: skip
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plans_share_a_reading_as_far_as_their_states_fit(measure, monkeypatch, states, groups,
                                                          dtype):  # fmt: skip
    size = 40 * D * (4 if dtype == "float32" else 2)
    monkeypatch.setattr(rule_losses, "STATE_BYTES", int(states * size))
    measure(PLANS, dtype=dtype)
    assert measure.found.groups == groups
    done, expected = 0, []
    for group in groups:
        expected += [(done + (layer + 1) * len(group), 12) for layer in range(LAYERS)]
        done += LAYERS * len(group)
    assert measure.found.steps.bars["measure rules"] == expected
    assert {dtype_ for _, _, dtype_ in measure.found.samples} == {dtype}


def test_a_repair_has_a_sample_of_the_calibration_text(measure):
    measure(PLANS[:1], batch=4)
    # Five windows in two steps of at most four, with as little padding as can be.
    assert measure.found.samples == [(None, 3, "float32")]
    measure(PLANS[:1], batch=4, repair="expert")
    # One in twenty-four of the windows that were not kept out.
    assert measure.found.samples[1][0] == ("sample", (2, 8), "statistics", 2, "float32")


@pytest.mark.parametrize("other", [None, TEXT.of(np.arange(4))])
def test_another_text_is_refused_before_anything_is_measured(measure, other):
    measure.found.text = other
    with pytest.raises(InputError, match=r"not the one that .* was scored on, .*name a --planner"):
        measure(PLANS)
    assert not measure.found.groups and not measure.file.exists()


def test_windows_of_one_file_are_of_the_first(measure, monkeypatch):
    alone = TokenBatch(TEXT.tokens, TEXT.valid, (), TEXT.counted)
    measure.found.text = alone
    assert measure(PLANS[:1]).files == [0] * 5


def test_a_folder_that_may_only_be_read_is_left_as_it_is(measure, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    measure(PLANS[:1])
    assert not measure.file.exists()
