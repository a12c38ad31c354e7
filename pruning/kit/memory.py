"""How much memory there is to take, what may be spent, and giving back what is no longer used."""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import psutil

LIMITS = (  # of a control group, version 2 and 1: its limit, its use, what of that is files
    ("memory.max", "memory.current", ("active_file", "inactive_file")),
    (
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
)
M_MMAP_THRESHOLD, LARGE_BLOCK = -3, 1 << 20  # glibc's malloc.h: its number; bytes


@dataclass(frozen=True)
class Allowance:
    """How much memory may be spent, most of it on speed: nothing of this changes a result.

    Attributes:
      limit: most bytes that this process and those it starts take; None for all that is free.
      room: most bytes of hidden states, or of experts' rows, that a stage keeps in memory; None
        for as many as it usually does. Others go to a scratch file or are computed again.
      read_ahead: whether a layer, or a group of its experts, is read while the one before it is at
        work.
      experts: most experts of a layer that are in memory together, where what is done can take a
        layer in groups; None for all.
    """

    limit: int | None = None
    room: int | None = None
    read_ahead: bool = True
    experts: int | None = None

    @property
    def reading(self) -> tuple[bool, int | None]:
        """What a checkpoint has to know of it: `read_ahead` and `experts_at_once`."""
        return self.read_ahead, self.experts

    def of(self, usual: int) -> int:
        """Bytes that something may keep which usually keeps so many."""
        return usual if self.room is None else min(usual, self.room)


AMPLE = Allowance()
_ALLOWANCE: ContextVar[Allowance] = ContextVar("allowance", default=AMPLE)


def allowance() -> Allowance:
    """That of the run at work."""
    return _ALLOWANCE.get()


@contextmanager
def allowing(found: Allowance) -> Iterator[None]:
    """Give what runs inside another allowance."""
    before = _ALLOWANCE.set(found)
    try:
        yield
    finally:
        _ALLOWANCE.reset(before)


def own_memory() -> int:
    """Bytes that this process takes."""
    return psutil.Process().memory_info().rss


def free_memory(system: Path = Path("/")) -> int:
    """Bytes that processes can take before the system kills one, or beyond an allowance's limit.

    What the machine has available, caches of files included, and no more than any control group
    of this process has left, which is what a container or a batch system allows.

    Args:
      system: where proc and sys/fs lie.
    """
    room = [_room(group) for group in _groups(system)]
    if (limit := allowance().limit) is not None:
        room.append(limit - own_memory())
    return max(0, min([psutil.virtual_memory().available, *(n for n in room if n is not None)]))


def release_memory() -> None:
    """Give the system what this process has freed: glibc keeps it, and stages add up."""
    gc.collect()
    trim_heap()


def trim_heap() -> None:
    """As `release_memory`, of what nothing holds: a matter of milliseconds, for inside of a stage.

    glibc keeps freed blocks of up to 32 MB, as most arrays of one layer are.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def keep_no_large_block() -> None:
    """Let glibc give every large array back to the system as soon as nothing holds it.

    By itself it keeps freed blocks of up to 32 MB in heaps of every thread, from where no
    `release_memory` gets those below a block in use: stages that follow each other in one process
    took 770 MB where 570 suffice (tests/pruning/runs/test_memory_limit.py), in the same time.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(M_MMAP_THRESHOLD, LARGE_BLOCK)


def _groups(system: Path) -> list[Path]:
    """Folders of the memory control groups of this process, and of those around them.

    In a container the path of the group is often one of the host, which is not mounted: its own
    group is the root then.
    """
    try:
        lines = (system / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # not Linux
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = system / "sys/fs/cgroup" / ("memory" if controllers else "")
        group = root / path.strip("/")
        found += [group, *(above for above in group.parents if above.is_relative_to(root))]
    return found


def _room(group: Path) -> int | None:
    """Bytes that a control group has left; None if it has no limit."""
    for limit, usage, files in LIMITS:
        try:
            most, used = (group / limit).read_text(), (group / usage).read_text()
            lines = (group / "memory.stat").read_text().splitlines()
        except OSError:
            continue
        if most.strip() == "max":
            return None
        # Files in memory give way to processes.
        stat = dict(line.split(maxsplit=1) for line in lines)
        return int(most) - int(used) + sum(int(stat.get(name, 0)) for name in files)
    return None
