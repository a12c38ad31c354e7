"""The tensor files of a folder that is being made, by one process or by several.

A file has one writer at a time, whatever disk processes share: each of several writes what it has
of a file into a part of its own, laid out as the whole file is. Whoever then has most of it takes
the others' tensors in, and that part becomes the file.
"""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from convert.layout import Spec, lay_out, nbytes, shard_files
from moe_jax.errors import InputError
from moe_jax.spread import ALONE, Spread

PIECE = 16 << 20  # bytes copied at a time
NAMED = 10  # tensors that an error names

Written = dict[str, list[str]]  # tensors by file


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int  # bytes from the start of the file
    spec: Spec


class _Layout:
    """Where each tensor goes."""

    def __init__(self, specs: Mapping[str, Spec], shards: list[list[str]]):
        self.places: dict[str, _Place] = {}
        self._starts: dict[str, tuple[bytes, int]] = {}  # header and size of each file
        for file, names in shard_files(shards).items():
            header, offsets, size = lay_out(names, specs)
            self._starts[file] = header, size
            self.places |= {name: _Place(file, at, specs[name]) for name, at in offsets.items()}

    @property
    def files(self) -> list[str]:
        return [*self._starts]

    def begin(self, opened: BinaryIO, file: str) -> None:
        """Give a new file, or part of one, its header and its size."""
        header, size = self._starts[file]
        opened.write(header)
        opened.truncate(size)

    def require_all(self, names: Iterable[str]) -> None:
        """Raise InputError unless each tensor was written once."""
        count = Counter(names)
        if missing := [name for name in self.places if name not in count]:
            raise InputError(f"{len(missing)} tensors never came: {', '.join(missing[:NAMED])}")
        if twice := [name for name, times in count.items() if times > 1]:
            raise InputError(f"tensors {', '.join(twice[:NAMED])} came twice")


def write_tensors(
    folder: Path,
    specs: Mapping[str, Spec],
    shards: list[list[str]],
    tensors: Iterable[tuple[str, np.ndarray]],
    spread: Spread = ALONE,
) -> None:
    """Write all tensor files, down to the disk.

    Args:
      folder: being made; that of all processes.
      specs: name -> (dtype, shape) of every tensor.
      shards: names per file.
      tensors: (name, array) of this process, in any order, taken one at a time.
      spread: the processes, which together have every tensor once.

    Raises:
      InputError: if a tensor is missing, unknown, repeated or differs from its spec.
    """
    layout = _Layout(specs, shards)
    alone = spread.processes == 1

    def part(file: str, process: int) -> Path:
        return folder / (file if alone else f"{file}.{process}")

    written = _streamed(layout, tensors, lambda file: part(file, spread.process))
    parts: list[Written] = spread.told(written)
    layout.require_all(name for one in parts for names in one.values() for name in names)
    if alone:
        return
    for file in layout.files:
        given = {process: one[file] for process, one in enumerate(parts) if file in one}
        sizes = {process: sum(nbytes(specs[n]) for n in names) for process, names in given.items()}
        most = max(sizes, key=lambda process: sizes[process])
        if most == spread.process:
            others = {part(file, p): names for p, names in given.items() if p != most}
            _take_in(part(file, most), others, layout.places)
            os.replace(part(file, most), folder / file)
    spread.everyone(True)


def _streamed(layout: _Layout, tensors: Iterable[tuple[str, np.ndarray]], path_of) -> Written:
    """Write each array to its place as it comes."""
    written: Written = {}
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for name, value in tensors:
            place = _place_of(layout, name, value)
            if place.file not in files:
                files[place.file] = stack.enter_context(open(path_of(place.file), "wb"))
                layout.begin(files[place.file], place.file)
                written[place.file] = []
            file = files[place.file]
            file.seek(place.offset)
            file.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
            written[place.file].append(name)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    return written


def _place_of(layout: _Layout, name: str, value: np.ndarray) -> _Place:
    if name not in layout.places:
        raise InputError(f"tensor {name} was not announced in specs")
    place = layout.places[name]
    dtype, shape = place.spec
    if value.dtype != np.dtype(dtype) or np.shape(value) != tuple(shape):
        raise InputError(
            f"tensor {name} is {value.dtype} {list(np.shape(value))} but was announced as "
            f"{np.dtype(dtype)} {list(shape)}"
        )
    return place


def _take_in(
    path: Path, others: Mapping[Path, Sequence[str]], places: Mapping[str, _Place]
) -> None:
    """Copy tensors of other parts of a file into one of them; these others go."""
    with open(path, "rb+") as file:
        for other, names in others.items():
            with open(other, "rb") as given:
                for name in names:
                    _copy(given, file, places[name].offset, nbytes(places[name].spec))
            other.unlink()
        file.flush()
        os.fsync(file.fileno())


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    source.seek(start)
    target.seek(start)
    while size:
        piece = source.read(min(size, PIECE))
        if not piece:
            raise OSError(f"{source.name} ended early; do all processes write to the same disk?")
        target.write(piece)
        size -= len(piece)
