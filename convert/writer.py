"""Writing of sharded safetensors folders, whole or not at all."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from convert.layout import SHARD_BYTES, Spec, index_text, json_text, nbytes, plan_shards
from convert.reader import INDEX
from convert.shards import write_tensors
from convert.side_files import side_files as files_of
from moe_jax.files import naming_full_disk, replace_folder, write_synced
from moe_jax.spread import ALONE, Spread

Content = bytes | str | Path | Callable[[], str]
SPARE_BYTES = 64 << 20  # left free on the disk, for side files and the file system itself


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
    spread: Spread = ALONE,
) -> Path:
    """Write a checkpoint folder that is either complete or absent.

    Several processes write one, each its tensors, and process 0 all else; the index comes last.

    Args:
      target: the folder to make.
      specs: name -> (dtype, shape) of every tensor, in file order.
      tensors: (name, array) of this process in any order, taken one at a time.
      config: config.json.
      side_files: folder whose `convert.side_files.side_files` are copied byte for byte, or None.
      shard_bytes: at most so many bytes of tensors per file (more if one tensor is larger).
      extra_files: file name -> content, or path of a file to copy, or what makes the content once
        all tensors are written.
      overwrite: replace an existing target.
      spread: the processes, which are given the same but for the tensors.

    Returns:
      The target.

    Raises:
      FileExistsError: if the target exists and `overwrite` is False.
      OSError: if the disk has too little space.
      InputError: if a tensor is missing, unknown, repeated or differs from its spec.
    """
    target, shards = Path(target), plan_shards(specs, shard_bytes)
    index = index_text(specs, shards)

    def begin() -> None:
        if target.exists() and not overwrite:
            raise FileExistsError(f"{target} exists; choose another folder or allow overwriting")
        target.parent.mkdir(parents=True, exist_ok=True)
        size = sum(map(nbytes, specs.values()))
        # What is put into another process's part lies there twice for a moment.
        twice = min(size, (spread.processes - 1) * shard_bytes)
        _check_disk(target.parent, size + int(twice))

    def fill(folder: Path) -> None:
        spread.led(lambda: folder.name)
        write_tensors(folder, specs, shards, tensors, spread)
        _write_side_files(folder, side_files, extra_files or {})
        write_synced(folder / "config.json", json_text(config))
        if index:
            write_synced(folder / INDEX, index)

    spread.led(begin)
    if spread.leads:
        replace_folder(target, fill)
    else:
        with naming_full_disk(target):
            folder = target.with_name(spread.led(lambda: ""))
            write_tensors(folder, specs, shards, tensors, spread)
    spread.everyone(True)
    return target


def _check_disk(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed + SPARE_BYTES:
        raise OSError(
            f"{folder} has {free / 1e9:.2f} GB free but the export needs "
            f"{(needed + SPARE_BYTES) / 1e9:.2f} GB; free some space or choose another disk"
        )


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
