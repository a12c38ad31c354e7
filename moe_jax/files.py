"""Files and folders that are whole or absent."""

import errno
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

# What writers that were killed leave. The digits are random: neither two processes nor two hosts
# that share a disk ever take the same name.
LEFTOVER = re.compile(r"(.+)\.(tmp|old)-[0-9a-f]{16}")
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class FullDiskError(OSError):
    """A file did not fit; the message names it, what is free there, and the cure."""

    def __str__(self) -> str:
        return str(self.strerror)


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """Turn a full disk, a spent quota or too large a file into one message.

    Args:
      path: what is being written, for the message.

    Raises:
      FullDiskError: it did not fit. Of nested calls the innermost names its file.
      OSError: anything else that went wrong while writing.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        code = _code(error)
        if code not in DISK_FULL or isinstance(error, FullDiskError):
            raise
        there = next(folder for folder in path.absolute().parents if folder.exists())
        raise FullDiskError(
            code,
            f"{path} cannot be written: {os.strerror(code)}, {shutil.disk_usage(there).free:,} "
            "bytes are free; free some space, then the same command goes on from here",
        ) from None


def _code(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # Of safetensors it is in the text alone: "... (os error 28)".
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


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
        with naming_full_disk(file):
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
    with naming_full_disk(file), open(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def scratch_file(folder: Path, size: int, name: str | None = None) -> BinaryIO:
    """A file for a process's own use, its space taken before it is used.

    Args:
      folder: where it lies, made if missing.
      size: bytes, at least 1.
      name: of a file that outlives the process. Default none: the system frees its space however
        the process ends.

    Returns:
      The open file, whose content is zero.

    Raises:
      FullDiskError: there is no room for it.
    """
    path = folder / name if name else _beside(folder / "scratch", "tmp")
    with naming_full_disk(folder / f"a scratch file of {size:,} bytes"):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(path, "x+b")
        try:
            if not name:
                path.unlink()
            _allocate(file, size)
        except BaseException:
            file.close()
            path.unlink(missing_ok=True)
            raise
    return file


def _allocate(file: BinaryIO, size: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, 1 << 20):  # macOS
        file.write(bytes(min(1 << 20, size - start)))


def replace_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder beside its place and rename it: a reader never sees half of one.

    Args:
      folder: the one to make; a folder or file in the way is set aside first and removed last.
      fill: writes into the empty folder that it is given, every file down to the disk.

    Raises:
      OSError: the disk is full or not writable; what was there, if anything, is still whole.
    """
    partial = _beside(folder, "tmp")
    try:
        with naming_full_disk(folder):
            partial.mkdir()
            fill(partial)
            _sync(partial)
            move_into_place(partial, folder, _beside(folder, "old"))
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def move_into_place(fresh: Path, target: Path, old: Path) -> None:
    """Rename a folder that is whole; what is in its way is set aside first and removed last.

    Args:
      fresh: the folder, beside its place.
      target: its place.
      old: where what lies there is kept until then.
    """
    if not target.exists():
        os.replace(fresh, target)
        _sync(target.parent)
        return
    os.replace(target, old)
    try:
        os.replace(fresh, target)
    except BaseException:
        os.replace(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old) if old.is_dir() else old.unlink()


def remove_leftovers(folder: Path) -> None:
    """Clean up after killed writers: unfinished files go, a target that was set aside comes back.

    Args:
      folder: where targets lie; may be absent. The caller is its only writer.
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
    """A new name for what is not yet (tmp) or no longer (old) in its place."""
    return target.with_name(f"{target.name}.{kind}-{secrets.token_hex(8)}")


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
