"""What tasks showed of the exports of a run, kept beside their results for its report."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.model_card import CARD
from moe_jax.errors import InputError
from moe_jax.files import remove_leftovers, replace_text
from moe_jax.json_files import read_json
from pruning.kit.fitting import misfits
from pruning.measure.paired import Paired
from pruning.report.task_table import card_section
from pruning.stages.made_by import MADE_BY

RESULTS = "tasks"  # in the output folder of a run
COMPARED = "compared.json"
ON_CARD = re.compile(r"(?s)(^## Tasks\n((?!^## ).)*)?(?=^## What was compared\n)", re.MULTILINE)


def keep_compared(results: Path, export: Path, rows: Sequence[Paired]) -> None:
    """Add rows of an export to the file, and show all that are there on its model card; they
    replace those of the same tasks, and all of an export that was made otherwise.

    Args:
      results: folder of the file.
      export: what was measured beside the dense model.
      rows: of it.
    """
    path, made = results / COMPARED, _made(export)
    told = _read(path)
    before = told.get(export.name, {})
    tasks = {row.task for row in rows}
    older = before.get("rows", []) if before.get("made") == made else []
    kept = [row for row in older if row["task"] not in tasks]
    told[export.name] = {"made": made, "rows": [*kept, *(row.to_dict() for row in rows)]}
    replace_text(path, json.dumps(told, indent=1) + "\n")
    card = export / CARD
    if card.is_file():
        section = card_section(export.name, told[export.name]["rows"])
        before = card.read_text(encoding="utf-8")
        remove_leftovers(export)
        replace_text(card, ON_CARD.sub(lambda _: section, before, count=1))


def compared(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows, as of `Paired.to_dict`, of the exports of a run that are still those measured.

    Raises:
      InputError: the file is damaged.
    """
    told = _read(run / RESULTS / COMPARED)
    return {
        name: found["rows"]
        for name, found in told.items()
        if found["made"] is not None and found["made"] == _made(run / "exports" / name)
    }


def _made(export: Path) -> str | None:
    """What an export says of how it was made; None if it says nothing."""
    try:
        return (export / MADE_BY).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    told = read_json(path)
    if not all(isinstance(one, dict) and _is_sound(one) for one in told.values()):
        raise InputError(f"{path} is damaged; remove it, and measure the tasks again")
    return told


def _is_sound(found: dict[str, Any]) -> bool:
    rows = found.get("rows")
    return "made" in found and isinstance(rows, list) and all(
        isinstance(row, dict)
        and not misfits(Paired, {name: row[name] for name in row.keys() - {"within_noise"}})
        and "within_noise" in row
        for row in rows
    )  # fmt: skip
