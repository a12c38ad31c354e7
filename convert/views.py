"""Tensors under their public names, whatever the layout in which a file stores them."""

import re
from collections.abc import Callable, Iterator

from convert import interleaved
from convert.quantized import awq, compressed, float8, gptq, normal_float
from convert.quantized.config import COMPRESSED, FLOAT8, MXFP4, NORMAL4, Quantization
from convert.quantized.found import Found
from convert.reader import SafetensorsFolder
from convert.rules import Together
from convert.view import FLOATS, View

_FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")
Reader = Callable[[SafetensorsFolder, Quantization, list[str]], Iterator[Found]]
_READERS: dict[str, Reader] = {
    "awq": awq.weights,
    "gptq": gptq.weights,
    COMPRESSED: compressed.weights,
    FLOAT8: float8.weights,
    NORMAL4: normal_float.weights,
    MXFP4: lambda folder, said, problems: iter(()),  # in `convert.interleaved`
}


def open_views(
    folder: SafetensorsFolder, quantization: Quantization | None, *, together: Together = ""
) -> tuple[dict[str, View], list[str]]:
    """Give every tensor of a folder its public per-expert, unpacked name.

    Plain tensors, the formats of `convert.quantized`, experts fused into `gate_up_proj [E, 2F, D]`
    and `down_proj [E, D, F]`, and experts as in `convert.interleaved` are understood.

    Args:
      folder: the checkpoint.
      quantization: of its config.json.
      together: how fused experts lie, if they do as in `convert.interleaved`.

    Returns:
      (name -> view, problems).
    """
    problems: list[str] = []
    views: dict[str, View] = {}
    used: set[str] = set()

    def add(name: str, view: View | None) -> None:
        if name in views:
            problems.append(f"{name} is stored twice, in two layouts")
        elif view is not None:
            views[name] = view

    if quantization is not None:
        for found in _READERS[quantization.method](folder, quantization, problems):
            add(found.name, found.view)
            used.update(found.stored)
        if quantization.method == COMPRESSED:
            used.update(compressed.of_activations(folder))
    for name in folder.names:
        if name in used:
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
        add(name, _own_view(folder, name, problems, quantized=quantization is not None))
    return views, problems


def _own_view(
    folder: SafetensorsFolder, name: str, problems: list[str], *, quantized: bool
) -> View | None:
    """A tensor that stands for itself; None where it is unread."""
    dtype, shape = folder.spec(name)
    if dtype.name not in FLOATS:
        hint = "" if quantized else ", and config.json has no quantization_config"
        problems.append(f"{name} has dtype {dtype}; expected one of {', '.join(FLOATS)}{hint}")
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
