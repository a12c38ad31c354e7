"""Ending a command at a chosen file event, and comparing what it leaves with an undisturbed run."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

WRITES = ("replace", "fsync", "posix_fallocate")  # what a full disk refuses
EVENTS = (*WRITES, "mkdir", "unlink", "rmdir")


class Killed(BaseException):
    """Stands for SIGKILL: from here on the process changes no file."""


@contextmanager
def counting(
    folder: Path, at: int, act: Callable[[str], None], kinds: Sequence[str] = EVENTS
) -> Iterator[list[str]]:
    """Call `act` in the place of the file event number `at` (from 1) below a folder.

    Args:
      folder: events elsewhere do not count.
      at: 0 for none.
      act: gets the event's name. If it raises `Killed`, no later event happens either, so that
        `finally` and `except` clean nothing up.
      kinds: the events that count.

    Yields:
      Names of the events so far.
    """
    seen: list[str] = []
    true = {name: getattr(os, name) for name in EVENTS}
    remove, dead = shutil.rmtree, []

    def is_below(place) -> bool:
        path = os.readlink(f"/proc/self/fd/{place}") if isinstance(place, int) else place
        return os.path.abspath(path).startswith(str(folder))

    def watched(name: str):
        def event(place, *arguments, **named):
            if "dir_fd" not in named and is_below(place):
                if dead:
                    return
                seen.extend([name] if name in kinds else [])
                if len(seen) == at and name in kinds:
                    try:
                        act(name)
                    except Killed:
                        dead.append(name)
                        raise
            true[name](place, *arguments, **named)

        return event

    for name in EVENTS:
        setattr(os, name, watched(name))
    shutil.rmtree = lambda path, *a, **named: None if dead else remove(path, *a, **named)
    try:
        yield seen
    finally:
        shutil.rmtree = remove
        for name in EVENTS:
            setattr(os, name, true[name])


def contents(folder: Path) -> dict[str, bytes]:
    """Files below a folder by name, without the folder's own path, dates and seconds."""
    return {
        str(path.relative_to(folder)): _plain(path, folder)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _plain(path: Path, folder: Path) -> bytes:
    content = path.read_bytes().replace(str(folder).encode(), b"OUT")
    if path.name == "report.json":
        found = json.loads(content)
        for name in ("stages", "environment", "command"):
            del found[name]
        return json.dumps(found).encode()
    if path.name == "README.md":  # the card of a recovery says how long it took
        return re.sub(rb"\n\| took \|[^\n]*", b"", content)
    if path.name == "recover.json":
        found = json.loads(content)
        for place, name in ((found, "stages"), (found, "environment"),
                            (found["training"], "seconds"),
                            (found["training"], "peak_memory_bytes")):  # fmt: skip
            del place[name]
        return json.dumps(found).encode()
    if path.name in ("report.html", "recover.html"):  # has all of these
        return b""
    return content
