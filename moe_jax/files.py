"""Files and folders that are whole or absent."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

LEFTOVER = re.compile(r"(.+)\.(tmp|old)-\d+")  # named after the process that wrote it


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it: a reader never sees half of one.

    Args:
      file: the file to make or replace.
      write: writes the path it is given.

    Raises:
      OSError: the disk is full or not writable; the old file, if any, is still whole.
    """
    partial = _beside(file, "tmp")
    try:
        write(partial)
        with open(partial, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(partial, file)
    except SafetensorError as error:
        raise OSError(f"{file} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def replace_text(file: Path, text: str) -> None:
    """`replace_file` with text in UTF-8."""
    replace_file(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_synced(file: Path, content: bytes) -> None:
    """Write a file of a folder that is being made, and wait until it is on the disk."""
    with open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder beside its place and rename it: a reader never sees half of one.

    Args:
      folder: the one to make; a folder or file in the way is set aside first and removed last.
      fill: writes into the empty folder that it is given, every file down to the disk.

    Raises:
      OSError: the disk is full or not writable; what was there, if anything, is still whole.
    """
    partial = _beside(folder, "tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        fill(partial)
        _sync(partial)
        _move_into_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_leftovers(folder: Path) -> None:
    """Clean up after killed writers: unfinished files go, a target that was set aside comes back.

    Args:
      folder: where targets lie; may be absent. Nobody else may be writing there.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = LEFTOVER.fullmatch(path.name)
        if not found:
            continue
        target = path.with_name(found[1])
        if found[2] == "old" and not target.exists():
            os.replace(path, target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _beside(target: Path, kind: str) -> Path:
    """Where a process keeps what is not yet (tmp) or no longer (old) in its place."""
    return target.with_name(f"{target.name}.{kind}-{os.getpid()}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename; a folder in the way is set aside first and removed last."""
    if not target.exists():
        os.replace(temporary, target)
        _sync(target.parent)
        return
    old = _beside(target, "old")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old) if old.is_dir() else old.unlink()
