"""The folder of a stage that goes through a model layer by layer, and goes on after a kill.

It holds a file per layer, the states behind the last finished one, and, once all are finished and
the states gone, a summary with the digests of the files. Of several processes each has a file of
the states of its windows, and the first writes all else.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from moe_jax.errors import InputError
from moe_jax.files import remove_leftovers, replace_file, replace_text
from moe_jax.json_files import parse_json, read_json
from moe_jax.spread import ALONE, Spread
from pruning.kit.array_files import AnyArray, read_rows, save_arrays
from pruning.kit.fitting import misfits

HELD_OUT = 8  # one window in so many measures errors and enters no sum
STATES = "states"
States = tuple[list[np.ndarray], ...]  # of each text, an array per batch
LayerArrays = Mapping[str, AnyArray]


def held_out(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the windows to learn from and of those held out, of two or more."""
    order = np.arange(number)
    check = order[HELD_OUT - 1 :: HELD_OUT] if number >= HELD_OUT else order[-1:]
    return np.setdiff1d(order, check), check


class Summary(TypedDict):
    """What the summary of a finished folder holds.

    Attributes:
      provenance: all that the layers depend on.
      files: SHA-256 of the file of every layer.
      layers: what is known of every layer, the fields of a dataclass.
    """

    provenance: dict[str, Any]
    files: list[str]
    layers: list[dict[str, Any]]


