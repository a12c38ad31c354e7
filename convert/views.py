"""Tensors under their public names, whatever the layout in which a file stores them."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convert import interleaved
from convert.reader import SafetensorsFolder
from convert.rules import Together

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
FLOATS = ("bfloat16", "float16", "float32")
_FLOAT8 = "float8_e4m3fn"


@dataclass(frozen=True)
class View:
    """One public tensor: its shape, the stored tensors it uses, and how to read it."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


def open_views(
    folder: SafetensorsFolder, config: dict, *, together: Together = ""
) -> tuple[dict[str, View], list[str]]:
    """Give every tensor of a folder its public per-expert, unpacked name.

    Five layouts are understood: plain tensors; experts fused into `gate_up_proj [E, 2F, D]`
    and `down_proj [E, D, F]`; 4-bit `weight_packed`, `weight_scale`, `weight_shape`; 8-bit floats
    `weight` with a `weight_scale_inv` per block; experts as in `convert.interleaved`.

    Args:
      folder: the checkpoint.
      config: its config.json.
      together: how fused experts lie, if they do as in `convert.interleaved`.

    Returns:
      (name -> view, problems).
    """
    problems: list[str] = []
    quantization = config.get("quantization_config")
    block = _block_size(quantization, problems)
    four_bit_floats = bool(together) and (quantization or {}).get("quant_method") == "mxfp4"
    groups = None if block or four_bit_floats else _group_sizes(quantization, problems)
    names = set(folder.names)
    packed = {name.removesuffix("_packed") for name in names if name.endswith(".weight_packed")}
    views: dict[str, View] = {}

    def add(name: str, view: View | None) -> None:
        if name in views:
            problems.append(f"{name} is stored twice, in two layouts")
        elif view is not None:
            views[name] = view

    for name in folder.names:
        weight, _, suffix = name.rpartition("_")
        if weight in packed and suffix in ("packed", "scale", "shape"):
            if suffix == "packed":
                add(weight, _packed_view(folder, weight, groups, problems))
            continue
        if weight.removesuffix("_zero") in packed and name.endswith("_zero_point"):
            problems.append(f"{name}: asymmetric 4-bit weights are not read; use symmetric ones")
            continue
        if together and interleaved.is_whole(folder, name, together):
            for part, shape, read in interleaved.split_experts(folder, name, together, problems):
                add(part, View(shape, read))
            continue
        fused = _FUSED.fullmatch(name)
        if fused and len(folder.spec(name)[1]) == 3:
            for part, view in _fused_views(folder, name, *fused.groups()):
                add(part, view)
            continue
        add(name, _own_view(folder, name, block, problems))
    return views, problems


def _own_view(
    folder: SafetensorsFolder, name: str, block: tuple[int, int] | None, problems: list[str]
) -> View | None:
    """A tensor that stands for itself; None for the scales of another, or where it is unread."""
    dtype, shape = folder.spec(name)
    if dtype.name == _FLOAT8 and block:
        return _block_view(folder, name, block, problems)
    if block and name.endswith("_scale_inv") and name.removesuffix("_scale_inv") in folder:
        return None
    if dtype.name not in FLOATS:
        problems.append(f"{name} has dtype {dtype}; expected one of {', '.join(FLOATS)}")
        return None
    return View(shape, lambda: folder.read(name))


