"""What a text file holds, seen in its content; its name decides where that leaves it open."""

from dataclasses import dataclass

from moe_jax.errors import InputError
from pruning.text.json_values import json_layout
from pruning.text.packed import packing, starts_with, unpacked, unpacked_text
from pruning.text.source import PROSE, TextSource
from pruning.text.tables import DELIMITERS, find_delimiter

HEAD = 1 << 16  # characters
_PARQUET = b"PAR1"
_PACKED = {".gz", ".zst", ".zstd"}
_NAMED_JSON = {".json", ".jsonl", ".ndjson", ".jsonlines"}


@dataclass(frozen=True)
class Layout:
    """How documents lie in a file.

    Attributes:
      format: "JSON lines", "JSON", "CSV", "TSV", "parquet" or "prose".
      packing: "gzip", "zstd" or "".
      delimiter: of a table's cells.
    """

    format: str
    packing: str = ""
    delimiter: str = ""

    def __str__(self) -> str:
        return f"{self.format} in {self.packing}" if self.packing else self.format


def find_layout(source: TextSource, most: int) -> Layout:
    """Look at the beginning of a file.

    Args:
      source: the file; what it asks for is what a table is known by.
      most: bytes that may be read to see a first JSON value's end.

    Raises:
      InputError: the file is damaged, is not UTF-8 text, or its name promises parquet.
    """
    path = source.path
    form = packing(path)
    if source.format:
        return Layout(source.format, form)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    named = next((suffix for suffix in reversed(suffixes) if suffix not in _PACKED), "")
    with unpacked(path) as file:
        if starts_with(file, _PARQUET):
            return Layout("parquet", form)
    if named == ".parquet":
        raise InputError(f"{path} is no parquet file; download it again")
    is_json = named in _NAMED_JSON
    with unpacked_text(path) as (text, _):
        found = json_layout(text, most, is_named=is_json) or ("JSON lines" if is_json else "")
    if found:
        return Layout(found, form)
    with unpacked_text(path) as (text, _):
        head = text.read(HEAD)
    if len(head) == HEAD:  # the last line is cut
        head = head[: head.rfind("\n") + 1] or head
    delimiter = find_delimiter(head, source, named=named)
    return Layout(DELIMITERS.get(delimiter, PROSE), form, delimiter)
