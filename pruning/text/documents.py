"""The documents of a text file of any size: as many as are wanted, and little else of it.

What the file is, its content says (`pruning.text.layout`). Prose is one document, of which the
beginning is read. Rows are documents that are taken in a fixed random order, because files are
often sorted by subject:

- A file of up to `WHOLE` bytes, unpacked, is read whole.
- Of larger JSON lines the documents at offsets spread evenly over the file are taken. An offset
  falls into a line; the next line is the document, which thus comes with a chance in proportion to
  the length of the one before it.
- Of larger parquet the first rows of row groups spread evenly over the file are read.
- All else has no offsets at which a row may begin (packed, a JSON array, CSV): its first `WHOLE`
  bytes are read.

Where more than `WHOLE` characters are wanted that many bytes count as small. Every choice is the
same in every run.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np

from moe_jax.errors import InputError
from moe_jax.json_files import parse_json
from pruning.kit.words import amount
from pruning.text.json_values import JsonText
from pruning.text.layout import Layout, find_layout
from pruning.text.packed import unpacked, unpacked_text
from pruning.text.rows import Document, Rows
from pruning.text.source import PROSE, TextSource
from pruning.text.tables import csv_documents, parquet_documents

WHOLE = 256 << 20  # bytes
PROBE = 512  # bytes that a look into a large file counts as, at least: each takes its time
# Multiples of it, modulo 1, are spread evenly however many there are.
GOLDEN = (5.0**0.5 - 1.0) / 2.0

Part = Literal["all", "beginning", "spread"]


@dataclass(frozen=True)
class Documents:
    """What is read of a text file.

    Attributes:
      texts: in the order in which they are to be taken; read while they are.
      layout: what the file is.
      rows: counts rows while the texts are taken, and knows which field they are made of.
      part: "all" of the file that counts, its "beginning", or documents "spread" over it.
    """

    texts: Iterable[Document]
    layout: Layout
    rows: Rows
    part: Part = "all"


def open_documents(source: TextSource, characters: int) -> Documents:
    """Documents of a file: a row each, else the text as one.

    Args:
      source: the file.
      characters: as many are wanted; prose ends there.

    Returns:
      The documents, none of them blank; see the module for their choice and order.

    Raises:
      InputError: missing or empty file, text that is not UTF-8, a row without the fields that are
        meant or of more than `WHOLE` bytes; where the file is large, while the texts are taken.
    """
    path, most, rows = source.path, max(WHOLE, characters), Rows(source)
    if not path.is_file():
        raise InputError(f"text file {path} does not exist; check the path")
    layout = find_layout(source, most)
    size = path.stat().st_size
    if layout.format == PROSE:
        texts, part = _beginning(rows, characters), "all"
    elif layout == Layout("JSON lines") and size > most:
        texts, part = _spread(rows, size, most), "spread"
    else:
        found, part = _read(layout, rows, most)
        order = np.random.default_rng(0).permutation(len(found))
        texts = (found[i] for i in order)
    return Documents(_require_text(rows, texts), layout, rows, part)


def _read(layout: Layout, rows: Rows, most: int) -> tuple[list[Document], Part]:
    """Documents of rows that lie within `most` bytes, in their order."""
    if layout.format == "parquet":
        if layout.packing:
            raise InputError(f"{rows.source.path} is packed parquet; unpack it first")
        found, is_all = parquet_documents(rows, most)
        return found, "all" if is_all else "spread"
    if layout.format == "JSON lines":
        with unpacked(rows.source.path) as file:
            found, is_all = _first_lines(file, rows, most)
    else:
        with unpacked_text(rows.source.path) as (text, rows.marks):
            if layout.format == "JSON":
                found, is_all = _json_rows(JsonText(text, most), rows)
            else:
                found, is_all = csv_documents(text, layout.delimiter, rows, most)
    if not (found or is_all):
        raise _too_long(rows, most)
    return found, "all" if is_all else "beginning"


def _require_text(rows: Rows, texts: Iterator[Document]) -> Iterator[Document]:
    """The same; InputError if there is none, or only a blank one."""
    first = next(texts, "")
    if isinstance(first, str) and not first.strip():
        why = f" ({rows.lacking()})" if rows.lacking() else ""
        raise InputError(
            f"{rows.source.path} holds no text{why}; give a file with at least a few pages"
        )
    return itertools.chain([first], texts)


def _beginning(rows: Rows, characters: int) -> Iterator[str]:
    # A text is the same whatever system wrote it: newline=None reads all line ends as "\n".
    with unpacked_text(rows.source.path, newline=None) as (text, rows.marks):
        yield text.read(characters)


def _first_lines(file: BinaryIO, rows: Rows, most: int) -> tuple[list[Document], bool]:
    """Documents of the lines that end within `most` bytes, and whether these are all lines."""
    found: list[Document] = []
    left = most
    for number in itertools.count(1):
        line = file.readline(left + 1)
        left -= len(line)
        if not line:
            return found, True
        if left < 0:
            return found, False
        found += _documents(line, rows, f"{rows.source.path}:{number}")
    raise AssertionError("unreachable")


def _spread(rows: Rows, size: int, most: int) -> Iterator[Document]:
    """Documents behind evenly spread offsets, each once, until `most` bytes are read."""
    seen: set[int] = set()
    left = most
    with unpacked(rows.source.path) as file:
        for number in itertools.count():
            offset = file.seek(int(size * (number * GOLDEN % 1.0)))
            # In the middle of a line, most likely.
            start = offset + (len(_line(file, rows, most)) if offset else 0)
            line = b"" if start in seen else _line(file, rows, most)
            seen.add(start)
            yield from _documents(line, rows, f"{rows.source.path}, byte {start}:")
            left -= max(PROBE, start - offset + len(line))
            if left < 0:
                return


def _line(file: BinaryIO, rows: Rows, most: int) -> bytes:
    line = file.readline(most + 1)
    if len(line) > most:
        raise _too_long(rows, most)
    return line


def _documents(line: bytes, rows: Rows, place: str) -> list[Document]:
    """The document of a JSON line; none of a blank line or text."""
    text = line.decode("utf-8").removesuffix("\n")
    # Files that were joined have marks inside.
    rows.marks += text.startswith("\ufeff")
    text = text.removeprefix("\ufeff")
    if not text.strip():
        return []
    try:
        value = parse_json(text)
    except InputError as error:
        raise InputError(
            f"{place} {error}; expected JSON lines, or name {rows.source.path}:format=prose"
        ) from None
    return rows.read(value, place)


def _json_rows(text: JsonText, rows: Rows) -> tuple[list[Document], bool]:
    """Documents of JSON objects that end within the limit of the text, and whether these are
    all."""
    found: list[Document] = []
    path, values = rows.source.path, text.values()
    for number in itertools.count(1):
        try:
            value = next(values, None)
        except InputError as error:
            raise InputError(
                f"{path}, row {number}: {error}; correct it, download it again, or read the file "
                f"as it is with {path}:format=prose"
            ) from None
        if value is None:
            return found, not text.is_full
        found += rows.read(value, f"{path}, row {number}:")
    raise AssertionError("unreachable")


def _too_long(rows: Rows, most: int) -> InputError:
    return InputError(
        f"{rows.source.path} has a line of more than {amount(most)}; write a JSON document a line, "
        f"or name a plain text with {rows.source.path}:format=prose"
    )
