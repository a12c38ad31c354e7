"""The output folder of a recovery: what identifies the run, and what it writes on its way."""

import dataclasses
import glob
import itertools
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from convert.checkpoint import Checkpoint
from convert.export_format import FORMATS
from moe_jax.errors import InputError
from moe_jax.files import LEFTOVER, remove_leftovers, replace_text
from moe_jax.json_files import read_json
from moe_jax.spread import ALONE, Spread
from pruning.kit.progress import OnStep, peak_memory
from pruning.kit.yaml_files import YAML_ERRORS, read_yaml
from pruning.recipe.recover_options import RecoverOptions
from pruning.recovery.course import own_part
from pruning.report.recovery import NAME, PAGE, RecoveryReport
from pruning.stages import writer
from pruning.stages.adapter import FOLDER as ADAPTER
from pruning.stages.made_by import repair_hash
from pruning.stages.recover_job import RecoverJob

IDENTITY, HISTORY, DELTAS = "recover.yaml", "history.json", "deltas.safetensors"
TRAINING, CHECKPOINTS, PREDICTIONS = "training.json", "checkpoints", "predictions"
KEPT = "dense"  # how names of predictions begin that are kept for other runs
EXPORTS = tuple(f"exports/{name}" for name in FORMATS)
# What an older run left goes in this order: the report first, which says that all is there.
OURS = (NAME, PAGE, *EXPORTS, ADAPTER, DELTAS, TRAINING, HISTORY, CHECKPOINTS)
NOT_ITS_OWN = (
    "overwrite",
    "scratch",
    "keep_predictions",
    "output",
)  # decide nothing about the result


class RecoverFolder:
    """Where a recovery writes.

    Args:
      folder: what was named on the command line.
      run: the recovery.
      spread: the processes that train; of these, process 0 alone writes the history.

    Attributes:
      checkpoints: folder of those of the training.
      deltas: file of what was trained, once it is.
      identity: what decides the result; a run of another one is not gone on with.
    """

    def __init__(self, folder: Path, run: RecoverJob, spread: Spread = ALONE) -> None:
        options, student, self.spread = run.options, run.student, spread
        self.run, self.output, self.overwrite = run, run.output, options.overwrite
        self.keeps_predictions = options.keep_predictions
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
            # Rows of experts then lie in another order in checkpoints.
            **({"experts_shared_by": spread.parts} if spread.parts > 1 else {}),
        }
        self._history = _History(self.output / HISTORY, spread.leads)

    @staticmethod
    def told(options: RecoverOptions) -> dict[str, Any]:
        """Options as JSON, but for those that decide nothing."""
        values = json.loads(json.dumps(dataclasses.asdict(options)))
        return {name: value for name, value in values.items() if name not in NOT_ITS_OWN}

    def is_finished(self) -> bool:
        """Whether the folder holds all of this very run, and its exports were right."""
        file = self.output / NAME
        if self.overwrite or not file.is_file() or not self._is_same():
            return False
        return all(check["ok"] for check in RecoveryReport.load(file).verification)

    def prepare(self) -> Any:
        """Make the folder, or go on with an interrupted run of the same options in it.

        Returns:
          The identity of the run that was there and is replaced, whose predictions other processes
          may have, too; None if there was none.

        Raises:
          InputError: it holds something else that may not be replaced.
        """
        there = {path.name for path in self.output.glob("*")} - {*writer.FILES}
        there = {name for name in there if not LEFTOVER.fullmatch(name)}
        replaced = None
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
            replaced = self._stored()
            self.remove_predictions(replaced)
            replace_text(self.output / IDENTITY, "{}\n")
            self._remove(OURS)
        self.output.mkdir(parents=True, exist_ok=True)
        for name in (".", "exports", *EXPORTS):  # cards are written again in exports
            remove_leftovers(self.output / name)
        replace_text(self.output / IDENTITY, yaml.safe_dump(self.identity, sort_keys=False))
        return replaced

    @property
    def predictions(self) -> Path:
        """The file of the dense model's predictions on this process's windows: in a shared folder
        one of this very run, or of all that train on this text where they are kept."""
        process, processes = self.spread.process, self.spread.processes
        part = "" if processes == 1 else f"-{process}-of-{processes}"
        begins = self._begins_kept if self.keeps_predictions else self._begins(self.identity)
        return self.scratch / f"{begins}{part}.npy"

    @property
    def is_predicted(self) -> bool:
        """Whether they are there already, and stay when the folder is prepared."""
        return (self.keeps_predictions or self._is_same()) and self.predictions.is_file()

    @cached_property
    def _begins_kept(self) -> str:
        """How the names of files begin that other recoveries find."""
        run, spread, told = self.run, self.spread, sha256()
        for part in (run.text, run.held):
            told.update(repr(part.tokens.shape).encode())
            told.update(np.ascontiguousarray(part.tokens).tobytes())
            told.update(np.ascontiguousarray(part.valid).tobytes())
        own = (
            own_part(spread, run.how.batch, len(run.text.tokens)),
            spread.in_a_row(len(run.held.tokens)),
        )
        facts = run.student.base.fingerprint, run.options.top, run.options.dtype, own
        told.update(repr(facts).encode())
        return f"{KEPT}-{told.hexdigest()[:32]}"

    def _begins(self, identity: Any) -> str:
        """How the names of the files of one run in this folder begin."""
        if self.scratch == self.output:
            return PREDICTIONS
        place = self.output.resolve()
        told = json.dumps([str(place), identity], sort_keys=True)
        return f"{place.name}-{sha256(told.encode()).hexdigest()[:16]}-{PREDICTIONS}"

    def remove_predictions(self, identity: Any) -> None:
        """Remove what processes wrote of one run here, half-written files too; nothing for None."""
        if identity is None:
            return
        begins = glob.escape(self._begins(identity))
        there = [self.output.glob(f"{PREDICTIONS}*.npy*"), self.scratch.glob(f"{begins}*.npy*")]
        for path in itertools.chain(*there):
            path.unlink(missing_ok=True)

    @contextmanager
    def session(self, on_step: OnStep) -> Iterator[OnStep]:
        """Add what a session of the training takes to what earlier ones took; its steps are to be
        told to the value, which passes them on."""
        if not self.spread.leads:
            yield on_step
            return
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
        self.remove_predictions(self.identity)
        if self.spread.leads:
            self._remove((CHECKPOINTS, TRAINING, HISTORY))

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

    def __init__(self, file: Path, writes: bool) -> None:
        self.file, self.writes = file, writes

    def rows(self) -> list[dict[str, Any]]:
        return read_json(self.file)["rows"] if self.file.is_file() else []

    def add(self, row: dict[str, Any]) -> None:
        if not self.writes:
            return

        def place(one: dict[str, Any]) -> tuple[int, bool]:
            return one.get("step", one.get("layer", 0)), "held_out" in one

        kept = [one for one in self.rows() if place(one) != place(row)]
        rows = sorted([*kept, row], key=place)
        replace_text(self.file, json.dumps({"rows": rows}) + "\n")
