"""Which plan and repair made an export: said in a file of its folder, read before it is used."""

from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from convert.checkpoint import Checkpoint
from convert.export_format import FORMATS
from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.budget.record import tool_version
from pruning.kit.progress import Steps
from pruning.kit.yaml_files import YAML_ERRORS, read_yaml
from pruning.shrink.repair_model import SUMMARY

MADE_BY = "provenance.yaml"  # no program that loads the folder reads it
OLDER = "this export was made by an older plan; run `moe-compress export` again"


def provenance_text(base: Checkpoint, plan: PruningPlan, repair: Path | None = None) -> str:
    """The content of `MADE_BY`: hashes of plan, dense model and, if there is one, the repair, and
    the version of this tool."""
    told = {"plan": plan.content_hash, "model": base.fingerprint}
    told |= {} if repair is None else {"repair": repair_hash(repair)}
    told |= {"moe-jax": tool_version()}
    return yaml.safe_dump(told, sort_keys=False)


def stale_exports(folder: Path, plan: PruningPlan) -> list[Path]:
    """Exports in an output folder that say they were made by another plan than this one, or with
    another repair than the one there."""
    exports = [folder / "exports" / name for name in FORMATS]
    current = {"plan": plan.content_hash, "repair": repair_hash(folder / "repair")}
    return [
        path
        for path in exports
        if any(_told(path, name) not in (None, value) for name, value in current.items())
    ]


def is_repaired(export: Path) -> bool:
    """Whether an export says that its weights were repaired."""
    return _told(export, "repair") is not None


def require_current(folder: Path, plan: PruningPlan) -> None:
    """Raise InputError if an export in an output folder was made by another plan than this."""
    if stale := stale_exports(folder, plan):
        raise InputError("\n".join(f"{path}: {OLDER}" for path in stale))


def say_stale(folder: Path, steps: Steps) -> None:
    """Warn of exports that are not of the plan in their output folder, where there is one.

    Args:
      folder: the output folder, or one of the exports in it.
      steps: where the warning goes.
    """
    place = folder.absolute()
    output = place.parent.parent if place.parent.name == "exports" else place
    try:
        plan = PruningPlan.load(output)
    except (InputError, OSError):
        return
    for path in stale_exports(output, plan):
        if place in (output, path):
            steps.say(f"{path}: {OLDER}")


def repair_hash(repair: Path) -> str | None:
    """SHA-256 of what a finished repair says of itself."""
    summary = repair / SUMMARY
    return sha256(summary.read_bytes()).hexdigest() if summary.is_file() else None


def _told(export: Path, name: str) -> str | None:
    """A hash that an export says; None if it is not there or does not say."""
    try:
        told: Any = read_yaml(export / MADE_BY)
    except YAML_ERRORS:
        return None
    found = told.get(name) if isinstance(told, dict) else None
    return found if isinstance(found, str) else None
