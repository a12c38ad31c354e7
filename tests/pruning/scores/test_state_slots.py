"""Where hidden states of a text lie between two steps, and how much of them: no model."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.experts.dispatch import padded_rows
from pruning.scores import states
from pruning.scores.states import (
    Projections,
    States,
    layer_slots,
    projection_bytes,
    projection_room,
    state_bytes,
    temporary_states,
)
from tests.pruning.scores.test_layer import CONFIG

SHAPE = (6, 3, 4)


def values(dtype) -> np.ndarray:
    return np.array(jnp.arange(math.prod(SHAPE) * 3).reshape(3, *SHAPE).astype(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("is_file", [False, True])
def test_states_come_back_from_where_they_were_put(tmp_path, is_file, dtype):
    wanted = values(dtype)
    path = tmp_path / "states"
    path.write_bytes(bytes(state_bytes(3, SHAPE, dtype)))
    with open(path, "r+b") as opened:
        kept = States(3, SHAPE, dtype, opened if is_file else None)
        parts = [(slot, slice(row, row + 2)) for slot in (2, 0, 1) for row in (4, 0, 2)]
        for slot, rows in parts:
            kept.put(slot, rows, wanted[slot, rows])
        for slot, rows in parts:
            found = kept.get(slot, rows)
            assert found.dtype == wanted.dtype
            np.testing.assert_array_equal(found, wanted[slot, rows])
        kept.put(1, slice(2, 4), wanted[0, :2].transpose(0, 2, 1).copy().transpose(0, 2, 1))
        np.testing.assert_array_equal(kept.get(1, slice(2, 4)), wanted[0, :2])
        np.testing.assert_array_equal(kept.get(1, slice(4, 6)), wanted[1, 4:])
        kept.sync()
        written = path.read_bytes()
        assert len(written) == wanted.nbytes
        wanted[1, 2:4] = wanted[0, :2]
        assert written == (wanted.tobytes() if is_file else bytes(len(written)))


def test_states_and_projections_take_so_many_bytes():
    assert states.MEMORY_STATES == states.MEMORY_PROJECTIONS == 2 * 1024**3
    assert state_bytes(5, (4, 3, 2), jnp.float32) == 5 * 4 * 3 * 2 * 4
    assert state_bytes(5, (4, 3, 2), jnp.bfloat16) == 5 * 4 * 3 * 2 * 2
    assert layer_slots(CONFIG) == 6
    # Gate and up, float32, of every copy of a token, in whole tiles.
    moe = CONFIG.moe
    assert projection_bytes(moe, 100) == 2 * padded_rows(200, 6) * 12 * 4
    assert padded_rows(200, 6) >= 200


@pytest.mark.parametrize(("room", "expected"), [
    (0, 0), (4.9, 0), (5, 5), (5.5, 5), (19, 19), (20, 20), (99, 20),
])  # fmt: skip
def test_projections_are_kept_for_a_quarter_of_the_visits_or_for_none(monkeypatch, room, expected):
    size = projection_bytes(CONFIG.moe, 30)
    monkeypatch.setattr(states, "MEMORY_PROJECTIONS", int(room * size))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    assert len(CONFIG.moe_layers) == 2
    assert projection_room(CONFIG, 10, 30) == expected
    one = dataclasses.replace(CONFIG, dense_layers=(1, 2))
    assert projection_room(one, 10, 30) == (min(10, int(room)) if room >= 2.5 else 0)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert projection_room(CONFIG, 10, 30) == 0


def test_projections_are_those_of_the_first_visits_and_taken_once():
    kept = Projections(2)
    assert [kept.has_room(visit) for visit in range(4)] == [True, True, False, False]
    for layer, start in ((0, 0), (0, 2), (1, 0)):
        kept.keep(layer, slice(start, start + 2), {"x": jnp.full(2, 10 * layer + start)})
    found = kept.take(0, slice(2, 4))
    assert isinstance(found["x"], np.ndarray)
    np.testing.assert_array_equal(found["x"], [2, 2])
    assert kept.take(0, slice(2, 4)) is None and kept.take(1, slice(2, 4)) is None
    np.testing.assert_array_equal(kept.take(1, slice(0, 2))["x"], [10, 10])


def test_states_lie_in_a_file_from_where_they_are_more_than_memory_takes(tmp_path, monkeypatch):
    made = []

    def scratch_file(folder, size):
        made.append((folder, size))
        return states.tempfile.TemporaryFile()

    monkeypatch.setattr(states, "scratch_file", scratch_file)
    size = state_bytes(3, SHAPE, jnp.float32)
    for most, files in ((size + 1, []), (size, []), (size - 1, [(tmp_path, size)])):
        monkeypatch.setattr(states, "MEMORY_STATES", most)
        with temporary_states(3, SHAPE, jnp.float32, tmp_path) as kept:
            kept.put(0, slice(0, 6), values(jnp.float32)[0])
            kept.sync()
        assert made == files
        with pytest.raises((TypeError, ValueError, AssertionError)):
            kept.get(0, slice(0, 6))  # gone
    with temporary_states(3, SHAPE, jnp.float32):
        assert made[1] == (states.Path(states.tempfile.gettempdir()), size)
