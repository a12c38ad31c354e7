"""The output folder of a recovery: what identifies the run, and what it writes on its way."""

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from convert.checkpoint import Checkpoint
from convert.export_format import FORMATS
from moe_jax.errors import InputError
from moe_jax.files import LEFTOVER, remove_leftovers, replace_text
from moe_jax.json_files import read_json
from pruning.kit.progress import OnStep, peak_memory
from pruning.kit.yaml_files import YAML_ERRORS, read_yaml
from pruning.recipe.recover_options import RecoverOptions
from pruning.report.recovery import NAME, PAGE
from pruning.stages import writer
from pruning.stages.adapter import FOLDER as ADAPTER
from pruning.stages.made_by import repair_hash
from pruning.stages.recover_job import RecoverJob

IDENTITY, HISTORY, DELTAS = "recover.yaml", "history.json", "deltas.safetensors"
TRAINING, CHECKPOINTS, PREDICTIONS = "training.json", "checkpoints", "predictions.npy"
EXPORTS = tuple(f"exports/{name}" for name in FORMATS)
# What an older run left goes in this order: the report first, which says that all is there.
OURS = (NAME, PAGE, *EXPORTS, ADAPTER, DELTAS, TRAINING, HISTORY, CHECKPOINTS, PREDICTIONS)
NOT_ITS_OWN = ("overwrite", "scratch", "output")  # decide nothing about the result


class RecoverFolder:
    """Where a recovery writes.

    Args:
      folder: what was named on the command line.
      run: the recovery.

    Attributes:
      checkpoints: folder of those of the training.
      deltas: file of what was trained, once it is.
      identity: what decides the result; a run of another one is not gone on with.
    """

    def __init__(self, folder: Path, run: RecoverJob) -> None:
        options, student = run.options, run.student
        self.output, self.overwrite = run.output, options.overwrite
        self.scratch = options.scratch_folder
        self.checkpoints, self.deltas = self.output / CHECKPOINTS, self.output / DELTAS
        sources = [
            {key: value for key, value in one.items() if key != "path"} for one in run.text.sources
        ]
        export = student.source if isinstance(student.source, Checkpoint) else None
        self.identity = {
            "student": os.path.abspath(folder),
            "weights": None if export is None else export.fingerprint,
            "model": student.base.fingerprint,
            "plan": student.plan.content_hash,
            "repair": None if student.repair is None else repair_hash(student.repair),
            "formats": {name: form.group_size for name, form in run.forms.items()},
            "sources": sources,
            **self.told(options),
        }
        self._history = _History(self.output / HISTORY)

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
            # Nobody's run: killed from here on, what is left of the older one is removed again.
            self.predictions(self._stored()).unlink(missing_ok=True)
            replace_text(self.output / IDENTITY, "{}\n")
            self._remove(OURS)
        self.output.mkdir(parents=True, exist_ok=True)
        for name in (".", "exports", *EXPORTS):  # cards are written again in exports
            remove_leftovers(self.output / name)
        replace_text(self.output / IDENTITY, yaml.safe_dump(self.identity, sort_keys=False))

    def predictions(self, identity: Any = None) -> Path:
        """The file of the dense model's predictions, in a shared folder one of this very run.

        Args:
          identity: of another run in this folder; default its own.
        """
        self.scratch.mkdir(parents=True, exist_ok=True)
        if self.scratch == self.output:
            return self.output / PREDICTIONS
        place = self.output.resolve()
        told = json.dumps([str(place), identity or self.identity], sort_keys=True)
        return self.scratch / f"{place.name}-{sha256(told.encode()).hexdigest()[:16]}-{PREDICTIONS}"

    @contextmanager
    def session(self, on_step: OnStep) -> Iterator[OnStep]:
        """Add what a session of the training takes to what earlier ones took; its steps are to be
        told to the value, which passes them on."""
        spent = _Spent(self.output / TRAINING)

        def step(done: int, total: int) -> None:
            on_step(done, total)
            spent.tell(after=1.0)

        try:
            yield step
        finally:
            spent.tell()

    def finish_training(self, found: dict[str, Any]) -> dict[str, Any]:
        """Remember what was trained; the value is that and what all sessions took."""
        training = self.training() | found
        replace_text(self.output / TRAINING, json.dumps(training) + "\n")
        return training

    def training(self) -> dict[str, Any]:
        """What `session` and `finish_training` remember."""
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
        self.predictions().unlink(missing_ok=True)

    def _is_same(self) -> bool:
        return self._stored() == self.identity

    def _stored(self) -> Any:
        """The identity in the folder; None if there is none that can be read."""
        try:
            return read_yaml(self.output / IDENTITY)
        except YAML_ERRORS:
            return None

    def _remove(self, names: Sequence[str]) -> None:
        for name in names:
            path = self.output / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


class _Spent:
    """Time and memory of a training, summed over its sessions in a file as they go on; of one that
    was killed at most the time since it was told last is missing."""

    def __init__(self, file: Path) -> None:
        self.file, self.begun = file, time.monotonic()
        self.before = {"seconds": 0.0, "peak_memory_bytes": 0}
        self.before |= read_json(file) if file.is_file() else {}
        self.told = self.begun

    def tell(self, after: float = 0.0) -> None:
        """Write them down, unless that was done less than so many seconds ago."""
        now = time.monotonic()
        if now - self.told < after:
            return
        self.told = now
        peak = peak_memory(since_reset=Path("/proc/self/status").is_file())
        found = {
            "seconds": round(self.before["seconds"] + now - self.begun, 2),
            "peak_memory_bytes": max(self.before["peak_memory_bytes"], peak),
        }
        replace_text(self.file, json.dumps(self.before | found) + "\n")


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
