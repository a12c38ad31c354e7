"""bitsandbytes in 4 bits: an index into 16 values, two to a byte, times the largest of a block.

`weight` uint8 [bytes, 1], its elements in row-major order, the first of two in the high half;
`weight.quant_map` float32 [16]; `weight.absmax` float32 [blocks], or an index uint8 into
`weight.nested_quant_map` float32 [256] times `weight.nested_absmax` per 256 blocks, plus an offset;
`weight.quant_state.bitsandbytes__nf4` JSON as bytes.

Source: github.com/bitsandbytes-foundation/bitsandbytes, `dequantize_4bit`.
"""

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from convert.quantized.config import Quantization
from convert.quantized.found import Found, described, is_table
from convert.reader import SafetensorsFolder
from convert.view import View
from moe_jax.errors import InputError
from moe_jax.json_files import parse_json

STATE = ".quant_state.bitsandbytes__nf4"
PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", STATE)
DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}


@dataclass(frozen=True)
class _State:
    """What a weight says of itself."""

    shape: tuple[int, int]
    block: int
    nested_block: int
    offset: float
    dtype: np.dtype


def weights(folder: SafetensorsFolder, said: Quantization, problems: list[str]) -> Iterator[Found]:
    """The weights that are stored in few bits; what is wrong with one is added to `problems`."""
    del said  # each weight has its own state
    for name in folder.names:
        if name + STATE in folder:
            stored = (name, *(name + part for part in PARTS if name + part in folder))
            yield Found(name, _view(folder, name, problems), stored)


def _view(folder: SafetensorsFolder, name: str, problems: list[str]) -> View | None:
    try:
        state = _state(folder.read(name + STATE).tobytes())
    except InputError as error:
        problems.append(f"{name}{STATE} {error}")
        return None
    size = math.prod(state.shape)
    blocks = -(-size // state.block)
    nested = name + ".nested_absmax" in folder
    fits = (
        is_table(folder, name, (-(-size // 2),), ("uint8",))
        and is_table(folder, name + ".quant_map", (16,), ("float32",))
        and is_table(folder, name + ".absmax", (blocks,), ("uint8",) if nested else ("float32",))
    )
    if nested:
        tables = (("nested_absmax", -(-blocks // state.nested_block)), ("nested_quant_map", 256))
        fits = fits and all(is_table(folder, f"{name}.{k}", (n,), ("float32",)) for k, n in tables)
    if not fits:
        names = [name, *(name + part for part in PARTS[: 4 if nested else 2])]
        problems.append(
            f"{name} {list(state.shape)} has {described(folder, names)}, which does not fit NF4 in "
            f"blocks of {state.block}"
        )
        return None
    return View(state.shape, functools.partial(_read, folder, name, state, nested))


def _state(text: bytes) -> _State:
    said = parse_json(text)
    said = said if isinstance(said, dict) else {}
    offset, dtype = said.get("nested_offset", 0.0), said.get("dtype")
    match said.get("shape"), said.get("blocksize"), said.get("nested_blocksize", 256):
        case [int(rows), int(columns)], int(block), int(nested) if (
            min(rows, columns, block, nested) > 0
            and said.get("quant_type") == "nf4"
            and isinstance(dtype, str)
            and dtype in DTYPES
            and type(offset) in (int, float)
        ):
            return _State((rows, columns), block, nested, float(offset), DTYPES[dtype])
    raise InputError(f"is no state of a matrix in NF4: {str(said)[:80]}")


def _read(folder: SafetensorsFolder, name: str, state: _State, nested: bool) -> np.ndarray:
    largest = folder.read(name + ".absmax").reshape(-1)
    if nested:
        inner = folder.read(name + ".nested_quant_map").reshape(-1)[largest]
        outer = np.repeat(folder.read(name + ".nested_absmax").reshape(-1), state.nested_block)
        largest = inner * outer[: len(inner)] + np.float32(state.offset)
    pairs = folder.read(name).reshape(-1)
    index = np.stack([pairs >> 4, pairs & 15], axis=-1).reshape(-1)
    size = math.prod(state.shape)
    values = folder.read(name + ".quant_map").reshape(-1)[index[:size]]
    values *= np.repeat(largest, state.block)[:size]
    return values.reshape(state.shape).astype(state.dtype)
