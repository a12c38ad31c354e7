"""Atomic writing of sharded safetensors folders."""

import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from convert.families import find_family
from convert.families.hf_config import num_experts, rope_parameters
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
from moe_jax.errors import InputError

SIDE_FILES = (
    "tokenizer*", "tokenization_*.py", "vocab*", "merges.txt", "*.model", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "generation_config.json", "chat_template*",
    "additional_chat_templates", "preprocessor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
SPARE_BYTES = 64 << 20  # left free on the disk, for side files and the file system itself
LEFTOVER = re.compile(r"(.+)\.(tmp|old)-\d+")  # named after the process that wrote it


@dataclass(frozen=True)
class _Place:
    file: str
    offset: int  # bytes from the start of the file
    dtype: np.dtype
    shape: tuple[int, ...]


def portable_config(hf_config: dict, *, with_mtp: bool = False) -> dict:
    """A source config.json in the spellings of transformers 4.57 and of 5.x at once.

    Either version silently falls back to default values where its own spelling is absent.
    `quantization_config` is dropped, since weights are dequantised when read, and `auto_map`, whose
    code does not travel: an exporter that quantises or brings code adds its own afterwards.

    Args:
      hf_config: config.json as a dict; not changed.
      with_mtp: whether layers that predict further tokens are written; else the config has none.

    Returns:
      A new dict.

    Raises:
      InputError: if the model type is unknown.
    """
    family = find_family(hf_config.get("model_type"))
    gone = ("quantization_config", "auto_map")
    config = {key: value for key, value in hf_config.items() if key not in gone}
    rope = rope_parameters(config, family.rope)
    scaled = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    config["rope_theta"] = rope["rope_theta"]
    config["rope_parameters"] = rope
    config["rope_scaling"] = None if rope["rope_type"] == "default" else scaled
    if "partial_rotary_factor" in rope:
        config["partial_rotary_factor"] = rope["partial_rotary_factor"]
    config |= dict.fromkeys(family.count_keys, num_experts(config))
    if family.mtp is not None and not with_mtp:
        config[family.mtp.count_key] = 0
    dtype = config.get("dtype") or config.get("torch_dtype")
    if dtype is not None:
        config["dtype"] = config["torch_dtype"] = dtype
    return config


def write_folder(
    target: Path | str,
    specs: Mapping[str, Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    config: dict,
    side_files: Path | str | None,
    *,
    shard_bytes: float = SHARD_BYTES,
    extra_files: Mapping[str, bytes | str | Path] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint folder that is either complete or absent.

    Args:
      target: the folder to make.
      specs: name -> (dtype, shape) of every tensor, in file order.
      tensors: (name, array) in any order, taken one at a time.
      config: config.json.
      side_files: folder whose tokenizer, generation, template and licence files are copied byte
        for byte, or None.
      shard_bytes: at most so many bytes of tensors per file (more if one tensor is larger).
      extra_files: file name -> content, or path of a file to copy.
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
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_tensors(temporary, specs, shards, tensors)
        _write_side_files(temporary, side_files, extra_files or {})
        _write_file(temporary / "config.json", json_text(config))
        _sync(temporary)
        _move_into_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
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
        _write_file(folder / INDEX, index)


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
    folder: Path, source: Path | str | None, extra: Mapping[str, bytes | str | Path]
) -> None:
    chosen = [] if source is None else [p for glob in SIDE_FILES for p in Path(source).glob(glob)]
    for path in chosen:
        if path.is_dir():
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.suffix != ".safetensors":
            _write_file(folder / path.name, path.read_bytes())
    for name, content in extra.items():
        if isinstance(content, Path):
            content = content.read_bytes()
        _write_file(folder / name, content.encode() if isinstance(content, str) else content)


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Clean up after killed writers: unfinished files go, a target that was set aside comes back.

    Args:
      folder: where targets lie; may be absent. Nobody else may be writing there.
    """
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found = LEFTOVER.fullmatch(path.name)
        if not found:
            continue
        target = path.with_name(found[1])
        if found[2] == "old" and not target.exists():
            os.replace(path, target)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename; a folder in the way is set aside first and removed last."""
    if not target.exists():
        os.replace(temporary, target)
        _sync(target.parent)
        return
    old = target.with_name(f"{target.name}.old-{os.getpid()}")
    os.replace(target, old)
    try:
        os.replace(temporary, target)
    except BaseException:
        os.replace(old, target)
        raise
    _sync(target.parent)
    shutil.rmtree(old) if old.is_dir() else old.unlink()
