"""FP8 in blocks: `weight` float8 [rows, columns] with a `weight_scale_inv` per block.

Source: the release of DeepSeek-V3.
"""

import functools
from collections.abc import Iterator

import numpy as np

from convert.quantized.arithmetic import Block, scaled, spread
from convert.quantized.config import Quantization
from convert.quantized.found import Found
from convert.reader import SafetensorsFolder
from convert.view import FLOATS, View

FLOAT8 = "float8_e4m3fn"


def weights(folder: SafetensorsFolder, said: Quantization, problems: list[str]) -> Iterator[Found]:
    """The weights that are stored in few bits; what is wrong with one is added to `problems`."""
    for name in folder.names:
        scale = name + "_scale_inv"
        if folder.spec(name)[0].name == FLOAT8:
            view = _view(folder, name, said.options["weight_block_size"], problems)
            yield Found(name, view, (name, scale))


def _view(folder: SafetensorsFolder, weight: str, block: Block, problems: list[str]) -> View | None:
    scale_name, shape = weight + "_scale_inv", folder.spec(weight)[1]
    if len(shape) != 2 or scale_name not in folder:
        problems.append(f"{weight} is 8-bit, so it must be a matrix and have {scale_name}")
        return None
    dtype, scales = folder.spec(scale_name)
    wanted = (-(-shape[0] // block[0]), -(-shape[1] // block[1]))
    if dtype.name not in FLOATS or scales != wanted:
        problems.append(
            f"{scale_name} is {dtype} {list(scales)}; a weight {list(shape)} in blocks of "
            f"{list(block)} needs floats {list(wanted)}"
        )
        return None
    codes = functools.partial(_codes_and_scales, folder, weight)
    return View(shape, functools.partial(_read, folder, weight, block), codes, dtype)


def _codes_and_scales(folder: SafetensorsFolder, weight: str) -> tuple[np.ndarray, np.ndarray]:
    return folder.read(weight), folder.read(weight + "_scale_inv")


def _read(folder: SafetensorsFolder, weight: str, block: Block) -> np.ndarray:
    codes, scale = _codes_and_scales(folder, weight)
    shape = (codes.shape[0], codes.shape[1])
    return scaled(codes, spread(scale, block, shape), np.dtype(np.float32))
