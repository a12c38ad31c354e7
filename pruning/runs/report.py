"""The report of a finished run, shown again beside the plan that the folder holds now."""

import os
from pathlib import Path

from moe_jax.errors import InputError
from pruning.budget.plan import PruningPlan
from pruning.kit.progress import Steps
from pruning.report import compression_page
from pruning.report.compression import CompressionReport
from pruning.report.task_table import compared_table
from pruning.stages.judged import compared
from pruning.stages.made_by import say_stale

OLDER = (
    "this report is of an older plan than the one in this folder: its sizes and losses are not "
    "those of plan.json"
)


def report(folder: str | os.PathLike, steps: Steps | None = None) -> CompressionReport:
    """Read a finished run's report and write report.html again, with the tasks that were measured
    since, and marked if the plan has changed.

    Args:
      folder: holds report.json.
      steps: where it is said what is older than the plan; default stderr.

    Returns:
      The report, as it was measured.

    Raises:
      InputError: there is none, or it is damaged.
    """
    folder, steps = Path(folder), steps or Steps()
    found = CompressionReport.load(folder / "report.json")
    older = not _is_of(found, folder)
    if older:
        steps.say(f"{folder / 'report.json'}: {OLDER}")
    say_stale(folder, steps)
    tasks = [compared_table(name, rows) for name, rows in compared(folder).items()]
    compression_page.save(found, folder, OLDER if older else "", tasks)
    return found


def _is_of(found: CompressionReport, folder: Path) -> bool:
    """Whether a report is of the plan in its folder, as far as both can be read."""
    try:
        plan = PruningPlan.load(folder)
    except (InputError, OSError):
        return True
    return found.plan.get("content_hash", plan.content_hash) == plan.content_hash
