"""What a sweep leaves behind: its sums step by step, and what may be gone on with. No model."""

import json

import numpy as np
import pytest

from moe_jax.errors import InputError
from moe_jax.files import FullDiskError
from pruning.scores.sweep_log import RECORD, Memory, SweepFolder
from tests.support.threads import together

IDENTITY = {"text": "abc", "parts": 3}
SUMS = {"sum": np.arange(6.0).reshape(3, 2), "norm": np.array([[7.0, 8.0]])}  # three parts; one


@pytest.fixture
def log(tmp_path):
    return SweepFolder(tmp_path / "scoring")


def opened(log, identity=IDENTITY, steps=2, size=24):
    return log.states(identity, steps, log.path.parent / "scratch", size)


def begun(log, steps=1) -> None:
    """Add some steps, with states that say so."""
    with opened(log, steps=steps + 1) as file:
        file.write(b"x" * 24)
        for number in range(steps):
            log.add({name: number + value for name, value in SUMS.items()})


def scratch(log) -> list:
    return sorted((log.path.parent / "scratch").glob("*"))


@pytest.mark.parametrize("kind", ["memory", "folder"])
def test_sums_come_back_by_step_and_part_and_what_is_one_for_all_to_every_part(log, kind):
    if kind == "memory":
        log = Memory()
        for number in range(2):
            log.add({name: number + value for name, value in SUMS.items()})
    else:
        begun(log, steps=2)
    assert log.done == 2
    for step in range(2):
        for part in range(3):
            rows = log.rows(step, part)
            assert rows.keys() == SUMS.keys()
            np.testing.assert_array_equal(rows["sum"], step + SUMS["sum"][part])
            np.testing.assert_array_equal(rows["norm"], step + SUMS["norm"][0])


def test_sums_need_not_be_contiguous(log):
    turned = {"sum": SUMS["sum"].T}
    with opened(log):
        log.add(turned)
    np.testing.assert_array_equal(log.rows(0, 1)["sum"], SUMS["sum"][:, 1])


def test_a_log_of_the_same_sweep_is_gone_on_with(log):
    begun(log)
    (place,) = scratch(log)
    again = SweepFolder(log.path)
    assert again.done == 0 and again.state_bytes == 24
    with opened(again) as file:
        assert again.done == 1
        assert file.read() == b"x" * 24
        file.seek(0)
        file.write(b"y")
        again.add(SUMS)
    assert again.done == 2 and place.read_bytes() == b"y" + b"x" * 23
    np.testing.assert_array_equal(again.rows(0, 2)["sum"], SUMS["sum"][2])
    last = SweepFolder(log.path)
    with opened(last) as file:
        assert file is None and last.done == 2
    # No more steps count than there are to do.
    with opened(last, steps=1) as file:
        assert file is None and last.done == 1


@pytest.mark.parametrize(
    "change", [{"identity": {**IDENTITY, "parts": 4}}, {"size": 25}, {"identity": {}}]
)
def test_a_log_of_another_sweep_is_begun_anew(log, change):
    begun(log)
    (place,) = scratch(log)
    with opened(log, **change) as file:
        assert log.done == 0 and not place.exists()
        assert len(file.read()) == change.get("size", 24)
    assert [path.name for path in log.path.iterdir()] == [RECORD]


def test_an_identity_is_compared_as_json_has_it(log):
    with opened(log, identity={"groups": ("a", "b")}):
        log.add(SUMS)
    with opened(log, identity={"groups": ("a", "b")}):
        assert log.done == 1


@pytest.mark.parametrize("damage", ["[]", "no json", '{"states": 3}', '{"states": "/etc/hosts"}'])
def test_a_damaged_record_counts_as_none_and_names_no_file_of_others(log, damage):
    begun(log)
    (log.path / RECORD).write_text(damage)
    assert log.state_bytes == 0
    with opened(log):
        assert log.done == 0


def test_only_a_file_with_a_name_of_ours_is_taken_for_the_states(log):
    begun(log)
    theirs = log.path.parent / "scoring-0123456789abcdef.states.txt"
    theirs.write_bytes(b"x" * 24)
    told = json.loads((log.path / RECORD).read_text())
    (log.path / RECORD).write_text(json.dumps({**told, "states": str(theirs)}))
    assert log.state_bytes == 0
    log.drop_states()
    log.clear()
    assert theirs.exists() and not log.path.exists() and log.done == 0


def test_steps_count_up_to_the_first_that_is_missing(log):
    begun(log, steps=3)
    (log.path / "step-00001.safetensors").unlink()
    with opened(log, steps=4):
        assert log.done == 1


