"""Headers of safetensors files: everything that they claim is checked before it is believed."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeGuard

import ml_dtypes
import numpy as np

from moe_jax.errors import InputError
from moe_jax.json_files import parse_json

DTYPES = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8),
}
# What no tensor has; one without elements could name any length at no cost in bytes.
MOST_AXES, MOST_LENGTH = 8, 1 << 40
MAX_HEADER = 256 << 20  # bytes; real headers of the largest models are some tens of MiB


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies: `start` and `stop` are byte offsets in `file`."""

    name: str
    file: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_header(path: Path) -> tuple[bytes, int]:
    """JSON bytes of the header and the offset at which data start."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length < 2:
            raise InputError(f"{size} bytes hold no safetensors header; download it again")
        if length > min(MAX_HEADER, size - 8):
            raise InputError(
                f"header length {length} exceeds the file ({size} bytes) or the limit; download it "
                "again"
            )
        return file.read(length), 8 + length


def _unique(pairs: list[tuple[str, object]]) -> dict:
    keys = [key for key, _ in pairs]
    if len(set(keys)) < len(keys):
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise InputError(f"names {twice} twice")
    return dict(pairs)


def parse_header(
    header: bytes, file: str, data_start: int, size: int, problems: list[str]
) -> dict[str, TensorSpec]:
    """Specs of the sound entries; `problems` collects what is wrong with the others."""
    try:
        entries = parse_json(header, _unique)
    except InputError as error:
        problems.append(f"header {error}")
        return {}
    if not isinstance(entries, dict):
        problems.append("header is not a JSON object")
        return {}
    entries.pop("__metadata__", None)
    specs: dict[str, TensorSpec] = {}
    for name, entry in entries.items():
        try:
            specs[name] = _spec(name, entry, file, data_start, size)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    end, last = data_start, ""
    for name, spec in sorted(specs.items(), key=lambda item: (item[1].start, item[1].stop)):
        if spec.start < end:
            problems.append(f"{name} overlaps {last}")
        end, last = max(end, spec.stop), name
    return specs


def _spec(name: str, entry: object, file: str, data_start: int, size: int) -> TensorSpec:
    fields = entry if isinstance(entry, dict) else {}
    kind, shape = fields.get("dtype"), fields.get("shape")
    dtype = DTYPES.get(kind) if isinstance(kind, str) else None
    if dtype is None:
        raise InputError(f"dtype {str(kind)[:80]!r} is none of {', '.join(DTYPES)}")
    offsets = fields.get("data_offsets")
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise InputError(
            f"shape {str(shape)[:80]} or data_offsets {str(offsets)[:80]} are not natural numbers"
        )
    if len(shape) > MOST_AXES or max(shape, default=0) > MOST_LENGTH:
        raise InputError(
            f"shape {str(shape)[:80]} has more than {MOST_AXES} axes or one beyond {MOST_LENGTH}"
        )
    if 0 in shape:
        raise InputError(f"shape {shape} holds no element")
    start, stop = (data_start + offset for offset in offsets)
    expected = math.prod(shape) * dtype.itemsize
    if stop - start != expected:
        raise InputError(f"has {stop - start} bytes but its shape {shape} needs {expected}")
    if stop > size:
        raise InputError(
            f"ends at byte {stop} of a file of {size} bytes; it is truncated, download it again"
        )
    return TensorSpec(name, file, dtype, tuple(shape), start, stop)


def _naturals(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)
