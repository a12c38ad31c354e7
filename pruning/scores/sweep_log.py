"""What a sweep over a model has added up so far, step by step: in memory, or in a folder that a
killed run is gone on from."""

import json
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from moe_jax.errors import InputError
from moe_jax.files import remove_leftovers, replace_file, replace_text, scratch_file
from moe_jax.json_files import read_json
from moe_jax.spread import ALONE, Spread

RECORD = "progress.json"
STATES = re.compile(r"scoring-[0-9a-f]{16}\.states")  # of process 0

Sums = dict[str, np.ndarray]  # [parts, ...], or [1, ...] for what holds for all parts


class SweepLog(Protocol):
    """Where a sweep leaves what each step added up."""

    @property
    def done(self) -> int:
        """Steps that are finished."""
        ...

    def add(self, sums: Sums) -> None:
        """Finish the next step."""
        ...

    def rows(self, step: int, part: int) -> dict[str, np.ndarray]:
        """The sums of a finished step, those of one part."""
        ...


class Memory:
    """A log for a sweep that is not gone on with."""

    def __init__(self):
        self._steps: list[Sums] = []

    @property
    def done(self) -> int:
        """Steps that are finished."""
        return len(self._steps)

    def add(self, sums: Sums) -> None:
        """Finish the next step."""
        self._steps.append(sums)

    def rows(self, step: int, part: int) -> dict[str, np.ndarray]:
        """The sums of a finished step, those of one part."""
        return {name: value[_row(part, len(value))] for name, value in self._steps[step].items()}


class SweepFolder:
    """A log with a file per step, and a file of hidden states that outlives the process.

    A step counts as finished once its file has its name. The file of states is wherever scratch
    files go, under a name that the record holds. Of several processes the first has the folder, and
    each a file of the states of its windows; none begins a step before the last one is finished.

    Args:
      path: the folder.
      spread: the processes that share the text.
    """

    def __init__(self, path: Path, spread: Spread = ALONE):
        self.path, self._spread = path, spread
        self.done = 0
        self._own: Path | None = None  # states of a process that has no folder

    @contextmanager
    def states(
        self, identity: dict, steps: int, scratch: Path, size: int
    ) -> Iterator[BinaryIO | None]:
        """Open the folder, to go on in it if it holds progress of the same sweep.

        Args:
          identity: all that progress depends on, JSON-compatible.
          steps: of the whole sweep.
          scratch: where a new file of states goes.
          size: of that file, bytes.

        Yields:
          The file of states, which stays; None if all steps are finished.

        Raises:
          FullDiskError: there is no room for it; nothing is left then.
        """
        identity = json.loads(json.dumps(identity))
        place = self._agreed(identity, steps, scratch, size)
        if place is None:
            yield None
            return
        if self.done:
            file = open(place, "r+b")
        else:
            try:
                file = scratch_file(place.parent, size, place.name)
            except BaseException:
                self.clear()
                raise
        with file:
            yield file

    def add(self, sums: Sums) -> None:
        """Finish the next step."""
        if self._spread.leads:
            arrays = {name: np.ascontiguousarray(value) for name, value in sums.items()}
            replace_file(self._file(self.done), lambda partial: save_file(arrays, partial))
        self._spread.everyone(True)  # the next step overwrites what a killed one would read again
        self.done += 1

    def rows(self, step: int, part: int) -> dict[str, np.ndarray]:
        """The sums of a finished step, those of one part.

        Raises:
          InputError: its file is missing or damaged.
        """
        try:
            with safe_open(self._file(step), "numpy") as file:
                found = {name: file.get_slice(name) for name in file.keys()}
                rows = {name: _row(part, one.get_shape()[0]) for name, one in found.items()}
                return {name: one[rows[name] : rows[name] + 1][0] for name, one in found.items()}
        except (FileNotFoundError, SafetensorError) as error:
            raise InputError(
                f"{self._file(step)} cannot be read ({error}); remove {self.path} and score again"
            ) from None

    @property
    def state_bytes(self) -> int:
        """What the file of states takes."""
        states = self._states()
        return states.stat().st_size if states is not None and states.is_file() else 0

    def drop_states(self) -> None:
        """Remove the file of states, which a finished sweep needs no more.

        Process 0 also removes those of others that lie beside: a run may go on with fewer.
        """
        states = self._states() if self._spread.leads else self._own
        if states is None:
            return
        others = states.parent.glob(f"{states.stem}-*.states") if self._spread.leads else ()
        for path in (states, *others):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove all of it."""
        self.drop_states()
        self.done = 0
        if not self._spread.leads:
            return
        # The record last: it knows where the states are.
        for file in (*sorted(self.path.glob("step-[0-9]*.safetensors")), self.path / RECORD):
            file.unlink(missing_ok=True)
        if self.path.is_dir() and not any(self.path.iterdir()):
            self.path.rmdir()

    def _agreed(self, identity: dict, steps: int, scratch: Path, size: int) -> Path | None:
        """Count the finished steps, as all processes can go on with them.

        Returns:
          This process's file of states, which is there if a step is finished; None if all are.
        """

        def opened() -> tuple[int, str | None]:
            states = self._states()  # before it may be cleared: the others have theirs beside it
            self._open(identity, steps, size)
            return self.done, None if states is None else str(states)

        self.done, name = self._spread.led(opened)
        if name is not None:
            self._own = self._of_process(Path(name))
        if self.done == steps:
            return None
        there = self._own is not None and self._own.is_file() and self._own.stat().st_size == size
        if not self._spread.everyone(self.done > 0 and there):
            self.clear()
            name = self._spread.led(lambda: self._begun(identity, scratch))
            self._own = self._of_process(Path(name))
        return self._own

    def _of_process(self, states: Path) -> Path:
        """A process's file of states, beside where process 0 has its own."""
        number = self._spread.process
        return states.with_name(f"{states.stem}-{number}{states.suffix}") if number else states

    def _begun(self, identity: dict, scratch: Path) -> str:
        """Write the record of a new sweep; where process 0 has its states."""
        self.path.mkdir(parents=True, exist_ok=True)
        place = str(scratch.absolute() / f"scoring-{secrets.token_hex(8)}.states")
        told = {"identity": identity, "states": place}
        replace_text(self.path / RECORD, json.dumps(told, indent=1) + "\n")
        return place

    def _open(self, identity: dict, steps: int, size: int) -> None:
        """Count the finished steps; 0 after removing what cannot be gone on with."""
        remove_leftovers(self.path)
        self.done = 0
        if self._record().get("identity") == identity:
            while self.done < steps and self._file(self.done).is_file():
                self.done += 1
        if not self.done or (self.done < steps and self.state_bytes != size):
            self.clear()
        self.path.mkdir(parents=True, exist_ok=True)

    def _record(self) -> dict:
        try:
            found = read_json(self.path / RECORD)
        except (InputError, OSError):
            return {}
        return found if isinstance(found, dict) else {}

    def _states(self) -> Path | None:
        """The file of states; None if the record names none, or what is none of ours."""
        place = self._record().get("states")
        path = Path(place) if isinstance(place, str) else None
        return path if path is not None and STATES.fullmatch(path.name) else None

    def _file(self, step: int) -> Path:
        return self.path / f"step-{step:05d}.safetensors"


def _row(part: int, rows: int) -> int:
    return min(part, rows - 1)
