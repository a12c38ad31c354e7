"""What lies in an exported folder beside what the export writes: every file, every tensor."""

import filecmp
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from convert.export import Export
from convert.layout import nbytes
from convert.reader import INDEX, CheckpointError, SafetensorsFolder, read_json
from convert.side_files import left_out, side_files
from moe_jax.quant import MIN_SCALE
from moe_jax.spread import Spread
from pruning.kit.words import amount
from pruning.stages.card import ROUNDING

NAMED = 5  # problems that a check names
PART = 16 << 20  # elements of a tensor read at once
READ = (".py", ".json", ".jinja", ".model", ".tiktoken", ".txt")  # what programs look for


def in_words(problems: Sequence[str]) -> str:
    """The first few problems in one line, and how many more there are; "" for none."""
    more = [f"and {len(problems) - NAMED} more"] if len(problems) > NAMED else []
    return "; ".join([*problems[:NAMED], *more])


def file_problems(folder: Path, export: Export) -> list[str]:
    """How the files beside the weights differ from those that an export writes; nothing is run.

    Code, tokenizer and all else that is copied must be the same bytes, config.json the same JSON.
    Nothing else may lie there that programs read; cards, licences and notes are free.
    """
    ours = side_files(export.base.folder) | export.code_files
    problems = []
    for name, path in ours.items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif not filecmp.cmp(folder / name, path, shallow=False):
            problems.append(f"{name} is not that of {path}")
    problems += config_problems(folder, export)
    known = {*ours, "config.json", INDEX, ROUNDING}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in name.parts)
        if path.suffix in READ and not hidden and name.as_posix() not in known:
            problems.append(f"{name} is not part of the export")
    return problems


def not_copied(base: Path) -> str:
    """What of a base's files stays behind, as the end of a sentence; "" for nothing."""
    names = left_out(base)
    return f"; only the base has {', '.join(names)}" if names else ""


def config_problems(folder: Path, export: Export) -> list[str]:
    """How config.json differs from the one that an export writes."""
    try:
        found = read_json(folder / "config.json")
    except CheckpointError as error:
        return list(error.problems)
    # As text: 1, 1.0 and true are equal in Python, and not to programs.
    here, wanted = (
        {key: json.dumps(value, sort_keys=True) for key, value in config.items()}
        for config in (found, export.config)
    )
    return [
        f"config.json says {key}={_short(here.get(key))}, not {_short(wanted.get(key))}"
        for key in sorted(here.keys() | wanted.keys())
        if here.get(key) != wanted.get(key)
    ]


def _short(value: str | None) -> str:
    return "nothing" if value is None else value if len(value) <= 80 else value[:77] + "..."


class TensorComparison:
    """Stored tensors beside the arrays that they must be, bit for bit, in parts.

    Args:
      folder: where they are stored.
      export: what it must hold.
      with_codes: whether the values of 4-bit weights are known, too.

    Attributes:
      names: of all tensors that are there or must be.

    Raises:
      CheckpointError: the headers are damaged, or the index says something else.
    """

    def __init__(self, folder: Path, export: Export, *, with_codes: bool = True):
        self._stored, self._specs = SafetensorsFolder(folder), export.specs
        faults = [f"shard {file} is missing" for file in self._stored.missing_shards]
        faults += [self._stored.index_fault] if self._stored.index_fault else []
        if faults:
            raise CheckpointError(folder, faults)
        # Codes that are taken over come with the scales of whoever chose them.
        self._least_scale = MIN_SCALE if export.native is None else 0.0
        self._unknown = frozenset() if with_codes else _packed(export)
        self.names = frozenset(self._specs) | frozenset(self._stored.names)
        self._problems = {name: self._header_problem(name) for name in self.names}
        self._compared: set[str] = set()

    def add(self, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
        """Compare some tensors, (name, array as it must be on disk)."""
        for name, wanted in arrays:
            self._compared.add(name)
            self._problems[name] = self._problems[name] or self._value_problem(name, wanted)

    def share(self, spread: Spread) -> None:
        """Know of what every process has compared."""
        for found in spread.told({name: self._problems[name] for name in self._compared}):
            self._compared |= found.keys()
            self._problems |= found

    def problems_of(self, names: Iterable[str]) -> list[str]:
        """A sentence for each of these tensors that is wrong, or was not compared."""
        return [
            self._problems[name] or f"{name} was not compared"
            for name in sorted(names)
            if self._problems[name] or name not in self._compared
        ]

    def words(self, names: Iterable[str]) -> str:
        """How many of these tensors were compared."""
        known = [name for name in names if name in self._compared and name not in self._unknown]
        size = sum(nbytes(self._specs[name]) for name in known)
        return f"{len(known)} tensors, {amount(size)}, bit for bit as planned"

    def _header_problem(self, name: str) -> str:
        if name not in self._stored:
            return f"{name} is missing"
        if name not in self._specs:
            return f"{name} is not part of the export"
        (dtype, shape), (wanted, size) = self._stored.spec(name), self._specs[name]
        if np.dtype(dtype) != wanted:
            return f"{name} is {np.dtype(dtype)}, not {wanted}"
        if tuple(shape) != tuple(size):
            return f"{name} has shape {list(shape)}, not {list(size)}"
        return ""

    def _value_problem(self, name: str, wanted: np.ndarray) -> str:
        flat = np.ascontiguousarray(wanted).reshape(-1)
        for first in range(0, flat.size, PART):
            part = flat[first : first + PART]
            found = self._stored.read_part(name, first, part.shape)
            if name.endswith("_scale") and not (fits := np.abs(found) >= self._least_scale).all():
                at = int(np.argmin(fits))
                place = _place(first + at, wanted.shape)
                return f"{name}{place} is a scale of {found[at]}, less than {self._least_scale}"
            if name in self._unknown:
                continue
            differs = found.view(np.uint8) != part.view(np.uint8)
            if differs.any():
                at = int(np.argmax(differs)) // part.dtype.itemsize
                place = _place(first + at, wanted.shape)
                return f"{name}{place} is {found[at]}, not {part[at]}"
        return ""


def _place(index: int, shape: tuple[int, ...]) -> str:
    """An element of an array as Python would name it: [3, 7]."""
    return str([int(i) for i in np.unravel_index(index, shape)]) if math.prod(shape) else ""


def _packed(export: Export) -> frozenset[str]:
    """The tensors that stand for weights in 4 bits."""
    packed = ((name, stored) for name, stored in export.tensors.items() if stored.packed)
    parts = (part for name, stored in packed for part in stored.specs(name, export.form))
    return frozenset(map(export.stored_name, parts))
