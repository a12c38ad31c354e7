"""What a training run keeps to go on from, as orbax checkpoints."""

from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp


def manager(folder: Path | None) -> ocp.CheckpointManager | None:
    """Keeps the last two checkpoints in a folder; None without one."""
    if folder is None:
        return None
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    return ocp.CheckpointManager(Path(folder).absolute(), options=options)


def resumed(
    manager: ocp.CheckpointManager | None, progress: dict[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Steps done, and the progress of the last checkpoint; 0 and the given one without."""
    latest = None if manager is None else manager.latest_step()
    if manager is None or latest is None:
        return 0, progress
    return latest, dict(manager.restore(latest, args=ocp.args.StandardRestore(progress)))


def save(manager: ocp.CheckpointManager, step: int, progress: dict[str, Any]) -> None:
    """Write the progress after so many steps."""
    manager.save(step, args=ocp.args.StandardSave(progress))
