"""The output folder of `paper`: what it was asked and when, so that the same command goes on."""

import datetime
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import yaml

from moe_jax.errors import InputError
from moe_jax.files import LEFTOVER, remove_leftovers, replace_text
from pruning.budget.record import tool_version
from pruning.kit.fitting import fits
from pruning.kit.yaml_files import YAML_ERRORS, read_yaml
from pruning.report.paper_page import PAGE
from pruning.runs.paper_recovery import RECOVERED, STUDENTS
from pruning.stages import writer

COMPARED, TABLES, ROWS = "compare", "paper.md", "paper.csv"
IDENTITY, TIMED = "paper.yaml", "figure-10.json"
# In the order of removal: without its page a folder is an interrupted run.
OURS = (PAGE, TABLES, ROWS, TIMED, RECOVERED, STUDENTS, COMPARED, IDENTITY)


def begin(output: Path, asked: dict[str, Any], *, overwrite: bool) -> dict[str, Any]:
    """Make the output folder, or go on in it.

    Args:
      output: the folder, whose only writer the caller is.
      asked: what decides the rows, as plain values.
      overwrite: begin anew where all of it is there, or something else was asked.

    Returns:
      When the run began, on what device, with which versions, and its model's name.

    Raises:
      InputError: it holds something else that may not be replaced.
    """
    there = {path.name for path in output.glob("*")} - {*writer.FILES}
    there = {name for name in there if not LEFTOVER.fullmatch(name)}
    told = _told(output)
    if there and told is None:
        raise InputError(
            f"output={output} already exists and is no folder of `paper` (it has no {IDENTITY}), "
            "so --overwrite leaves it alone too; name another folder"
        )
    differ = [] if told is None else [n for n in asked if told["asked"].get(n) != asked[n]]
    if differ and not overwrite:
        raise InputError(
            f"output={output} holds tables of another {', '.join(differ)}; name another folder or "
            "add --overwrite"
        )
    if differ or (overwrite and (output / PAGE).is_file()):
        for path in (output / name for name in OURS):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        told = None
    if told is None:
        told = {"asked": asked, "begun": _begun(asked["model"])}
        replace_text(output / IDENTITY, yaml.safe_dump(told, sort_keys=False))
    remove_leftovers(output)
    return told["begun"]


def _begun(model: str) -> dict[str, str]:
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores",
        "moe-jax": tool_version(),
        "jax": jax.__version__,
        "model": Path(model).name,
    }


def _told(output: Path) -> dict[str, Any] | None:
    """What an earlier run was asked, and when it began; None if there was none."""
    try:
        found = read_yaml(output / IDENTITY)
    except YAML_ERRORS:
        return None
    kinds = {"asked": dict[str, Any], "begun": dict[str, Any]}
    is_whole = isinstance(found, dict) and found.keys() == kinds.keys()
    return found if is_whole and all(fits(found[n], kind) for n, kind in kinds.items()) else None
