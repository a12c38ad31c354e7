"""Which plan an export was made by: said in a file of its folder, read before it is used."""

from pathlib import Path

import yaml

from convert.checkpoint import Checkpoint
from convert.export_format import FORMATS
from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.budget.record import tool_version
from pruning.kit.progress import Steps

MADE_BY = "provenance.yaml"  # no program that loads the folder reads it
OLDER = "this export was made by an older plan; run `moe-compress export` again"


def provenance_text(base: Checkpoint, plan: PruningPlan) -> str:
    """The content of `MADE_BY`: hashes of plan and dense model, and the version of this tool."""
    told = {"plan": plan.content_hash, "model": base.fingerprint, "moe-jax": tool_version()}
    return yaml.safe_dump(told, sort_keys=False)


def stale_exports(folder: Path, plan: PruningPlan) -> list[Path]:
    """Exports in an output folder that say they were made by another plan than this one."""
    exports = [folder / "exports" / name for name in FORMATS]
    return [path for path in exports if _plan_of(path) not in (None, plan.content_hash)]


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


def _plan_of(export: Path) -> str | None:
    """Hash of the plan that an export says it is of; None if it is not there or does not say."""
    try:
        told = yaml.safe_load((export / MADE_BY).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError):
        return None
    found = told.get("plan") if isinstance(told, dict) else None
    return found if isinstance(found, str) else None
