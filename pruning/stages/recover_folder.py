"""The output folder of a recovery: what identifies the run, and what it writes on its way."""

import dataclasses
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from convert.export_format import FORMATS
from moe_jax.errors import InputError
from moe_jax.files import LEFTOVER, remove_leftovers, replace_text
from moe_jax.json_files import read_json
from pruning.recipe.recover_options import RecoverOptions
from pruning.report.recovery import NAME, PAGE
from pruning.stages import writer
from pruning.stages.made_by import repair_hash
from pruning.stages.recovered import Student
from pruning.text.calibration import TokenBatch

IDENTITY, HISTORY, DELTAS = "recover.yaml", "history.json", "deltas.safetensors"
TRAINING, CHECKPOINTS, PREDICTIONS = "training.json", "checkpoints", "predictions.npy"
EXPORTS = tuple(f"exports/{name}" for name in FORMATS)
# What an older run left goes in this order: the report first, which says that all is there.
OURS = (NAME, PAGE, *EXPORTS, DELTAS, TRAINING, HISTORY, CHECKPOINTS, PREDICTIONS, IDENTITY)
NOT_ITS_OWN = ("overwrite", "scratch", "output")  # decide nothing about the result


class RecoverFolder:
    """Where a recovery writes.

    Args:
      output: the folder.
      student: what was named on the command line.
      options: filled.
      opened: the student.
      texts: what is trained and measured on.

    Attributes:
      checkpoints: folder of those of the training.
      deltas: file of what was trained, once it is.
    """

    def __init__(
        self,
        output: Path,
        student: Path,
        options: RecoverOptions,
        opened: Student,
        texts: Sequence[TokenBatch],
    ) -> None:
        self.output, self.overwrite = output, options.overwrite
        self.scratch = options.scratch_folder
        self.checkpoints, self.deltas = output / CHECKPOINTS, output / DELTAS
        sources = [
            {key: value for key, value in one.items() if key != "path"} for one in texts[0].sources
        ]
        self.identity = {
            "student": os.path.abspath(student),
            "model": opened.base.fingerprint,
            "plan": opened.plan.content_hash,
            "repair": None if opened.repair is None else repair_hash(opened.repair),
            "sources": sources,
            **self.told(options),
        }
        self._history = _History(output / HISTORY)

    @staticmethod
    def told(options: RecoverOptions) -> dict[str, Any]:
        """Options as JSON, but for those that decide nothing."""
        values = json.loads(json.dumps(dataclasses.asdict(options)))
        return {name: value for name, value in values.items() if name not in NOT_ITS_OWN}

    def is_finished(self) -> bool:
        """Whether the folder holds all of this very run."""
        return not self.overwrite and (self.output / NAME).is_file() and self._is_same()

    def prepare(self) -> None:
        """Make the folder, or go on with an interrupted run of the same options in it.

        Raises:
          InputError: it holds something else that may not be replaced.
        """
        there = {path.name for path in self.output.glob("*")} - {*writer.FILES}
        there = {name for name in there if not LEFTOVER.fullmatch(name)}
        goes_on = self._is_same() and not (self.overwrite and (self.output / NAME).is_file())
        if there and not (self.output / IDENTITY).is_file():
            raise InputError(
                f"output={self.output} already exists and is no folder of `recover` (it has no "
                f"{IDENTITY}), so --overwrite leaves it alone too; name another folder"
            )
        if there and not goes_on:
            if not self.overwrite:
                raise InputError(
                    f"output={self.output} already exists and is not an interrupted run of these "
                    "options; name another folder or add --overwrite"
                )
            self._remove(OURS)
        self.output.mkdir(parents=True, exist_ok=True)
        for folder in (self.output, self.output / "exports"):
            remove_leftovers(folder)
        replace_text(self.output / IDENTITY, yaml.safe_dump(self.identity, sort_keys=False))

    def predictions(self, scratch: Path) -> Path:
        """The file of the dense model's predictions."""
        scratch.mkdir(parents=True, exist_ok=True)
        own = self.output.resolve().name
        return scratch / (PREDICTIONS if scratch == self.output else f"{own}-{PREDICTIONS}")

    def finish_training(self, training: dict[str, Any]) -> None:
        """Remember what training took."""
        replace_text(self.output / TRAINING, json.dumps(training) + "\n")

    def training(self) -> dict[str, Any]:
        """What `finish_training` was told."""
        return read_json(self.output / TRAINING)

    def log(self, step: int, means: dict[str, float]) -> None:
        """Remember what training said of the steps up to this one; the time it took is not it."""
        kept = {name: value for name, value in means.items() if name != "steps_per_second"}
        self._history.add({"step": step, **kept})

    def log_held_out(self, step: int, losses: dict[str, float]) -> None:
        """Remember what was measured after so many steps."""
        self._history.add({"step": step, "held_out": losses})

    def log_layer(self, layer: int, losses: dict[str, float]) -> None:
        """Remember what training did to a layer."""
        self._history.add({"layer": layer, **losses})

    def history(self) -> list[dict[str, Any]]:
        """All that was remembered, in order."""
        return self._history.rows()

    def clear_working_files(self) -> None:
        """Remove what only an interrupted run needs."""
        self._remove((CHECKPOINTS, PREDICTIONS, TRAINING, HISTORY))
        self.predictions(self.scratch).unlink(missing_ok=True)

    def _is_same(self) -> bool:
        try:
            stored = yaml.safe_load((self.output / IDENTITY).read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            return False
        return stored == self.identity

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            path = self.output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class _History:
    """Rows in a file; a resumed run writes the rows since its last checkpoint a second time."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def rows(self) -> list[dict[str, Any]]:
        return read_json(self.file)["rows"] if self.file.is_file() else []

    def add(self, row: dict[str, Any]) -> None:
        def place(one: dict[str, Any]) -> tuple[int, bool]:
            return one.get("step", one.get("layer", 0)), "held_out" in one

        kept = [one for one in self.rows() if place(one) != place(row)]
        rows = sorted([*kept, row], key=place)
        replace_text(self.file, json.dumps({"rows": rows}) + "\n")
