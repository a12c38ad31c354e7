"""GPTQ: whole numbers without signs, packed along the inputs, with a zero point per group.

`qweight` int32 [inputs / 8, outputs] (of 8 bits inputs / 4), `qzeros` int32 [groups, outputs / 8],
`scales` [groups, outputs] and, for groups of inputs that do not lie together, `g_idx` int32
[inputs]. Version 1 stores words of zero points less one in every number, version 2 as they are.

Source: github.com/ModelCloud/GPTQModel, `dequantize_weight`.
"""

import functools
from collections.abc import Iterator

import numpy as np

from convert.quantized.arithmetic import scaled, unpack_rows
from convert.quantized.config import Quantization, gptq_layout
from convert.quantized.found import Found, described, is_table
from convert.reader import CheckpointError, SafetensorsFolder
from convert.view import FLOATS, View

PARTS = ("qweight", "qzeros", "scales", "g_idx")
# What is added to a word of zero points of version 1. The sum carries from number to number, as
# the subtraction did that wrote it.
ONES = {4: np.uint32(0x11111111), 8: np.uint32(0x01010101)}


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
    bits, size = said.options.get("bits", 4), said.options.get("group_size", 128)
    per_word = 32 // bits
    words = folder.spec(f"{module}.qweight")[1]
    outputs = words[1] if len(words) == 2 else 0
    inputs = per_word * words[0] if outputs else 0
    groups = -(-inputs // size) if size > 0 else 1
    ordered = f"{module}.g_idx" not in folder
    if not (
        outputs
        and is_table(folder, f"{module}.qweight", (inputs // per_word, outputs), ("int32",))
        and is_table(folder, f"{module}.qzeros", (groups, -(-outputs // per_word)), ("int32",))
        and is_table(folder, f"{module}.scales", (groups, outputs), FLOATS)
        and (ordered or is_table(folder, f"{module}.g_idx", (inputs,), ("int32", "int64")))
    ):
        names = [f"{module}.{part}" for part in PARTS[: 3 if ordered else 4]]
        problems.append(
            f"{module}.weight [{outputs}, {inputs}] has {described(folder, names)}, which does not "
            f"fit gptq of {bits} bits in groups of {size}"
        )
        return None
    first = 1 if gptq_layout(said.options).lower() == "gptq" else 2
    read = functools.partial(_read, folder, module, bits, size if size > 0 else inputs, first)
    return View((outputs, inputs), read)


def _read(folder: SafetensorsFolder, module: str, bits: int, size: int, version: int) -> np.ndarray:
    scales = folder.read(f"{module}.scales")
    groups, outputs = scales.shape
    zeros = folder.read(f"{module}.qzeros").view(np.uint32)
    if version == 1:
        zeros = zeros + ONES[bits]  # modulo 2^32
    zeros = unpack_rows(zeros.view(np.int32), bits, outputs)
    words = folder.read(f"{module}.qweight")
    inputs = words.shape[0] * 32 // bits
    group = np.arange(inputs) // size
    if f"{module}.g_idx" in folder:
        group = folder.read(f"{module}.g_idx").reshape(-1)
        if group.min() < 0 or group.max() >= groups:
            raise CheckpointError(
                folder.folder, [f"{module}.g_idx must lie in [0, {groups}); download it again"]
            )
    wide, zero = (table.T.astype(np.float32)[:, group] for table in (scales, zeros))
    return scaled(unpack_rows(words.T, bits, inputs), wide, scales.dtype, zero)
