"""One sweep over several parts of a text beside sweeps over each of them, killed at any step."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.transformer import Transformer, init
from pruning.scores.asked import Asked
from pruning.scores.collect import collect_statistics
from pruning.scores.parts import in_parts
from pruning.scores.states import States, state_bytes
from pruning.scores.statistics import DECLARED, ChannelStatistics
from pruning.scores.sweep_log import Memory, SweepFolder
from pruning.scores.text_sweep import TextSweep
from tests.pruning.scores.test_layer import CONFIG

LAYERS, LOWEST = 3, 1
ROWS = [np.array(rows) for rows in ([0, 3, 5, 7], [1, 4, 6], [2])]
BATCH = 3  # as in `test_layer`, whose programs these are
ALL = Asked(gradients=True, expert_details=True, each_prefix=True)


@pytest.fixture(scope="module")
def model() -> Transformer:
    model = init(dataclasses.replace(CONFIG, dense_layers=(0,)), jax.random.key(0))
    # As in `test_layer`: with the usual 0.02 every layer is close to the identity.
    return jax.tree.map(lambda leaf: leaf * 10 if leaf.ndim == 2 else leaf, model)


@pytest.fixture(scope="module")
def text() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 64, (8, 10)).astype(np.int32)
    valid = np.arange(10)[None] < rng.integers(3, 11, (8, 1))
    return tokens, valid, tokens % 3 > 0


@pytest.fixture(scope="module")
def alone(model, text) -> list[ChannelStatistics]:
    """Statistics of each part by itself, and of the prefixes of parts."""
    options = {"gradients": True, "expert_details": True, "batch": BATCH}
    prefixes = [np.concatenate(ROWS[: number + 1]) for number in range(1, 3)]
    return [
        collect_statistics(model, tokens, valid, counted=counted, **options)
        for rows in (*ROWS, *prefixes)
        for tokens, valid, counted in [[part[rows] for part in text]]
    ]


def swept(model, text, asked, log, on_step=None, scratch: Path | None = None) -> TextSweep:
    parts = in_parts(model, *text, ROWS, BATCH)
    shape = (*parts.batches.tokens.shape, model.config.d_model)
    slots, dtype = asked.slots(model.config), jnp.float32
    if scratch is None:
        sweep = TextSweep(model, parts, asked, dtype, States(slots, shape, dtype), log, on_step)
        sweep.forward()
        sweep.backward()
        return sweep
    size = state_bytes(slots, shape, dtype)
    with log.states({"id": 1}, asked.steps(model.config), scratch, size) as file:
        states = None if file is None else States(slots, shape, dtype, file)
        sweep = TextSweep(model, parts, asked, dtype, states, log, on_step)
        sweep.forward()
        sweep.backward()
    return sweep


def equal(found: ChannelStatistics, wanted: ChannelStatistics, but: set[str], **tolerance) -> None:
    ours, theirs = found.arrays(), wanted.arrays()
    assert ours.keys() | but == theirs.keys() | but
    for name in theirs.keys() - but:
        np.testing.assert_allclose(ours[name], theirs[name], err_msg=name, **tolerance)


FINISHED = {name for name, facts in DECLARED.items() if facts["kind"] == "finished"}


@pytest.fixture(scope="module")
def calm(model, text):
    steps = []
    found = swept(model, text, ALL, Memory(), lambda *step: steps.append(step))
    return found, steps


def test_steps_are_layers_up_the_loss_and_layers_down_to_the_lowest_with_experts(model, calm):
    config, (found, steps) = model.config, calm
    assert config.moe_layers == (LOWEST, 2)
    assert ALL.steps(config) == 3 + 1 + 2 and Asked().steps(config) == 3
    assert ALL.slots(config) == 2 + 6 and Asked().slots(config) == 2
    assert ALL.groups == ("gradients", "expert-details") and Asked().groups == ()
    assert found.log.done == 6
    assert steps == [(done, 5) for done in range(1, 6)]  # the loss reads no layer


def test_each_part_has_the_sums_of_its_text_alone(calm, alone):
    for number in range(3):
        found = calm[0].part(number)
        equal(found, alone[number], {*FINISHED, "similarity"}, rtol=2e-4, atol=2e-5)
        # The common sample of tokens is that of the first batch.
        np.testing.assert_allclose(found.similarity, alone[0].similarity, rtol=1e-4, atol=1e-5)
        assert not FINISHED & calm[0].part(number).arrays().keys()


def test_what_needs_the_whole_text_is_that_of_as_many_parts(calm, alone):
    found = calm[0]
    for count, wanted in ((1, alone[0]), (2, alone[3]), (3, alone[4])):
        total = found.part(0)
        for number in range(1, count):
            total = total.merge(found.part(number))
        total = found.finished(total, count)
        for name in ("wanda_up", "wanda_gate"):
            np.testing.assert_allclose(getattr(total, name), getattr(wanted, name), rtol=1e-4)
        np.testing.assert_allclose(total.energy, wanted.energy, rtol=1e-4, atol=1e-6)
        assert float(total.total_tokens) == float(wanted.total_tokens)


def test_of_the_whole_text_alone_there_is_one_value_for_any_number_of_parts(model, text, alone):
    found = swept(model, text, Asked(expert_details=True), Memory())
    assert found.log.done == LAYERS
    for number in (1, 3):
        total = found.finished(found.part(0), number)
        np.testing.assert_allclose(total.wanda_up, alone[4].wanda_up, rtol=1e-4)
    assert found.part(0).groups == {"expert-details"}
    plain = swept(model, text, Asked(), Memory())
    assert plain.part(0).groups == frozenset()
    equal(plain.part(1), found.part(1),
          {name for name, facts in DECLARED.items() if facts["group"] == "expert-details"},
          rtol=1e-6)  # fmt: skip


class Dying:
    """A model that is gone after so many layers."""

    def __init__(self, model, layers: int):
        self._model, self._left = model, layers

    def __getattr__(self, name):
        return getattr(self._model, name)

    def __len__(self):
        return LAYERS

    def layer(self, index):
        self._left -= 1
        if self._left < 0:
            raise KeyboardInterrupt
        return self._model.layer(index)


@pytest.mark.parametrize(
    "asked", [Asked(), ALL, Asked(gradients=True, obs=True)], ids=["up", "up and down", "obs"]
)
def test_a_sweep_killed_at_every_layer_ends_the_same(model, text, calm, tmp_path, asked):
    whole = calm[0] if asked is ALL else swept(model, text, asked, Memory())
    visits = asked.steps(model.config) - asked.gradients

    def go_on(model):
        told = []
        log = SweepFolder(tmp_path / "scoring")
        return swept(model, text, asked, log, lambda *step: told.append(step), tmp_path), told

    for visit in range(1, visits):
        told: list[tuple[int, int]] = []
        log = SweepFolder(tmp_path / "scoring")
        with pytest.raises(KeyboardInterrupt):
            swept(Dying(model, 1), text, asked, log, lambda *step, t=told: t.append(step), tmp_path)
        # A sweep that goes on says first how far it is.
        assert told == [(done, visits) for done in (visit - 1, visit) if done]
    for expected in ([visits - 1, visits], [visits]):
        found, told = go_on(Dying(model, 1))
        assert told == [(done, visits) for done in expected]
        assert found.log.done == asked.steps(model.config)
        for number in range(3):
            equal(found.part(number), whole.part(number), set(), rtol=0)
        ends = (one.finished(one.part(0), 3) for one in (found, whole))
        equal(*ends, set(), rtol=0)
