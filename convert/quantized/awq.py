"""AWQ, layout "gemm": whole numbers of 4 bits without signs, packed along the outputs.

`qweight` int32 [inputs, outputs / 8], `qzeros` int32 [groups, outputs / 8], `scales` [groups,
outputs]. The eight numbers of a word, lowest bits first, are outputs 0, 2, 4, 6, 1, 3, 5, 7.

Source: github.com/casper-hansen/AutoAWQ, `dequantize_gemm`.
"""

import functools
from collections.abc import Iterator

import numpy as np

from convert.quantized.arithmetic import scaled, spread, unpack_rows
from convert.quantized.config import Quantization
from convert.quantized.found import Found, described, is_table
from convert.reader import SafetensorsFolder
from convert.view import FLOATS, View

PARTS = ("qweight", "qzeros", "scales")
PER_WORD = 8
PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of outputs 0 to 7 in a word


def weights(folder: SafetensorsFolder, said: Quantization, problems: list[str]) -> Iterator[Found]:
    """The weights that are stored in few bits; what is wrong with one is added to `problems`."""
    for name in folder.names:
        module, _, part = name.rpartition(".")
        if part == "qweight":
            stored = tuple(f"{module}.{one}" for one in PARTS if f"{module}.{one}" in folder)
            yield Found(f"{module}.weight", _view(folder, module, said, problems), stored)


def _view(
    folder: SafetensorsFolder, module: str, said: Quantization, problems: list[str]
) -> View | None:
    size = said.options.get("group_size", said.options.get("q_group_size", 128))
    words = folder.spec(f"{module}.qweight")[1]
    inputs, outputs = (words[0], PER_WORD * words[1]) if len(words) == 2 else (0, 0)
    groups = -(-inputs // size) if size > 0 else 1
    packed = outputs // PER_WORD
    if not (
        outputs
        and is_table(folder, f"{module}.qweight", (inputs, packed), ("int32",))
        and is_table(folder, f"{module}.qzeros", (groups, packed), ("int32",))
        and is_table(folder, f"{module}.scales", (groups, outputs), FLOATS)
    ):
        names = [f"{module}.{part}" for part in PARTS]
        problems.append(
            f"{module}.weight [{outputs}, {inputs}] has {described(folder, names)}, which does not "
            f"fit awq in groups of {size}"
        )
        return None
    read = functools.partial(_read, folder, module, size if size > 0 else inputs)
    return View((outputs, inputs), read)


def _read(folder: SafetensorsFolder, module: str, size: int) -> np.ndarray:
    scales = folder.read(f"{module}.scales").T
    codes, zeros = (_outputs(folder.read(f"{module}.{part}")) for part in ("qweight", "qzeros"))
    wide, zero = (spread(table, (1, size), codes.shape) for table in (scales, zeros))
    return scaled(codes, wide, scales.dtype, zero)


def _outputs(words: np.ndarray) -> np.ndarray:  # int32 [n, outputs / 8] -> uint8 [outputs, n]
    found = unpack_rows(words, 4, PER_WORD * words.shape[1])
    in_words = found.reshape(len(found), -1, PER_WORD)[:, :, list(PLACES)]
    return np.ascontiguousarray(in_words.reshape(found.shape).T)
