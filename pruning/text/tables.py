"""Documents of tables: text with separators and a header, and parquet."""

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

import numpy as np

from moe_jax.errors import InputError
from pruning.text.packed import arrow
from pruning.text.rows import Document, Rows, needed_columns, wanted_fields
from pruning.text.source import TextSource

_NAMED = {".csv": ",", ".tsv": "\t"}
DELIMITERS = {",": "CSV", "\t": "TSV", ";": "CSV"}
MOST_GROUPS = 64  # of a large parquet file: each takes a part of what may be read


def find_delimiter(head: str, source: TextSource, *, named: str) -> str:
    """What separates the cells of a table, "" if a text is none.

    A table's first line names fields that documents can be made of, and each row of the head has
    as many cells; prose has commas, too.

    Args:
      head: the beginning of the text.
      source: which fields are meant.
      named: suffix of the file; one named .csv or .tsv is a table whatever its header.
    """
    lines = list(io.StringIO(head, newline=""))
    for delimiter in DELIMITERS:
        rows = (row for row in _rows_of(lines, delimiter) if row)
        header = next(rows, [])
        is_wanted = any(set(fields) <= set(header) for fields in wanted_fields(source))
        if is_wanted and (named in _NAMED or (len(header) > 1 and _is_table(header, rows))):
            return delimiter
    return _NAMED.get(named, "")


def _is_table(header: list[str], rows: Iterable[list[str]]) -> bool:
    widths = {len(row) for row in rows}
    is_named = len(set(header)) == len(header) and all(n and n == n.strip() for n in header)
    return is_named and widths <= {len(header)}


def _rows_of(lines: Iterable[str], delimiter: str) -> Iterator[list[str]]:
    """Rows until one is cut."""
    try:
        yield from csv.reader(lines, delimiter=delimiter, strict=True)
    except csv.Error:
        return


class _Lines:
    """The lines that end within `most` characters; `is_full` if there were more."""

    def __init__(self, file: TextIO, most: int):
        self.file, self.left, self.is_full = file, most, False

    def __iter__(self) -> Iterator[str]:
        while line := self.file.readline(self.left + 1):
            self.left -= len(line)
            if self.left < 0:
                self.is_full = True
                return
            yield line


def csv_documents(
    file: TextIO, delimiter: str, rows: Rows, most: int
) -> tuple[list[Document], bool]:
    """Documents of the rows that end within `most` characters, and whether these are all rows.

    Raises:
      InputError: quotes do not match, or a row has not as many cells as the header.
    """
    lines, documents, path = _Lines(file, most), [], rows.source.path
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    before = csv.field_size_limit(most)  # 131072 without it; the setting is the process's
    try:
        header = next(filter(None, reader), [])
        for row in filter(None, reader):
            place = f"{path}:{reader.line_num}"
            if len(row) != len(header):
                raise InputError(
                    f"{place} has {len(row)} cells, the header {len(header)}; correct the row, or "
                    f"read the file as it is with {path}:format=prose"
                )
            documents += rows.read(dict(zip(header, row, strict=True)), place)
    except csv.Error as error:
        if not lines.is_full:  # a row that is cut has no last quote
            raise InputError(
                f"{path}:{reader.line_num} is no row of a table ({error}); correct it, or read the "
                f"file as it is with {path}:format=prose"
            ) from None
    finally:
        csv.field_size_limit(before)
    return documents, not lines.is_full


def parquet_documents(rows: Rows, most: int) -> tuple[list[Document], bool]:
    """Documents of a parquet file's rows, about `most` bytes of them.

    Returns:
      The documents in their order, and whether they are all; if not, they are the first ones of
      row groups that are spread over the file.

    Raises:
      InputError: pyarrow is missing, or cannot read the file.
    """
    path = rows.source.path
    parquet: Any = arrow("pyarrow.parquet", path, "parquet")
    documents: list[Document] = []
    try:
        with parquet.ParquetFile(path) as file:
            columns = needed_columns(rows.source, file.schema_arrow.names)
            is_all = _unpacked_size(file.metadata, columns) <= most
            count = file.num_row_groups if is_all else min(MOST_GROUPS, file.num_row_groups)
            groups = np.linspace(0, file.num_row_groups - 1, count).round().astype(int)
            share = left = most if is_all else most // count
            for group in groups.tolist():
                left = left if share == most else share
                batches = file.iter_batches(batch_size=256, row_groups=[group], columns=columns)
                for batch in batches if left > 0 else ():
                    few = max(1, len(batch) * left // batch.nbytes) if batch.nbytes > left else None
                    for row in batch.slice(0, few).to_pylist():
                        documents += rows.read(row, f"{path}, row group {group}:")
                    left -= batch.nbytes
                    if left <= 0:
                        is_all = False
                        break
            return documents, is_all
    except InputError:
        raise
    except (OSError, ValueError, NotImplementedError) as error:  # pyarrow's own are of these
        raise InputError(f"{path} is not whole parquet ({error}); download it again") from None


def _unpacked_size(metadata: Any, columns: list[str]) -> int:
    """Bytes of columns once they are unpacked."""
    chunks = (
        metadata.row_group(group).column(column)
        for group in range(metadata.num_row_groups)
        for column in range(metadata.num_columns)
    )
    return sum(
        chunk.total_uncompressed_size
        for chunk in chunks
        if chunk.path_in_schema.partition(".")[0] in columns
    )