@dataclass(frozen=True)
class LayerFolder:
    """Where the layers go.

    Attributes:
      path: the folder.
      summary: name of the file without which it is not whole.
      holds: what lies there, in words.
      about: the dataclass of what is known of a layer.
      spread: the processes that share the text, and go on with as many; all call alike.
    """

    path: Path
    summary: str
    holds: str
    about: type
    spread: Spread = ALONE

    def open(self, provenance: dict) -> tuple[list[dict], States] | None:
        """What is known of the layers that an earlier call finished, and the states behind them;
        None after removing what is of another provenance, or of other processes."""
        if self.spread.leads:
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
        found = self._agreed(provenance)
        if found is None and self.spread.leads:
            (self.path / self.summary).unlink(missing_ok=True)
            self.drop_states()
            for file in self.path.glob("layer-[0-9]*.safetensors"):
                file.unlink()
        self.spread.everyone(True)
        return found

    def add(
        self, index: int, arrays: LayerArrays, provenance: dict, layers: Sequence[dict], x: States,
    ) -> None:  # fmt: skip
        """Keep a layer, what is known of all so far, and the states behind it."""
        if self.spread.leads:
            replace_file(self._file(index), lambda partial: save_arrays(arrays, partial))
        facts = {"parts": [len(states) for states in x], "dtype": x[0][0].dtype.name}
        facts |= {"provenance": provenance, "layers": list(layers)}
        facts |= {"processes": self.spread.processes}

        def write(partial: Path) -> None:
            with open(partial, "wb") as file:
                file.write(json.dumps(facts).encode() + b"\n")
                for states in (states for text in x for states in text):
                    # As bytes: numpy's files do not know bfloat16.
                    np.save(file, states.view(np.uint8), allow_pickle=False)

        now, following = self._states_files
        if self.spread.processes == 1:
            replace_file(now, write)
            return
        # The states before stay until all have these, so that there are some to go on from that
        # all have, whenever one is killed.
        replace_file(following, write)
        self.spread.everyone(True)
        os.replace(following, now)

    @property
    def _states_files(self) -> tuple[Path, Path]:
        """This process's states behind the last layer that all have finished, and behind the next
        one until then."""
        number = f"-{self.spread.process}" if self.spread.process else ""
        return self.path / f"{STATES}{number}", self.path / f"{STATES}{number}-next"

    def _agreed(self, provenance: dict) -> tuple[list[dict], States] | None:
        """The last layers and states that all processes have, if they have any."""
        each = {file: self._facts(file, provenance) for file in self._states_files}
        files = {len(facts["layers"]): file for file, facts in each.items() if facts is not None}
        common = set.intersection(*map(set, self.spread.told(list(files))))
        if not common:
            return None
        found = self._read(files[max(common)])
        return found if self.spread.everyone(found is not None) else None

    def _facts(self, path: Path, provenance: dict) -> dict[str, Any] | None:
        """What a file of states says of itself; None if it is not of this call."""
        try:
            with open(path, "rb") as file:
                facts = parse_json(file.readline())
            ours = facts["provenance"] == provenance
            ours &= facts.get("processes", 1) == self.spread.processes
            wrong = any(misfits(self.about, dict(one)) for one in facts["layers"])
            return None if wrong or not ours else facts
        except (FileNotFoundError, ValueError, KeyError, TypeError):  # none, or damaged
            return None

    def _read(self, path: Path) -> tuple[list[dict], States] | None:
        try:
            with open(path, "rb") as file:
                facts = parse_json(file.readline())
                dtype = jnp.dtype(facts["dtype"])
                x = tuple(
                    [np.load(file, allow_pickle=False).view(dtype) for _ in range(count)]
                    for count in facts["parts"]
                )
            return list(map(dict, facts["layers"])), x
        except (ValueError, KeyError, TypeError, EOFError):  # damaged
            return None

    def close(self, provenance: dict, layers: Sequence[dict]) -> None:
        """Say that all layers are there."""
        self.spread.everyone(True)
        if self.spread.leads:
            self._summarise(provenance, layers)
        self.spread.everyone(True)

    def _summarise(self, provenance: dict, layers: Sequence[dict]) -> None:
        files = [_digest(self._file(index)) for index in range(len(layers))]
        summary = Summary(provenance=provenance, files=files, layers=list(layers))
        replace_text(self.path / self.summary, json.dumps(summary, indent=2) + "\n")
        self.drop_states()

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called, for whatever provenance."""
        return (self.path / self.summary).is_file()

    def drop_states(self) -> None:
        """Remove the states of a finished folder, which a run killed in `close` leaves."""
        for file in self.path.glob(f"{STATES}*"):
            file.unlink()

    def read_summary(self) -> Summary | None:
        """What `close` wrote; None if there is nothing, or it is damaged."""
        try:
            found: Any = read_json(self.path / self.summary)
        except (InputError, OSError):
            return None
        if misfits(Summary, found) or any(misfits(self.about, one) for one in found["layers"]):
            return None
        return found if len(found["files"]) == len(found["layers"]) else None

    def fault(self, **provenance: Any) -> str:
        """What is wrong with the folder, as a clause; "" if it is whole.

        Args:
          provenance: what is asked of its layers'.
        """
        summary = self.read_summary()
        if summary is None:
            return f"{self.holds} are no longer in {self.path}"
        if any(summary["provenance"].get(name) != value for name, value in provenance.items()):
            return f"{self.holds} in {self.path} are of another plan, repair or text"
        for index, digest in enumerate(summary["files"]):
            file = self._file(index)
            if not file.is_file() or _digest(file) != digest:
                return f"{file} is not the file that was written"
        return ""

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a layer.

        Raises:
          InputError: its file is missing or damaged.
        """
        return self._given(index, load_file)

    def rows(self, index: int, rows: Mapping[str, slice]) -> dict[str, np.ndarray]:
        """Some rows of those arrays of a layer that there are, by name.

        Raises:
          InputError: its file is missing or damaged.
        """
        return self._given(index, lambda file: read_rows(file, rows))

    def _given(
        self, index: int, read: Callable[[Path], dict[str, np.ndarray]]
    ) -> dict[str, np.ndarray]:
        try:
            return read(self._file(index))
        except (FileNotFoundError, SafetensorError) as error:
            raise InputError(
                f"{self._file(index)} cannot be read ({error}); remove {self.path} and repeat what "
                "made it"
            ) from None

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.safetensors"


def _digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
