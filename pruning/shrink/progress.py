"""The folder of a stage that goes through a model layer by layer, and goes on after a kill.

It holds a file per layer, the states behind the last finished one, and, once all are finished and
the states gone, a summary.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from moe_jax.errors import InputError
from moe_jax.files import remove_leftovers, replace_file, replace_text
from moe_jax.json_files import parse_json, read_json

HELD_OUT = 8  # one window in so many measures errors and enters no sum
STATES = "states"
States = tuple[list[np.ndarray], ...]  # of each text, an array per batch


def held_out(number: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the windows to learn from and of those held out, of two or more."""
    order = np.arange(number)
    check = order[HELD_OUT - 1 :: HELD_OUT] if number >= HELD_OUT else order[-1:]
    return np.setdiff1d(order, check), check


@dataclass(frozen=True)
class LayerFolder:
    """Where the layers go.

    Attributes:
      path: the folder.
      summary: name of the file without which it is not whole.
    """

    path: Path
    summary: str

    def open(self, provenance: dict) -> tuple[list[dict], States] | None:
        """What an earlier call left, or None after removing what is of another provenance."""
        self.path.mkdir(parents=True, exist_ok=True)
        remove_leftovers(self.path)
        found = self._read(provenance)
        if found is None:
            for name in (self.summary, STATES):
                (self.path / name).unlink(missing_ok=True)
            for file in self.path.glob("layer-[0-9]*.safetensors"):
                file.unlink()
        return found

    def add(
        self, index: int, arrays: dict[str, np.ndarray], provenance: dict, layers: Sequence[dict],
        x: States,
    ) -> None:  # fmt: skip
        """Keep a layer, what is known of all so far, and the states behind it."""
        replace_file(self._file(index), lambda partial: save_file(arrays, partial))
        parts = [len(states) for states in x]
        facts = {"provenance": provenance, "parts": parts, "dtype": x[0][0].dtype.name}
        facts["layers"] = list(layers)

        def write(partial: Path) -> None:
            with open(partial, "wb") as file:
                file.write(json.dumps(facts).encode() + b"\n")
                for states in (states for text in x for states in text):
                    # As bytes: numpy's files do not know bfloat16.
                    np.save(file, states.view(np.uint8), allow_pickle=False)

        replace_file(self.path / STATES, write)

    def _read(self, provenance: dict) -> tuple[list[dict], States] | None:
        try:
            with open(self.path / STATES, "rb") as file:
                facts = parse_json(file.readline())
                if facts["provenance"] != provenance:
                    return None
                dtype = jnp.dtype(facts["dtype"])
                x = tuple(
                    [np.load(file, allow_pickle=False).view(dtype) for _ in range(count)]
                    for count in facts["parts"]
                )
            return list(map(dict, facts["layers"])), x
        except (FileNotFoundError, ValueError, KeyError, TypeError, EOFError):  # none, or damaged
            return None

    def close(self, summary: dict) -> None:
        """Say that all layers are there."""
        replace_text(self.path / self.summary, json.dumps(summary, indent=2) + "\n")
        (self.path / STATES).unlink(missing_ok=True)

    def read_summary(self) -> dict | None:
        """What `close` wrote; None if there is nothing."""
        path = self.path / self.summary
        return read_json(path) if path.is_file() else None

    def layer(self, index: int) -> dict[str, np.ndarray]:
        """The arrays of a layer.

        Raises:
          InputError: its file is missing or damaged.
        """
        try:
            return load_file(self._file(index))
        except (FileNotFoundError, SafetensorError) as error:
            raise InputError(
                f"{self._file(index)} cannot be read ({error}); remove {self.path} and repeat what "
                "made it"
            ) from None

    def _file(self, index: int) -> Path:
        return self.path / f"layer-{index:05d}.safetensors"
