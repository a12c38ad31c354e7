"""Strict, lazy reading of safetensors folders: headers first, then one tensor at a time."""

import copy
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from convert.headers import TensorSpec, parse_header, read_header
from moe_jax.errors import InputError
from moe_jax.host_arrays import aligned_empty
from moe_jax.json_files import parse_json

logger = logging.getLogger(__name__)

MOST_LINES = 50  # of problems in an error; of more, one of each kind is shown
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_SERIES = re.compile(r"(.*)-\d+-of-(\d+)\.safetensors")  # files that belong together
_NUMBER = re.compile(r"\d+")


class CheckpointError(InputError):
    """Everything that is wrong with a checkpoint, in one message.

    Attributes:
      problems: one sentence per problem, causes before what follows from them.
    """

    def __init__(self, folder: Path | str, problems: Sequence[str]):
        self.problems = tuple(problems)
        shown = [f"  - {line}" for line in _lines(self.problems)]
        super().__init__("\n".join([f"{folder}: {len(self.problems)} problem(s)", *shown]))


def _lines(problems: Sequence[str]) -> list[str]:
    """All of a few problems; of many, the first of each kind, such as may differ in numbers."""
    if len(problems) <= MOST_LINES:
        return list(problems)
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kinds.setdefault(_NUMBER.sub("", problem), []).append(problem)
    lines = [
        first + (f" (and {len(others)} more like it)" if others else "")
        for first, *others in kinds.values()
    ]
    more = len(lines) - MOST_LINES
    return lines if more <= 0 else [*lines[:MOST_LINES], f"and {more} more kinds"]


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
      CheckpointError: if the file is missing or holds no JSON object.
    """
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(path.parent, [f"{path.name} is missing"]) from None
    except InputError as error:
        raise CheckpointError(path.parent, [f"{path.name} {error}"]) from None
    if not isinstance(value, dict):
        raise CheckpointError(path.parent, [f"{path.name} must hold a JSON object"])
    return value


class SafetensorsFolder:
    """The tensors of `model.safetensors`, or of an index and its shards.

    Opening reads headers only and checks them all; `read` reads one tensor's bytes into fresh
    memory, without a memory map whose pages would stay resident. Headers say what there is: where
    the index says something else or is missing, this is logged.

    Args:
      path: a folder.

    Attributes:
      watchers: called with what is read, by whatever name: name of the tensor on disk, first byte
        inside it, array. Renamed folders share them.
      missing_shards: files that the index names and the folder has not.
      index_fault: where the index and the headers differ, "" if nowhere.
      stamps: what the file system said of every weight file when it was opened: size, times of
        change in ns, inode. No write leaves all of them as they were.

    Raises:
      CheckpointError: listing every defect of the headers and of the index.
    """

    missing_shards: tuple[str, ...] = ()
    index_fault = ""

    def __init__(self, path: Path | str):
        self.folder = Path(path)
        if not self.folder.is_dir():
            raise CheckpointError(self.folder, ["is not a folder; pass a downloaded checkpoint"])
        problems: list[str] = []
        self.watchers: list[Callable[[str, int, np.ndarray], None]] = []
        self.stamps: dict[str, list[int]] = {}
        self._specs: dict[str, TensorSpec] = {}
        weight_map = self._weight_map(problems)
        files = {SINGLE} if weight_map is None else set(weight_map.values())
        if weight_map is not None:
            files |= self._shards_beside(files)
        for file in sorted(files):
            self._add_file(file, problems)
        if problems:
            raise CheckpointError(self.folder, problems)
        if weight_map is not None:
            self._compare(weight_map)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(sorted(self._specs))

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def renamed(self, new: Callable[[str], str | None]) -> "SafetensorsFolder":
        """The same folder with other names for its tensors; those named None are not in it."""
        found = copy.copy(self)
        names = {name: new(name) for name in self._specs}
        found._specs = {new: self._specs[old] for old, new in names.items() if new is not None}
        return found

    def spec(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        """Dtype and shape of a tensor."""
        spec = self._specs[name]
        return spec.dtype, spec.shape

    def read(self, name: str) -> np.ndarray:
        """One tensor, in its own memory."""
        return self.read_part(name, 0, self._specs[name].shape)

    def read_part(self, name: str, first: int, shape: tuple[int, ...]) -> np.ndarray:
        """Consecutive elements of a tensor.

        Args:
          name: the tensor.
          first: index of the first element in row-major order.
          shape: of the result.

        Returns:
          A fresh array.
        """
        spec = self._specs[name]
        out = aligned_empty(shape, spec.dtype)
        start = spec.start + first * spec.dtype.itemsize
        assert start + out.nbytes <= spec.stop
        view = out.reshape(-1).view(np.uint8).data
        with open(self.folder / spec.file, "rb", buffering=0) as file:
            file.seek(start)
            done = 0
            while done < len(view):  # one call returns at most 2 GiB
                got = file.readinto(view[done:])
                if not got:
                    raise CheckpointError(self.folder, [f"{spec.file} ended inside {name}"])
                done += got
        for watch in self.watchers:
            watch(spec.name, start - spec.start, out)
        return out

    def _weight_map(self, problems: list[str]) -> dict[str, str] | None:
        """Name -> shard of the index; None if the folder holds a single file."""
        has_index, has_single = (self.folder / INDEX).exists(), (self.folder / SINGLE).exists()
        if has_single and has_index:
            problems.append(f"both {SINGLE} and {INDEX} exist; remove the one that is stale")
        if has_single:
            return None
        if not has_index:
            if not self._shards_beside(set()):
                problems.append(f"neither {SINGLE} nor {INDEX} exists; only safetensors are read")
            return {}
        weight_map = read_json(self.folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            problems.append(f"{INDEX} has no weight_map of tensor names to file names")
            return {}
        bad = {f for f in weight_map.values() if not re.fullmatch(r"[\w.-]+\.safetensors", f)}
        problems += [f"{INDEX} names {f[:80]!r}, which is not a plain shard name" for f in bad]
        return {name: file for name, file in weight_map.items() if file not in bad}

    def _add_file(self, file: str, problems: list[str]) -> None:
        path = self.folder / file
        if not path.is_file():
            if file != SINGLE:
                self.missing_shards += (file,)
            return
        told = path.stat()
        try:
            header, start = read_header(path)
        except ValueError as error:
            problems.append(f"{file}: {error}")
            return
        self.stamps[file] = [told.st_size, told.st_mtime_ns, told.st_ctime_ns, told.st_ino]
        found: list[str] = []
        specs = parse_header(header, file, start, told.st_size, found)
        problems += [f"{file}: {problem}" for problem in found]
        for name in sorted(specs.keys() & self._specs.keys()):
            problems.append(f"{name} is in both {self._specs[name].file} and {file}")
        self._specs |= specs

    def _shards_beside(self, listed: set[str]) -> set[str]:
        """Files of the same series as those that the index lists; without any, of the only one."""
        here = {
            path.name: found.groups()
            for path in self.folder.glob("*.safetensors")
            if (found := _SERIES.fullmatch(path.name))
        }
        series = {found.groups() for file in listed if (found := _SERIES.fullmatch(file))}
        if not listed and len(set(here.values())) == 1:
            series = set(here.values())
        return {file for file, own in here.items() if own in series}

    def _compare(self, weight_map: dict[str, str]) -> None:
        """Say where the index and the headers differ; the headers are right."""
        found = {name: spec.file for name, spec in self._specs.items()}
        kinds = {
            "names {} that no shard has": weight_map.keys() - found.keys(),
            "does not name {}": found.keys() - weight_map.keys(),
            "puts {} into the wrong shard": {
                name for name in weight_map.keys() & found.keys() if weight_map[name] != found[name]
            },
        }
        said = [
            words.format(f"{len(names)} tensor(s), such as {min(names)},")
            for words, names in kinds.items()
            if names
        ]
        said = said if (self.folder / INDEX).exists() else ["is missing"]
        if said:
            self.index_fault = f"{INDEX} {', '.join(said)}"
            words = "%s: %s; the tensors are read as the shards' own headers say"
            logger.warning(words, self.folder, self.index_fault)
