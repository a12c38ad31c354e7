"""Folders that several processes write together, played by threads, beside those of one."""

from pathlib import Path

import numpy as np
import pytest

from convert import write_folder
from convert.shards import _copy
from moe_jax.errors import InputError, LostProcess
from moe_jax.spread import Spread
from tests.convert.test_writer import SPECS, some_tensors
from tests.support.threads import together


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("shard_bytes", [5e9, 30, 12])
@pytest.mark.parametrize("owners", ["001122", "210210", "000000", "222220"])
def test_processes_leave_the_bytes_that_one_leaves(tmp_path, monkeypatch, shard_bytes, owners):
    tensors = some_tensors()
    extra = {"note": lambda: "once"}
    given = {"config": {"x": 1}, "side_files": None, "shard_bytes": shard_bytes}
    alone = write_folder(tmp_path / "alone", SPECS, tensors.items(), extra_files=extra, **given)

    def work(spread: Spread) -> Path:
        own = [
            (name, value)
            for (name, value), owner in zip(tensors.items(), owners, strict=True)
            if int(owner) == spread.process
        ]
        return write_folder(
            tmp_path / "together", SPECS, own, extra_files=extra, spread=spread, **given
        )

    assert together(monkeypatch, 3, work) == [tmp_path / "together"] * 3
    assert content(tmp_path / "together") == content(alone)
    assert {path.name for path in tmp_path.iterdir()} == {"alone", "together"}


@pytest.mark.parametrize(
    ("own", "words"),
    [("abc,bdef", "b came twice"), ("abc,ef", "1 tensors never came: d"), ("abcdef,", "")],
)
def test_what_is_missing_or_there_twice_is_refused_in_all(tmp_path, monkeypatch, own, words):
    tensors, each = some_tensors(), own.split(",")

    def work(spread: Spread) -> Path:
        given = [(name, tensors[name]) for name in each[spread.process]]
        return write_folder(tmp_path / "out", SPECS, given, {}, None, spread=spread)

    found = together(monkeypatch, 2, work)
    if words:
        assert all(isinstance(one, InputError) and words in str(one) for one in found)
        assert list(tmp_path.iterdir()) == []
    else:
        assert found == [tmp_path / "out"] * 2


def test_what_is_in_the_way_is_said_by_process_0_and_ends_the_others(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    given = [*some_tensors().items()]

    def work(spread: Spread) -> Path:
        return write_folder(tmp_path / "out", SPECS, given, {}, None, spread=spread)

    first, second = together(monkeypatch, 2, work)
    assert isinstance(first, FileExistsError) and "allow overwriting" in str(first)
    assert isinstance(second, LostProcess) and "allow overwriting" in str(second)


def test_a_part_that_is_not_whole_on_this_disk_is_no_endless_copy(tmp_path):
    (tmp_path / "part").write_bytes(b"12")
    with open(tmp_path / "part", "rb") as part, open(tmp_path / "file", "wb") as file:
        with pytest.raises(OSError, match="ended early; do all processes write to the same disk"):
            _copy(part, file, 0, 3)


def test_tensors_in_pieces_smaller_than_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr("convert.shards.PIECE", 4)
    big = np.arange(5, dtype=np.float32)
    specs = {name: (big.dtype, big.shape) for name in "ab"}

    def work(spread: Spread) -> Path:
        given = [("ab"[spread.process], big + spread.process)]
        return write_folder(tmp_path / "out", specs, given, {}, None, spread=spread)

    together(monkeypatch, 2, work)
    data = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert data.endswith(big.tobytes() + (big + 1).tobytes())