def _fused_views(folder: SafetensorsFolder, name: str, prefix: str, kind: str):
    """Per-expert views of a fused tensor; gate rows come before up rows."""
    _, (experts, rows, columns) = folder.spec(name)
    projections = ["gate_proj", "up_proj"] if kind == "gate_up_proj" else ["down_proj"]
    shape = (rows // len(projections), columns)
    for part in range(experts * len(projections)):
        expert, which = divmod(part, len(projections))
        first = expert * rows * columns + which * shape[0] * columns
        yield (
            f"{prefix}.{expert}.{projections[which]}.weight",
            View(shape, lambda first=first: folder.read_part(name, first, shape)),
        )


def _block_size(quantization: dict | None, problems: list[str]) -> tuple[int, int] | None:
    """Rows and columns that share a scale in an FP8 checkpoint; None for other ones."""
    if quantization is None or quantization.get("quant_method") != "fp8":
        return None
    match quantization.get("weight_block_size"):
        case [int(rows), int(columns)] if rows > 0 and columns > 0:
            return rows, columns
        case size:
            problems.append(
                f"quantization_config is fp8 with weight_block_size={str(size)[:80]}, which must "
                "be two positive integers, rows and columns"
            )
            return None


def _block_view(
    folder: SafetensorsFolder, weight: str, block: tuple[int, int], problems: list[str]
) -> View | None:
    """View of an 8-bit weight with a scale per block, or None after adding to `problems`."""
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

    def read() -> np.ndarray:
        wide = folder.read(scale_name).astype(np.float32)
        for axis in (0, 1):
            wide = np.repeat(wide, block[axis], axis=axis)
        return folder.read(weight).astype(np.float32) * wide[: shape[0], : shape[1]]

    return View(shape, read)


def _group_sizes(quantization: dict | None, problems: list[str]) -> tuple[int, ...] | None:
    """Group sizes declared in config.json, -1 for whole rows; None without quantisation."""
    if quantization is None:
        return None
    found = tuple(str(quantization.get(key))[:80] for key in ("quant_method", "format"))
    if found != ("compressed-tensors", "pack-quantized"):
        problems.append(
            f"quantization_config is {found[0]}/{found[1]}; only compressed-tensors/"
            "pack-quantized, fp8 in blocks and unquantised weights are read"
        )
        return ()
    sizes = []
    groups = quantization.get("config_groups", {})
    for key, group in groups.items() if isinstance(groups, dict) else ((str(groups), None),):
        weights = group.get("weights") if isinstance(group, dict) else None
        weights = weights if isinstance(weights, dict) else {}
        if weights.get("num_bits") != 4 or weights.get("symmetric", True) is not True:
            problems.append(f"quantization_config {key[:80]} must have symmetric 4-bit weights")
        size = weights.get("group_size")
        size = -1 if size is None else size
        if type(size) is not int or size == 0 or size < -1:
            problems.append(
                f"quantization_config {key[:80]} has group_size={str(size)[:80]}, which must be a "
                "positive whole number, or -1 for whole rows"
            )
            size = -1
        sizes.append(size)
    return tuple(sizes)


def _packed_view(
    folder: SafetensorsFolder, weight: str, groups: tuple[int, ...] | None, problems: list[str]
) -> View | None:
    """View of a 4-bit weight, or None after adding to `problems`."""
    missing = [s for s in ("_scale", "_shape") if weight + s not in folder]
    if missing or groups is None:
        lacks = [weight + s for s in missing] or ["quantization_config in config.json"]
        problems.append(f"{weight}_packed needs {', '.join(lacks)}")
        return None
    dtype, packed = folder.spec(weight + "_packed")
    scale_dtype, scales = folder.spec(weight + "_scale")
    shape_dtype, shape_shape = folder.spec(weight + "_shape")
    if shape_dtype.kind != "i" or shape_shape != (2,):
        problems.append(f"{weight}_shape must be two integers")
        return None
    rows, columns = (int(size) for size in folder.read(weight + "_shape"))
    fitting = [g if g > 0 else columns for g in groups]
    fitting = [g for g in fitting if scales == (rows, -(-columns // g))]
    if (
        dtype.name != "int32"
        or packed != (rows, -(-columns // 8))
        or scale_dtype.name not in FLOATS
        or not fitting
    ):
        problems.append(
            f"{weight} is [{rows}, {columns}] but has packed {dtype} {list(packed)} and scales "
            f"{scale_dtype} {list(scales)}, which fits none of the group sizes {list(groups)}"
        )
        return None

    def read() -> np.ndarray:
        codes = unpack_words(folder.read(weight + "_packed"), columns)
        scale = folder.read(weight + "_scale")
        wide = np.repeat(scale.astype(np.float32), fitting[0], axis=1)[:, :columns]
        return codes * wide  # exact in float32; the reader casts if it is asked to

    return View((rows, columns), read)


def unpack_words(words: np.ndarray, columns: int) -> np.ndarray:
    """Codes -8..7 from int32 [rows, ceil(columns / 8)], element i in bits 4i to 4i + 3."""
    shifts = np.arange(0, 32, 4, dtype=np.uint32)
    nibbles = (words.view(np.uint32)[:, :, None] >> shifts) & np.uint32(15)
    codes = nibbles.astype(np.int8).reshape(words.shape[0], words.shape[1] * 8) - np.int8(8)
    return codes[:, :columns].astype(np.float32)
