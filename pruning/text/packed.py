"""The bytes of a file, unpacked where it is packed, whatever its name."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from moe_jax.errors import InputError

_MAGIC = {"gzip": b"\x1f\x8b", "zstd": b"\x28\xb5\x2f\xfd"}
_MARK = b"\xef\xbb\xbf"  # of byte order, which UTF-8 has not; some systems write it nevertheless
_POINTER = b"version https://git-lfs.github.com/spec/"
_DAMAGED = (gzip.BadGzipFile, EOFError, zlib.error)


def arrow(name: str, path: Path, form: str) -> Any:
    """A module of pyarrow, which reads what the standard library does not.

    Raises:
      InputError: it is not installed.
    """
    try:
        return import_module(name)
    except ImportError:
        raise InputError(
            f"{path} is {form}, which needs pyarrow; pip install 'moe-jax[text]', or pip install "
            "pyarrow"
        ) from None


def packing(path: Path) -> str:
    """How a file is packed: "gzip", "zstd", or "" if it is not.

    Raises:
      InputError: it stands for a file that was not downloaded.
    """
    with path.open("rb") as file:
        head = file.read(len(_POINTER))
    if head == _POINTER:
        raise InputError(
            f"{path} is a Git LFS pointer, not the file that it stands for; run `git lfs pull` or "
            "download it again"
        )
    return next((name for name, magic in _MAGIC.items() if head.startswith(magic)), "")


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file; what is wrong with them, or with text read of them, becomes an
    InputError."""
    form = packing(path)
    damaged = (*_DAMAGED, OSError) if form == "zstd" else _DAMAGED  # OSError: of pyarrow
    try:
        with _opened(path, form) as file:
            yield file
    except damaged as error:
        raise InputError(f"{path} is not whole {form} ({error}); download it again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); convert it first") from None


@contextmanager
def unpacked_text(path: Path, newline: str | None = "") -> Iterator[tuple[TextIO, int]]:
    """The text of a file without a byte-order mark, and how many were left out; errors as
    `unpacked`."""
    with unpacked(path) as file:
        marks = int(starts_with(file, _MARK))
        file.read(len(_MARK) * marks)
        with io.TextIOWrapper(file, "utf-8", newline=newline) as text:
            yield text, marks


def starts_with(file: BinaryIO, head: bytes) -> bool:
    """Whether the bytes that come next are these; they stay there."""
    return file.peek(len(head))[: len(head)] == head  # type: ignore[attr-defined]


def _opened(path: Path, form: str) -> BinaryIO:
    if form == "zstd":
        pyarrow = arrow("pyarrow", path, "packed with zstd")
        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    return gzip.open(path) if form else path.open("rb")  # type: ignore[return-value]
