"""What a command shows: tables for people on stdout, or its numbers as JSON."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, RenderableType

from moe_jax.errors import InputError
from moe_jax.files import replace_text
from pruning.kit.progress import Screen
from pruning.report.table import TextTable, as_rich

PIPED = 100_000  # columns where nobody looks: no table is folded or cut


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Attributes:
      values: of JSON types.
      shown: tables and lines, in order; text lines are never wrapped.
      pages: files and folders written, to be looked at.
    """

    values: Any
    shown: Sequence[TextTable | RenderableType] = ()
    pages: Sequence[Path] = ()


def stdout() -> Console:
    """Standard output, as wide as its terminal, and without an edge where it is piped."""
    return Screen() if sys.stdout.isatty() else Screen(width=PIPED)


def check_json(path: str | None) -> None:
    """Raise InputError, before any work, if the numbers have no place to go."""
    if path in (None, "-"):
        return
    if Path(path).is_dir():
        raise InputError(f"json={path} is a folder; name a file in it")
    if not Path(path).absolute().parent.is_dir():
        raise InputError(f"json={path} lies in no existing folder; make it first")


def show(outcome: Outcome, json_path: str | None) -> None:
    """Print an outcome and write its numbers where --json asks for them."""
    if json_path is not None:
        text = json.dumps(outcome.values, indent=2) + "\n"
        if json_path == "-":
            sys.stdout.write(text)
            return
        replace_text(Path(json_path), text)
    console = stdout()
    for part in outcome.shown:
        if isinstance(part, str):
            print(part)
            continue
        console.print(as_rich(part) if isinstance(part, TextTable) else part)
        if isinstance(part, TextTable) and part.note:
            console.print(part.note, style="dim", highlight=False, markup=False)
    if outcome.pages:
        print(*outcome.pages, sep="\n")