def test_states_that_are_gone_take_the_steps_with_them(log):
    begun(log)
    log.drop_states()
    assert log.state_bytes == 0 and not scratch(log)
    log.drop_states()  # twice is once
    with opened(log) as file:
        assert log.done == 0 and file.read() == bytes(24)


def test_clearing_leaves_what_is_not_ours(log):
    begun(log)
    log.clear()
    assert not log.path.exists() and not scratch(log) and log.done == 0
    begun(log)
    (log.path / "mine.txt").write_text("x")
    log.clear()
    assert [path.name for path in log.path.iterdir()] == ["mine.txt"]


def test_where_states_do_not_fit_nothing_is_left(log, monkeypatch):
    def full(*_):
        raise FullDiskError(28, "full")

    monkeypatch.setattr("pruning.scores.sweep_log.scratch_file", full)
    with pytest.raises(FullDiskError), opened(log):
        pass
    assert not log.path.exists()


@pytest.mark.parametrize("damage", ["removed", "cut"])
def test_a_step_that_cannot_be_read_is_named_with_the_cure(log, damage):
    begun(log)
    file = log.path / "step-00000.safetensors"
    file.unlink() if damage == "removed" else file.write_bytes(file.read_bytes()[:9])
    with pytest.raises(InputError, match=r"step-00000\.safetensors cannot be read .*remove .*scor"):
        log.rows(0, 0)


def shared(monkeypatch, tmp_path, steps: int) -> list[tuple[int, bytes, int]]:
    """Two processes go on for so many steps of three: steps done before, states, and after."""

    def work(spread):
        log = SweepFolder(tmp_path / "scoring", spread)
        identity = IDENTITY if spread.leads else {}  # that of process 0 counts
        with log.states(identity, 3, tmp_path / "scratch", 24) as file:
            if file is None:
                return log.done, b"", log.done
            before, read = log.done, file.read()
            file.seek(0)
            file.write(bytes([65 + spread.process]) * 24)
            for number in range(before, before + steps):
                log.add({"sum": np.full((3, 2), float(number))} if spread.leads else {})
        if log.done == 3:
            log.drop_states()
        return before, read, log.done

    return together(monkeypatch, 2, work)


def test_processes_go_on_together_each_with_its_states(monkeypatch, tmp_path):
    assert shared(monkeypatch, tmp_path, 2) == [(0, bytes(24), 2)] * 2
    files = {path.name[24:]: path.read_bytes() for path in (tmp_path / "scratch").iterdir()}
    assert files == {".states": b"A" * 24, "-1.states": b"B" * 24}
    assert len([*(tmp_path / "scoring").glob("step-*")]) == 2
    # One more, of a record that only process 0 reads.
    assert shared(monkeypatch, tmp_path, 1) == [(2, b"A" * 24, 3), (2, b"B" * 24, 3)]
    assert not [*(tmp_path / "scratch").iterdir()]
    assert shared(monkeypatch, tmp_path, 0) == [(3, b"", 3)] * 2


@pytest.mark.parametrize("lost", ["", "-1"])
def test_if_one_process_has_lost_its_states_all_begin_anew(monkeypatch, tmp_path, lost):
    shared(monkeypatch, tmp_path, 2)
    names = {path.name[24:]: path for path in (tmp_path / "scratch").iterdir()}
    names[f"{lost}.states"].unlink()
    assert shared(monkeypatch, tmp_path, 1) == [(0, bytes(24), 1)] * 2
    left = [*(tmp_path / "scratch").iterdir()]
    assert len(left) == 2 and not {path.name for path in names.values()} & {p.name for p in left}


def test_fewer_processes_leave_no_states_of_the_others(monkeypatch, tmp_path):
    shared(monkeypatch, tmp_path, 2)
    with SweepFolder(tmp_path / "scoring").states({}, 3, tmp_path / "scratch", 24):
        assert len([*(tmp_path / "scratch").iterdir()]) == 1


def test_states_of_killed_processes_are_gone_once_all_steps_are_known(monkeypatch, tmp_path):
    shared(monkeypatch, tmp_path, 2)
    shared(monkeypatch, tmp_path, 0)
    (tmp_path / "scoring" / "step-00002.safetensors").write_bytes(b"")

    def work(spread):
        log = SweepFolder(tmp_path / "scoring", spread)
        with log.states(IDENTITY, 3, tmp_path / "scratch", 24) as file:
            assert file is None
        log.drop_states()

    assert together(monkeypatch, 2, work) == [None, None]
    assert not [*(tmp_path / "scratch").iterdir()]
