"""Where each byte of a safetensors folder goes: shards, headers and index, from shapes alone."""

import json
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from convert.headers import DTYPES
from convert.reader import SINGLE
from moe_jax.errors import InputError

Spec = tuple[np.dtype, tuple[int, ...]]
BFLOAT16, FLOAT32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32)

SHARD_BYTES = 5e9
_CODES = {dtype: code for code, dtype in DTYPES.items()}


def nbytes(spec: Spec) -> int:
    """Bytes of a tensor."""
    return math.prod(spec[1]) * spec[0].itemsize


def plan_shards(specs: Mapping[str, Spec], shard_bytes: float) -> list[list[str]]:
    """Names per shard, filled in order."""
    unknown = sorted({str(d) for d, _ in specs.values() if d not in _CODES})
    if unknown or not specs:
        raise InputError(f"dtypes {unknown} cannot be written; use {', '.join(DTYPES)}")
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        size = nbytes(spec)
        if shards[-1] and used + size > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def lay_out(names: list[str], specs: Mapping[str, Spec]) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, file offset of each tensor and file size.

    Larger items come first and the header is padded, so every tensor is aligned to its items.
    """
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(names, key=lambda name: -specs[name][0].itemsize):
        dtype, shape = specs[name]
        start, end = end, end + nbytes(specs[name])
        code = _CODES[dtype]
        entries[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    offsets = {name: first + entries[name]["data_offsets"][0] for name in names}
    return len(text).to_bytes(8, "little") + text, offsets, first + end


def shard_files(shards: list[list[str]]) -> dict[str, list[str]]:
    """File name -> names of its tensors."""
    if len(shards) == 1:
        return {SINGLE: shards[0]}
    count = len(shards)
    return {f"model-{n:05d}-of-{count:05d}.safetensors": s for n, s in enumerate(shards, 1)}


def index_text(specs: Mapping[str, Spec], shards: list[list[str]]) -> bytes:
    """The index of several shards; empty for a single file, which needs none."""
    if len(shards) == 1:
        return b""
    total = sum(nbytes(spec) for spec in specs.values())
    files = {name: file for file, names in shard_files(shards).items() for name in names}
    return json_text({"metadata": {"total_size": total}, "weight_map": files})


def weight_bytes(specs: Mapping[str, Spec], *, shard_bytes: float = SHARD_BYTES) -> int:
    """Bytes of the weight files and the index that `write_folder` makes, before it is called."""
    shards = plan_shards(specs, shard_bytes)
    return len(index_text(specs, shards)) + sum(lay_out(names, specs)[2] for names in shards)


def json_text(value: dict) -> bytes:
    """A JSON file, for people too."""
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
