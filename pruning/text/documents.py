"""The documents of a text file of any size: as many as are wanted, and little else of it.

A plain text is one document, of which the beginning is read. JSON lines are documents that are
taken in a fixed random order, because files are often sorted by subject:

- A file of up to `WHOLE` bytes, unpacked, is read whole.
- Of a larger one the documents at offsets spread evenly over the file are taken. An offset falls
  into a line; the next line is the document, which thus comes with a chance in proportion to the
  length of the one before it.
- A larger packed file has no offsets: its first `WHOLE` bytes are read.

Where more than `WHOLE` characters are wanted that many bytes count as small. Every choice is the
same in every run.
"""

import gzip
import io
import itertools
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from moe_jax.errors import InputError
from moe_jax.json_files import parse_json
from pruning.kit.words import amount

WHOLE = 256 << 20  # bytes
PROBE = 512  # bytes that a look into a large file counts as, at least: each takes its time
# Multiples of it, modulo 1, are spread evenly however many there are.
GOLDEN = (5.0**0.5 - 1.0) / 2.0
LIGHTEST, HEAVIEST = 1e-9, 1e9  # beyond, sums and quotients of weights lose the others


@dataclass(frozen=True)
class TextSource:
    """One text file: its path, the JSON field that holds the text, and its weight.

    Raises:
      InputError: the weight does not lie in [1e-9, 1e9].
    """

    path: Path
    field: str = "text"
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not LIGHTEST <= self.weight <= HEAVIEST:
            raise InputError(
                f"calibration={f'{self.path}={self.weight}'!r}: the weight after '=' must be a "
                f"positive number in [{LIGHTEST:g}, {HEAVIEST:g}]; write FILE or FILE=2.5"
            )

    @classmethod
    def parse(cls, text: str, field: str = "text") -> "TextSource":
        """Read `FILE` or `FILE=WEIGHT`.

        Raises:
          InputError: if the weight is not a positive number.
        """
        path, separator, weight = text.rpartition("=")
        if not separator or Path(text).exists():
            return cls(Path(text), field)
        try:
            value = float(weight)
        except ValueError:
            raise InputError(
                f"calibration={text!r}: the weight after '=' must be a positive number; write "
                "FILE or FILE=2.5"
            ) from None
        return cls(Path(path), field, value)


@dataclass(frozen=True)
class Documents:
    """What is read of a text file.

    Attributes:
      texts: in the order in which they are to be taken; read while they are.
      part: "all" of the file that counts, its "beginning", or documents "spread" over it.
    """

    texts: Iterable[str]
    part: Literal["all", "beginning", "spread"] = "all"


def open_documents(source: TextSource, characters: int) -> Documents:
    """Documents of a file: one per line of .jsonl or .jsonl.gz, else the text as one.

    Args:
      source: the file.
      characters: as many are wanted; a plain text ends there.

    Returns:
      The documents, none of them blank; see the module for their choice and order.

    Raises:
      InputError: missing or empty file, text that is not UTF-8, a line without the named field or
        of more than `WHOLE` bytes; where the file is large, while the texts are taken.
    """
    path, most = source.path, max(WHOLE, characters)
    if not path.is_file():
        raise InputError(f"text file {path} does not exist; check the path")
    if ".jsonl" not in path.suffixes:
        return Documents(_require_text(source, iter([_beginning(source, characters)])))
    if path.suffix != ".gz" and (size := path.stat().st_size) > most:
        return Documents(_require_text(source, _spread(source, size, most)), "spread")
    texts, is_all = _first_lines(source, most)
    order = np.random.default_rng(0).permutation(len(texts))
    shuffled = (texts[i] for i in order)
    return Documents(_require_text(source, shuffled), "all" if is_all else "beginning")


def _require_text(source: TextSource, texts: Iterator[str]) -> Iterator[str]:
    """The same; InputError if there is none, or only a blank one."""
    first = next(texts, "")
    if not first.strip():
        raise InputError(f"{source.path} holds no text; give a file with at least a few pages")
    return itertools.chain([first], texts)


def _beginning(source: TextSource, characters: int) -> str:
    # A text is the same whatever system wrote it: newline=None reads all line ends as "\n".
    with _opened(source.path) as file, io.TextIOWrapper(file, "utf-8", newline=None) as text:
        return text.read(characters)


def _first_lines(source: TextSource, most: int) -> tuple[list[str], bool]:
    """Documents of the lines that end within `most` bytes, and whether these are all lines."""
    texts: list[str] = []
    with _opened(source.path) as file:
        left = most
        for number in itertools.count(1):
            line = file.readline(left + 1)
            left -= len(line)
            if not line:
                return texts, True
            if left < 0:
                if not texts:
                    raise _too_long(source, most)
                return texts, False
            texts += _documents(line, source, f"{source.path}:{number}")
    raise AssertionError("unreachable")


def _spread(source: TextSource, size: int, most: int) -> Iterator[str]:
    """Documents behind evenly spread offsets, each once, until `most` bytes are read."""
    seen: set[int] = set()
    left = most
    with _opened(source.path) as file:
        for number in itertools.count():
            offset = file.seek(int(size * (number * GOLDEN % 1.0)))
            # In the middle of a line, most likely.
            start = offset + (len(_line(file, source, most)) if offset else 0)
            line = b"" if start in seen else _line(file, source, most)
            seen.add(start)
            yield from _documents(line, source, f"{source.path}, byte {start}:")
            left -= max(PROBE, start - offset + len(line))
            if left < 0:
                return


def _line(file: BinaryIO, source: TextSource, most: int) -> bytes:
    line = file.readline(most + 1)
    if len(line) > most:
        raise _too_long(source, most)
    return line


def _documents(line: bytes, source: TextSource, place: str) -> list[str]:
    """The document of a JSON line; none of a blank line or text."""
    text = line.decode("utf-8").removesuffix("\n")
    if not text.strip():
        return []
    try:
        value = parse_json(text)
    except InputError as error:
        raise InputError(f"{place} {error}; expected JSON lines") from None
    if isinstance(value, dict):
        known, value = ", ".join(value), value.get(source.field)
    else:
        known = type(value).__name__
    if not isinstance(value, str):
        raise InputError(
            f"{place} has no text in field {source.field!r} (found: {known[:1000]}); name "
            "the right field with --text-field"
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{place} holds half of a character ({error}); correct or remove the line"
        ) from None
    return [value] if value.strip() else []


def _too_long(source: TextSource, most: int) -> InputError:
    return InputError(
        f"{source.path} has a line of more than {amount(most)}; write a JSON document a line, or "
        "name a plain text file otherwise than .jsonl"
    )


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes of a file, unpacked; what is wrong with them becomes an InputError."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            yield file  # type: ignore[misc]
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not whole gzip ({error}); download it again") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error}); convert it first") from None
