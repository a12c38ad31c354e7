"""Compiled programs are forgotten before the memory maps of the process run out."""

import jax
import jax.numpy as jnp
import pytest

from moe_jax import programs
from moe_jax.stream import sweep


def held_programs():
    """A jitted function of this call's own, with one compiled program."""
    double = jax.jit(lambda x: 2 * x)
    double(jnp.ones(3))
    assert double._cache_size() == 1
    return double


@pytest.fixture
def limit(tmp_path, monkeypatch):
    def put(maps: int):
        (tmp_path / "max_map_count").write_text(f"{maps}\n")
        monkeypatch.setattr(programs, "LIMIT", tmp_path / "max_map_count")

    return put


def test_programs_stay_while_there_is_room(limit):
    double = held_programs()
    limit(10_000_000)
    assert not programs.free_programs()
    assert double._cache_size() == 1


def test_programs_go_when_half_of_the_maps_are_taken(limit):
    double = held_programs()
    limit(10)
    assert programs.free_programs()
    assert double._cache_size() == 0
    assert double(jnp.ones(3)).tolist() == [2, 2, 2]


def test_a_sweep_looks_before_it_starts(limit):
    double = held_programs()
    limit(10)
    sweep((), None, lambda index, layer, x: x)  # the loops that compile without bound are of sweeps
    assert double._cache_size() == 0


def test_a_system_that_tells_nothing_of_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(programs, "MAPS", tmp_path / "absent")
    assert not programs.free_programs()


@pytest.mark.skipif(not programs.MAPS.exists(), reason="only Linux tells a process its maps")
def test_forgetting_gives_the_maps_back():
    def maps() -> int:
        return len(programs.MAPS.read_text().splitlines())

    jax.clear_caches()
    before = maps()
    kept = [jax.jit(lambda x, n=n: x * n)(jnp.ones(n)) for n in range(3, 43)]
    held = maps()
    jax.clear_caches()
    assert held - before > len(kept) > maps() - before
