"""How much memory there is to take, and giving back what is no longer used."""

import ctypes
import gc
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


def free_memory(system: Path = Path("/")) -> int:
    """Bytes that processes can take before the system kills one.

    What the machine has available, caches of files included, and no more than any control group
    of this process has left, which is what a container or a batch system allows.

    Args:
      system: where proc and sys/fs lie.
    """
    room = [_room(group) for group in _groups(system)]
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
