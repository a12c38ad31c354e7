"""compressed-tensors: whole numbers packed into words, or stored like 8-bit floats one by one.

`weight_packed` int32 [rows, words] with `weight_shape`, or `weight` int8 or float8 [rows, columns];
`weight_scale` per tensor, row, group of a row or block; `weight_zero_point` like the scale, packed
along the rows where codes are packed.

Source: github.com/vllm-project/compressed-tensors.
"""

import functools
from collections.abc import Iterator

import numpy as np

from convert.quantized.arithmetic import Block, scaled, spread, unpack_rows
from convert.quantized.config import Quantization, Scheme
from convert.quantized.found import Found, described, is_table, read_table
from convert.reader import SafetensorsFolder
from convert.view import FLOATS, View

CODES = {"int8": False, "float8_e4m3fn": True}  # dtype of a plain code -> whether it is a float
PARTS = ("weight_packed", "weight_shape", "weight", "weight_scale", "weight_zero_point")
# How activations are rounded where the model is served; they stay floats here.
OF_ACTIVATIONS = frozenset(
    f"{what}_{number}" for what in ("input", "output", "q", "k", "v")
    for number in ("scale", "zero_point")
)  # fmt: skip


def weights(folder: SafetensorsFolder, said: Quantization, problems: list[str]) -> Iterator[Found]:
    """The weights that are stored in few bits; what is wrong with one is added to `problems`."""
    for name in folder.names:
        module, _, part = name.rpartition(".")
        packed = part == "weight_packed"
        if not packed and not (part == "weight" and folder.spec(name)[0].name in CODES):
            continue
        stored = tuple(f"{module}.{one}" for one in PARTS if f"{module}.{one}" in folder)
        yield Found(f"{module}.weight", _view(folder, module, packed, said, problems), stored)


def of_activations(folder: SafetensorsFolder) -> Iterator[str]:
    """Names of tensors that say how activations are rounded."""
    return (name for name in folder.names if name.rpartition(".")[2] in OF_ACTIVATIONS)


def _view(
    folder: SafetensorsFolder, module: str, packed: bool, said: Quantization, problems: list[str]
) -> View | None:
    scheme = said.scheme(module)
    if scheme is None or scheme.packed != packed:
        how = "as they are" if scheme is None else "packed" if scheme.packed else "not packed"
        problems.append(
            f"{module} holds {described(folder, [f'{module}.weight_packed', f'{module}.weight'])}, "
            f"but by quantization_config (targets, ignore) its weights are stored {how}"
        )
        return None
    shape = _shape(folder, module, packed)
    if shape is None or not _fits(folder, module, scheme, shape):
        names = [f"{module}.{part}" for part in PARTS[:1] + PARTS[3:]] if packed else [
            f"{module}.{part}" for part in PARTS[2:]
        ]  # fmt: skip
        problems.append(
            f"{module}.weight {'of an unknown shape' if shape is None else list(shape)} has "
            f"{described(folder, names)}, which does not fit {scheme.bits} bits per "
            f"{scheme.strategy}{'' if scheme.group_size is None else f' of {scheme.group_size}'}"
            f"{'' if scheme.symmetric else ' with zero points'}"
        )
        return None
    read = functools.partial(_read, folder, module, scheme, shape)
    scale = folder.spec(f"{module}.weight_scale")[0]
    codes = functools.partial(_codes_and_scales, folder, module, scheme, shape)
    return View(shape, read, codes if scheme.is_native(scale) else None, scale)


def _shape(folder: SafetensorsFolder, module: str, packed: bool) -> tuple[int, int] | None:
    name = f"{module}.weight"
    if not packed:
        shape = folder.spec(name)[1]
        return (shape[0], shape[1]) if len(shape) == 2 else None
    name += "_shape"
    if not is_table(folder, name, (2,), ("int32", "int64")):
        return None
    rows, columns = (int(size) for size in folder.read(name).reshape(-1))
    return rows, columns


def _tables(scheme: Scheme, shape: tuple[int, int]) -> tuple[Block, tuple[int, int]]:
    """Weights that share a scale, and the shape of the scales."""
    rows, columns = (own or size for own, size in zip(scheme.block, shape, strict=True))
    return (rows, columns), (-(-shape[0] // rows), -(-shape[1] // columns))


def _packs_zeros(scheme: Scheme) -> bool:
    return scheme.packed and scheme.strategy in ("group", "channel")


def _fits(folder: SafetensorsFolder, module: str, scheme: Scheme, shape: tuple[int, int]) -> bool:
    rows, columns = shape
    if rows < 1 or columns < 1:
        return False
    per_word = 32 // scheme.bits
    _, table = _tables(scheme, shape)
    if scheme.packed:
        words = (rows, -(-columns // per_word))
        codes = folder.spec(f"{module}.weight_packed") == (np.dtype(np.int32), words)
    else:
        codes = CODES[folder.spec(f"{module}.weight")[0].name] == scheme.floating
    zero = f"{module}.weight_zero_point"
    if scheme.symmetric:
        zeros = True  # the format leaves them out, and where they are stored they are all zero
    elif _packs_zeros(scheme):
        zeros = is_table(folder, zero, (-(-rows // per_word), table[1]), ("int32",))
    else:
        zeros = is_table(folder, zero, table, ("int8",))
    return codes and zeros and is_table(folder, f"{module}.weight_scale", table, FLOATS)


def _codes(folder: SafetensorsFolder, module: str, scheme: Scheme, columns: int) -> np.ndarray:
    if not scheme.packed:
        return folder.read(f"{module}.weight")
    return _signed(folder.read(f"{module}.weight_packed"), scheme.bits, columns)


def _signed(words: np.ndarray, bits: int, columns: int) -> np.ndarray:
    """int8 [rows, columns] out of words, where each number is stored plus half of their range."""
    half = np.uint8(1 << (bits - 1))
    return (unpack_rows(words, bits, columns) - half).view(np.int8)  # unsigned numbers wrap


def _read(
    folder: SafetensorsFolder, module: str, scheme: Scheme, shape: tuple[int, int]
) -> np.ndarray:
    block, table = _tables(scheme, shape)
    scale = read_table(folder, f"{module}.weight_scale", table)
    zero = None
    if not scheme.symmetric:
        name = f"{module}.weight_zero_point"
        zero = folder.read(name)
        zero = _signed(zero.T, scheme.bits, shape[0]).T if _packs_zeros(scheme) else zero
        zero = spread(zero.reshape(table), block, shape)
    codes = _codes(folder, module, scheme, shape[1])
    return scaled(codes, spread(scale, block, shape), scale.dtype, zero)


def _codes_and_scales(
    folder: SafetensorsFolder, module: str, scheme: Scheme, shape: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    scale = read_table(folder, f"{module}.weight_scale", _tables(scheme, shape)[1])
    return _codes(folder, module, scheme, shape[1]), scale
