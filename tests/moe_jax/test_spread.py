"""What processes tell each other, played by threads; devices are in `tests/pruning/scores`."""

import threading
import time

import jax
import numpy as np
import pytest

from moe_jax import spread as spreading
from moe_jax.errors import InputError, LostProcess
from moe_jax.mesh import mesh_of
from moe_jax.spread import ALONE, Spread
from tests.support.threads import together


def test_sums_are_added_in_float64_in_the_order_of_the_processes(monkeypatch):
    monkeypatch.setattr(spreading, "PIECE", 4)  # of 9 numbers, so that the last piece is short
    rng = np.random.default_rng(0)
    given = [{"b": rng.random((2, 3)) * 10.0**p, "a": rng.random(3)} for p in range(3)]

    def work(spread: Spread):
        own = given[spread.process]
        names = sorted(own) if spread.process else own  # another order in process 0
        return spread.total({name: own[name] for name in names})

    for found in together(monkeypatch, 3, work):
        assert found.keys() == {"a", "b"}
        for name in found:
            first, second, third = (one[name] for one in given)
            np.testing.assert_array_equal(found[name], first + second + third)


def test_nothing_to_add_is_nothing_and_alone_sums_stay(monkeypatch):
    assert together(monkeypatch, 2, lambda spread: spread.total({})) == [{}, {}]
    sums = {"x": np.ones(2)}
    assert ALONE.total(sums)["x"] is sums["x"]


def test_process_0_works_and_all_learn_what_it_found(monkeypatch):
    worked = []

    def work(spread: Spread):
        def lead():
            worked.append(spread.process)
            return {"steps": 3, "name": "ü"}

        return spread.led(lead), spread.sent(b"abcde" if spread.leads else b"")

    assert together(monkeypatch, 3, work) == [({"steps": 3, "name": "ü"}, b"abcde")] * 3
    assert worked == [0]


def test_while_process_0_works_the_others_hear_of_it(monkeypatch):
    monkeypatch.setattr(spreading, "PATIENCE", 0.001)
    heard, enough = [], threading.Event()

    def work(spread: Spread):
        gathered = spreading._gathered

        def listening(array):
            found = gathered(array)
            if spread.process == 1 and found.dtype == bool:
                heard.append(bool(found[0, 0]))
                enough.set() if sum(heard) >= 3 else None
            return found

        if spread.process == 1:
            monkeypatch.setattr(spreading, "_gathered", listening)
        return spread.led(lambda: enough.wait(30))

    assert together(monkeypatch, 2, work) == [True, True]
    assert sum(heard) >= 3 and heard[-1] is False


def test_what_process_0_made_it_has_and_the_others_read(monkeypatch):
    made = []

    def work(spread: Spread):
        return spread.led_and_read(lambda: made.append(1) or "made", lambda: f"read {made}")

    assert together(monkeypatch, 2, work) == ["made", "read [1]"]
    assert ALONE.led_and_read(lambda: "made", lambda: "read") == "made"


@pytest.mark.parametrize(("count", "parts"), [(7, ["01", "23", "456"]), (2, ["", "0", "1"])])
def test_things_in_a_row_are_dealt_evenly(count, parts):
    own = [Spread(None, process, 3).in_a_row(count) for process in range(3)]
    assert ["".join(map(str, part)) for part in own] == parts
    assert list(ALONE.in_a_row(count)) == list(range(count))


def test_any_process_may_give_bytes(monkeypatch):
    monkeypatch.setattr(spreading, "PIECE", 2)

    def work(spread: Spread):
        return [spread.sent(bytes([spread.process] * (9 + spread.process)), p) for p in range(3)]

    expected = [bytes([p] * (9 + p)) for p in range(3)]
    assert together(monkeypatch, 3, work) == [expected] * 3


def test_bytes_and_arrays_come_whole_in_pieces(monkeypatch):
    monkeypatch.setattr(spreading, "PIECE", 2)  # words of four bytes
    arrays = {"b": np.arange(6.0).reshape(2, 3), "a": np.array(7, np.int32), "c": np.zeros((0, 2))}
    data = bytes(range(17))  # two pieces and a byte

    def work(spread: Spread):
        given = arrays if spread.leads else {}
        return spread.sent(data if spread.leads else b""), spread.sent_arrays(given)

    for sent, found in together(monkeypatch, 2, work):
        assert sent == data and list(found) == list(arrays)
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype and found[name].shape == array.shape
            np.testing.assert_array_equal(found[name], array)
            found[name][...] = 0  # it may be written


