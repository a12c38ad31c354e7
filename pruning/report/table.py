"""Tables of strings: what a terminal prints and a page shows."""

import re
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table

LONGEST_NAME = 32  # characters; longer cells without a space are paths


@dataclass(frozen=True)
class TextTable:
    """A titled table of strings; a row that starts with "" belongs to the row above.

    Attributes:
      title: a word or two.
      header: column names.
      rows: cells.
      note: how to read it, one sentence.
    """

    title: str
    header: list[str]
    rows: list[list[str]]
    note: str = ""

    def is_number(self, column: int) -> bool:
        """Whether a column holds numbers only, which people compare by their last digits."""
        cells = [row[column] for row in self.rows]
        return any(cells) and all(re.fullmatch(r"[-+\d.,%]*", cell) for cell in cells)


def is_name(cell: str) -> bool:
    """Whether a cell is the name of a rule or a format, which is not broken at its hyphens."""
    return "-" in cell and " " not in cell and len(cell) <= LONGEST_NAME


def as_rich(table: TextTable) -> Table:
    """A table for a terminal."""
    shown = Table(
        title=table.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD,
        pad_edge=False, padding=(0, 1, 0, 0),
    )  # fmt: skip
    for column, name in enumerate(table.header):
        numbers = table.is_number(column)
        # Names of formats and variants stay whole; longer ones, such as files', may fold.
        least = min(13, max(len(row[column]) for row in table.rows)) if table.rows else None
        shown.add_column(
            name, justify="right" if numbers else "left", overflow="fold",
            min_width=None if numbers else least,
        )  # fmt: skip
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown
