"""Writing of sharded safetensors folders, whole or not at all."""

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.layout import (
    SHARD_BYTES,
    Spec,
    index_text,
    json_text,
    lay_out,
    nbytes,
    plan_shards,
    shard_files,
)
from convert.reader import INDEX
from convert.side_files import side_files as files_of
from moe_jax.errors import InputError
from moe_jax.files import replace_folder, write_synced

Content = bytes | str | Path | Callable[[], str]
SPARE_BYTES = 64 << 20  # left free on the disk, for side files and the file system itself


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int  # bytes from the start of the file
    dtype: np.dtype
    shape: tuple[int, ...]


def write_folder(
    target: Path | str,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    config: dict,
    side_files: Path | str | None,
    *,
    shard_bytes: float = SHARD_BYTES,
    extra_files: Mapping[str, Content] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder that is either complete or absent.

    Args:
      target: the folder to make.
      specs: name -> (dtype, shape) of every tensor, in file order.
      tensors: (name, array) in any order, taken one at a time.
      config: config.json.
      side_files: folder whose `convert.side_files.side_files` are copied byte for byte, or None.
      shard_bytes: at most so many bytes of tensors per file (more if one tensor is larger).
      extra_files: file name -> content, or path of a file to copy, or what makes the content once
        all tensors are written.
      overwrite: replace an existing target.

    Returns:
      The target.

    Raises:
      FileExistsError: if the target exists and `overwrite` is False.
      OSError: if the disk has too little space.
      InputError: if a tensor is missing, unknown, repeated or differs from its spec.
    """
    target = Path(target)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists; choose another folder or allow overwriting")
    shards = plan_shards(specs, shard_bytes)
    target.parent.mkdir(parents=True, exist_ok=True)
    _check_disk(target.parent, sum(nbytes(spec) for spec in specs.values()))

    def fill(folder: Path) -> None:
        _write_tensors(folder, specs, shards, tensors)
        _write_side_files(folder, side_files, extra_files or {})
        write_synced(folder / "config.json", json_text(config))

    replace_folder(target, fill)
    return target


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise OSError(
            f"{folder} has {free / 1e9:.2f} GB free but the export needs "
            f"{(needed + SPARE_BYTES) / 1e9:.2f} GB; free some space or choose another disk"
        )


def _write_tensors(
    folder: Path,
    specs: Mapping[str, Spec],
    shards: list[list[str]],
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write headers, then stream each array to its place."""
    places: dict[str, _Place] = {}
    with ExitStack() as stack:
        files = {}
        for name, names in shard_files(shards).items():
            header, offsets, size = lay_out(names, specs)
            file = files[name] = stack.enter_context(open(folder / name, "wb"))
            file.write(header)
            file.truncate(size)
            for tensor, offset in offsets.items():
                places[tensor] = _Place(name, offset, np.dtype(specs[tensor][0]), specs[tensor][1])
        _stream(files, places, tensors)
        for file in files.values():
            file.flush()
            os.fsync(file.fileno())
    index = index_text(specs, shards)
    if index:
        write_synced(folder / INDEX, index)


def _stream(files, places: dict[str, _Place], tensors: Iterable[tuple[str, np.ndarray]]) -> None:
    missing = dict.fromkeys(places)
    for name, value in tensors:
        array = np.ascontiguousarray(value)
        if name not in places:
            raise InputError(f"tensor {name} was not announced in specs")
        place = places[name]
        if name not in missing:
            raise InputError(f"tensor {name} came twice")
        if array.dtype != place.dtype or np.shape(value) != tuple(place.shape):
            raise InputError(
                f"tensor {name} is {array.dtype} {list(np.shape(value))} but was announced as "
                f"{place.dtype} {list(place.shape)}"
            )
        file = files[place.file]
        file.seek(place.offset)
        file.write(array.reshape(-1).view(np.uint8).data)
        del missing[name]
    if missing:
        raise InputError(f"{len(missing)} tensors never came: {', '.join(list(missing)[:10])}")


def _write_side_files(
    folder: Path, source: Path | str | None, extra: Mapping[str, Content]
) -> None:
    found: dict[str, Content] = {} if source is None else {**files_of(source)}
    for name, content in {**found, **extra}.items():
        if callable(content):
            content = content()
        if isinstance(content, Path):
            content = content.read_bytes()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_synced(folder / name, content.encode() if isinstance(content, str) else content)
