"""One writer per output folder: a lock that ends with its process, and says who holds it."""

import datetime
import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from moe_jax.errors import InputError
from moe_jax.files import naming_full_disk
from moe_jax.json_files import read_json

# All are gone once the writer has ended in order.
LOCK, MARKER, HOLDER = FILES = ".lock", ".lock.marker", ".lock.json"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


@contextmanager
def only_writer(output: str | os.PathLike) -> Iterator[None]:
    """Keep every other process, and every other thread, from writing into an output folder.

    The folder is made if it is missing, and gone again if nothing was written. The plans of a sweep
    that lie in it are output folders too: they are held with it. Calls in one thread nest.

    The system ends a lock with the process that holds it, on shared disks too. Where a file system
    has none (NFS without lockd, Lustre without flock) the lock is a file that exists while it is
    held: one that a killed process of this host left is taken over, one of another host is refused
    until somebody who knows that host removes it.

    Args:
      output: the folder.

    Raises:
      InputError: another process writes there, which the message names, or it is a file.
      FullDiskError: something that was written in the meantime did not fit.
    """
    output = Path(output)
    if output.exists() and not output.is_dir():
        raise InputError(f"output={output} is a file; name a folder")
    missing = [folder for folder in (output, *output.parents) if not folder.exists()]
    plans = sorted((output / "plans").glob("*/"))
    try:
        with naming_full_disk(output):
            output.mkdir(parents=True, exist_ok=True)
            with ExitStack() as stack:
                for folder in (output, *plans):
                    stack.enter_context(_held(folder))
                yield
    finally:
        for folder in (*plans, output / "plans", *missing):
            with suppress(OSError):  # it is not empty
                folder.rmdir()


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold one folder's lock."""
    lock, holder = _acquired(folder), folder / HOLDER
    try:
        if lock.lock_counter == 1:
            facts = {"pid": os.getpid(), "host": socket.gethostname(), "started": _now()}
            # In its place, so that no kill leaves a part elsewhere; who reads half of it says less.
            holder.write_text(json.dumps(facts) + "\n", encoding="utf-8")
        yield
    finally:
        if lock.lock_counter == 1:
            holder.unlink(missing_ok=True)
            # While it is held: who has opened it by now sees that it is no file any more.
            (folder / LOCK).unlink(missing_ok=True)
        lock.release()


def _acquired(folder: Path) -> BaseFileLock:
    # One object for each path, so that calls nest.
    how: dict[str, Any] = {"timeout": 0, "is_singleton": True}
    path, cure = folder.resolve(), "wait for it or name another folder"
    lock = FileLock(path / LOCK, fallback_to_soft=False, **how)
    try:
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            cure += f", and if it has died, remove {path / MARKER}"
            lock = SoftFileLock(path / MARKER, **how)
            lock.acquire()
    except Timeout:
        raise InputError(f"{_who(folder)} is writing into {folder}; {cure}") from None
    return lock


def _who(folder: Path) -> str:
    try:
        found = read_json(folder / HOLDER)
        return f"process {found['pid']} on {found['host']}, started {found['started']},"
    except (InputError, OSError, KeyError):  # it has just come, or is about to go
        return "another process"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
