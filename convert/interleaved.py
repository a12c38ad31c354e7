"""Experts of a layer in one tensor, as gpt-oss and Qwen3-VL-MoE store them, taken apart and back.

On disk `gate_up_proj [E, D, 2F]` has gate channels in even and up channels in odd columns
("alternating", gpt-oss), or those of gate before those of up ("halves", Qwen3-VL-MoE), and
`down_proj [E, F, D]` lies transposed; so do `gate_up_proj_bias [E, 2F]` and `down_proj_bias
[E, D]`. In MXFP4 the two are `*_blocks [E, rows, groups, 16]` and `*_scales [E, rows, groups]`,
whose rows are channels of gate_up_proj, alternating, and coordinates of down_proj.

Under names of single experts they are `experts.0.gate_proj.weight [F, D]`, `.up_proj.bias [F]`,
`.down_proj.weight_blocks [D, groups, 16]` and so on.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from convert.formats.mxfp4 import unpack
from convert.reader import SafetensorsFolder
from convert.rules import Together
from convert.view import FLOATS
from moe_jax.errors import InputError

_WHOLE = re.compile(r"(.*\.mlp\.experts)\.(gate_up|down)_proj(_bias|_blocks|_scales|)")
_PART = re.compile(r"(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)(.*)")

Part = tuple[str, tuple[int, ...], Callable[[], np.ndarray]]


def is_whole(folder: SafetensorsFolder, name: str, together: Together) -> bool:
    """Whether a tensor on disk holds all experts of a layer in the layout of this module.

    transformers 5 can also write halves as its modules have them, [E, 2F, D] and [E, D, F].
    """
    found = _WHOLE.fullmatch(name)
    if found is None or together != "halves":
        return found is not None
    both, down = (f"{found[1]}.{part}_proj" for part in ("gate_up", "down"))
    if both not in folder or down not in folder:
        return True
    return folder.spec(both)[1][-1] == 2 * folder.spec(down)[1][-2:][0]


def split_experts(
    folder: SafetensorsFolder, name: str, together: Together, problems: list[str]
) -> Iterator[Part]:
    """Take a tensor on disk apart.

    Args:
      folder: the checkpoint.
      name: of a tensor that `is_whole`; scales come with their blocks.
      together: how channels of gate and up lie in it.
      problems: what is wrong with it is added here.

    Yields:
      (name of a single expert's tensor, its shape, how to read it).
    """
    found = _WHOLE.fullmatch(name)
    assert found
    prefix, kind, suffix = found.groups()
    stem = name.removesuffix(suffix) if suffix else name
    if suffix == "_scales":
        if stem + "_blocks" not in folder:
            problems.append(f"{name} has no {stem}_blocks")
        return
    dtype, shape = folder.spec(name)
    rank = {"_bias": 2, "": 3, "_blocks": 4}[suffix]
    parts = ("gate", "up") if kind == "gate_up" else ("down",)
    known = dtype.name in FLOATS if suffix != "_blocks" else _has_scales(folder, stem)
    channels = shape[2 if suffix == "" and kind == "gate_up" else 1] if len(shape) == rank else 0
    if len(shape) != rank or not known or (kind == "gate_up" and channels % 2):
        problems.append(
            f"{name} is {dtype} {list(shape)}; expected floats gate_up_proj [E, D, 2F], "
            "down_proj [E, F, D] and their biases, or uint8 blocks [E, rows, groups, 16] with "
            "scales [E, rows, groups]"
        )
        return
    for number in range(shape[0] * len(parts)):
        expert, which = divmod(number, len(parts))
        own = _share(which, len(parts), channels, together)
        read = _reader(folder, stem, suffix, expert, own)
        public = f"{prefix}.{expert}.{parts[which]}_proj."
        yield public + ("bias" if suffix == "_bias" else "weight"), *_part(shape, suffix, own, read)


def _share(which: int, parts: int, channels: int, together: Together) -> slice:
    """Where the channels of gate or up lie among those of both."""
    if parts == 1 or together == "alternating":
        return slice(which, None, parts)
    return slice(which * channels // parts, (which + 1) * channels // parts)


def _has_scales(folder: SafetensorsFolder, stem: str) -> bool:
    dtype, shape = folder.spec(stem + "_blocks")
    if stem + "_scales" not in folder or len(shape) != 4 or shape[3] != 16:
        return False
    return dtype.name == "uint8" and folder.spec(stem + "_scales") == (dtype, shape[:3])


def _part(shape: tuple[int, ...], suffix: str, own: slice, read) -> tuple:
    if suffix == "_bias":
        return (len(range(shape[1])[own]),), read
    if suffix == "":
        return (len(range(shape[2])[own]), shape[1]), read
    return (len(range(shape[1])[own]), 32 * shape[2]), read


def _reader(folder: SafetensorsFolder, stem: str, suffix: str, expert: int, own: slice):
    def one(name: str) -> np.ndarray:
        shape = folder.spec(name)[1][1:]
        return folder.read_part(name, expert * int(np.prod(shape, dtype=np.int64)), shape)

    def read() -> np.ndarray:
        if suffix == "_blocks":
            return unpack(one(stem + "_blocks")[own], one(stem + "_scales")[own])
        whole = one(stem + suffix)
        return whole[own].copy() if suffix else np.ascontiguousarray(whole.T[own])

    return read


def fuse_experts(
    tensors: Iterable[tuple[str, np.ndarray]], experts: int, together: Together
) -> Iterator[tuple[str, np.ndarray]]:
    """Put the tensors of one layer together, the inverse of `split_experts`.

    Args:
      tensors: (name, array), also such as are no expert's; all experts have one width.
      experts: E.
      together: how channels of gate and up shall lie.

    Yields:
      (name on disk, array).
    """
    whole: dict[str, np.ndarray] = {}
    for name, array in tensors:
        found = _place(name)
        if found is None:
            yield name, array
            continue
        target, expert, which, parts = found
        array, axis = _as_stored(name, array)
        if target not in whole:
            shape = list(array.shape)
            shape[axis] *= parts
            whole[target] = np.empty((experts, *shape), array.dtype)
        at: list = [slice(None)] * array.ndim
        at[axis] = _share(which, parts, parts * array.shape[axis], together)
        whole[target][(expert, *at)] = array
    yield from whole.items()


def fuse_specs(
    specs: Mapping[str, tuple[np.dtype, tuple[int, ...]]], experts: int
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes on disk of what `fuse_experts` puts together."""
    fused = {}
    for name, (dtype, shape) in specs.items():
        found = _place(name)
        if found is None:
            fused[name] = (dtype, shape)
        elif found[0] not in fused:
            stored, axis = _as_stored(name, np.broadcast_to(np.int8(0), shape))
            own = list(stored.shape)
            own[axis] *= found[3]
            fused[found[0]] = (dtype, (experts, *own))
    return fused


def check_shape(together: Together, channels: int, d_model: int) -> None:
    """Refuse experts in halves that a program would take for their transpose.

    transformers 5 reads both [E, D, 2F] and [E, 2F, D], and tells them apart by their shapes.

    Raises:
      InputError: `channels` or twice as many are `d_model`.
    """
    if together == "halves" and d_model in (channels, 2 * channels):
        raise InputError(
            f"experts of {channels} channels in a model of width {d_model} are square matrices, "
            "which transformers cannot tell from their transpose; choose another prune rate or "
            "--block"
        )


def _place(name: str) -> tuple[str, int, int, int] | None:
    """(name on disk, expert, which of the alternating parts, parts), None if no expert's."""
    found = _PART.fullmatch(name)
    if found is None:
        return None
    prefix, expert, part, kind, suffix = found.groups()
    stem, parts = ("down", 1) if part == "down" else ("gate_up", 2)
    suffix = "_bias" if kind == "bias" else suffix
    return f"{prefix}.{stem}_proj{suffix}", int(expert), int(part == "up"), parts


def _as_stored(name: str, array: np.ndarray) -> tuple[np.ndarray, int]:
    """The array as it lies in the tensor on disk, and the axis of its alternating rows."""
    return (array.T, array.ndim - 1) if name.endswith(".weight") else (array, 0)
