"""Files that are whole or absent."""

import os
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError


def replace_file(file: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and rename it: a reader never sees half of one.

    Args:
      file: the file to make or replace.
      write: writes the path it is given.

    Raises:
      OSError: the disk is full or not writable; the old file, if any, is still whole.
    """
    partial = file.with_name(f"{file.name}.tmp-{os.getpid()}")
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
