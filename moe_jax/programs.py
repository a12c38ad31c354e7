"""Compiled programs that a process holds, each of which keeps some of its memory maps."""

from pathlib import Path

import jax

MAPS = Path("/proc/self/maps")
LIMIT = Path("/proc/sys/vm/max_map_count")
SHARE = 0.5  # of the maps that a process may have; the rest is for what runs until the next look


def free_programs() -> bool:
    """Forget every compiled program if the process comes near its last memory map.

    XLA's programs stay in the process until they are forgotten, each with about four memory maps.
    Linux gives a process 65,530 (`vm.max_map_count`); at the next one the compiler dies of a
    segmentation fault. What is needed again is compiled again. Never inside a traced function.

    Returns:
      Whether programs were forgotten; False where the system says nothing of maps.
    """
    try:
        with MAPS.open("rb") as maps:
            held = sum(1 for _ in maps)
        allowed = int(LIMIT.read_text())
    except (OSError, ValueError):
        return False
    if held < SHARE * allowed:
        return False
    jax.clear_caches()
    return True