def test_tasks_are_done_once_and_told_to_all_in_their_order(monkeypatch):
    done = []

    def work(spread: Spread):
        def square(number: int):
            done.append((spread.process, number))
            return {"square": number**2, "by": "é" * number}

        return list(spread.shared_out(range(5), square))

    expected = [(number, {"square": number**2, "by": "é" * number}) for number in range(5)]
    assert together(monkeypatch, 2, work) == [expected] * 2
    assert sorted(done) == [(0, 0), (0, 2), (0, 4), (1, 1), (1, 3)]
    assert list(ALONE.shared_out([3], lambda number: number)) == [(3, 3)]


def test_what_process_0_raises_ends_the_others_with_its_words(monkeypatch):
    def lead():
        raise InputError("output='x' is in the way")

    first, second = together(monkeypatch, 2, lambda spread: spread.led(lead))
    assert isinstance(first, InputError) and str(first) == "output='x' is in the way"
    assert isinstance(second, LostProcess) and "output='x' is in the way" in str(second)


@pytest.mark.parametrize(("holding", "all_hold"), [((0, 1, 2), True), ((0, 2), False)])
def test_all_learn_whether_all_hold(monkeypatch, holding, all_hold):
    found = together(monkeypatch, 3, lambda s: s.everyone(s.process in holding))
    assert found == [all_hold] * 3


def test_another_command_in_one_process_is_refused_in_all(monkeypatch):
    def work(spread: Spread):
        spread.require_same({"model": "m", "text": "b" if spread.process == 1 else "a"})

    first, second, third = together(monkeypatch, 3, work)
    assert all(isinstance(error, InputError) for error in (first, second, third))
    assert "text of process 1" in str(second) and "model" not in str(second).split(";")[1]
    assert "of process" not in str(first)
    same = together(monkeypatch, 2, lambda spread: spread.require_same({"model": "m"}))
    assert same == [None, None]


def test_a_process_that_cannot_be_reached_is_said(monkeypatch):
    def broken(array):
        raise ValueError("Gloo AllGather failed: Connection reset by peer\ntrace")

    monkeypatch.setattr(spreading.multihost_utils, "process_allgather", broken)
    with pytest.raises(LostProcess, match=r"Connection reset by peer$"):
        Spread(None, 0, 2).everyone(True)


def test_a_mesh_of_one_device_is_none_and_too_large_or_unknown_ones_are_refused():
    assert mesh_of({}) is None and mesh_of({"data": 1}) is None
    with pytest.raises(InputError, match=r"axis 'model' is unknown; choose among data, expert"):
        mesh_of({"model": 2})
    count = jax.local_device_count()
    with pytest.raises(InputError, match=f"takes {count + 1} devices .* has {count};"):
        mesh_of({"data": count + 1})


def test_processes_wait_for_each_other_however_long_one_works(monkeypatch):
    monkeypatch.setattr(spreading, "PATIENCE", 0.05)
    ended = []

    def work(spread: Spread):
        def long():
            time.sleep(0.3 * spread.process)
            ended.append(spread.process)
            return spread.process

        found = spread.awaited(long)
        assert sorted(ended) == [0, 1, 2]
        return found, spread.told(found)

    assert together(monkeypatch, 3, work) == [(n, [0, 1, 2]) for n in range(3)]
    assert ALONE.awaited(lambda: 7) == 7


def test_what_jax_raises_where_a_process_has_ended_is_said_so_unless_memory_ran_out():
    lost, full = "Gloo all-reduce failed\nConnection closed", "RESOURCE_EXHAUSTED: Out of memory"
    with (
        pytest.raises(LostProcess, match=r"^Gloo all-reduce failed$"),
        Spread(None, 0, 2).naming_lost(),
    ):
        raise jax.errors.JaxRuntimeError(lost)
    for spread, words in ((Spread(None, 0, 2), full), (ALONE, lost)):
        with pytest.raises(jax.errors.JaxRuntimeError), spread.naming_lost():
            raise jax.errors.JaxRuntimeError(words)
