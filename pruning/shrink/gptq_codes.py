"""The folder of 4-bit codes that GPTQ writes: what is in it, if it is whole, and its model."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from moe_jax.errors import InputError
from moe_jax.json_files import read_json
from moe_jax.quant import QTensor
from moe_jax.stream import LayerSource, mapped
from moe_jax.transformer import DecoderLayer
from pruning.kit.fitting import misfits

SUMMARY = "gptq.json"


@dataclass(frozen=True)
class LayerErrors:
    """Error of one quantised layer on held-out tokens that it really receives.

    Attributes:
      nearest, gptq: squared error of the output by rounding to nearest and by GPTQ, relative to
        the square of what the layer adds to its input.
      matrices, fallbacks: see `Solved`.
    """

    nearest: float
    gptq: float
    matrices: int
    fallbacks: int


class Summary(TypedDict):
    """What gptq.json holds.

    Attributes:
      provenance: as of `quantize_model`.
      group_size: weights per scale.
      codes: SHA-256 of the file of every layer.
      layers: the fields of `LayerErrors` of every layer.
    """

    provenance: dict[str, Any]
    group_size: int
    codes: list[str]
    layers: list[dict[str, Any]]


def read_summary(folder: Path) -> Summary | None:
    """What is known of a finished folder; None if there is none, or its file is damaged."""
    try:
        found: Any = read_json(folder / SUMMARY)
    except (InputError, OSError):
        return None
    if misfits(Summary, found) or any(misfits(LayerErrors, one) for one in found["layers"]):
        return None
    return found if len(found["codes"]) == len(found["layers"]) else None


def codes_fault(folder: Path, **provenance: Any) -> str:
    """What is wrong with the codes in a folder, as a clause; "" if they are whole.

    Args:
      folder: of `quantize_model`.
      provenance: what is asked of theirs.
    """
    summary = read_summary(folder)
    if summary is None:
        return f"the 4-bit codes that GPTQ chose are no longer in {folder}"
    if any(summary["provenance"].get(name) != value for name, value in provenance.items()):
        return f"the 4-bit codes in {folder} are of another plan or text"
    for index, wanted in enumerate(summary["codes"]):
        file = layer_file(folder, index)
        if not file.is_file() or digest(file) != wanted:
            return f"{file} is not the file that GPTQ wrote"
    return ""


def digest(file: Path) -> str:
    """SHA-256 of a file, as `Summary.codes` has it."""
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def layer_errors(folder: Path | None) -> list[dict]:
    """`LayerErrors` of every layer as dicts, from a finished folder; none without one."""
    summary = None if folder is None else read_summary(folder)
    return [] if summary is None else summary["layers"]


def layer_file(folder: Path, index: int) -> Path:
    """Where the codes of a layer lie."""
    return folder / f"layer-{index:05d}.safetensors"


def _is_coded(leaf) -> bool:
    return isinstance(leaf, QTensor)


def _path(keys) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")


def stored(layer: DecoderLayer) -> dict[str, np.ndarray]:
    """Codes and scales of a layer by attribute path."""
    arrays = {}
    for keys, leaf in jax.tree.leaves_with_path(layer, is_leaf=_is_coded):
        if _is_coded(leaf):
            arrays[_path(keys) + ".packed"] = np.asarray(leaf.packed)
            arrays[_path(keys) + ".scale"] = np.asarray(leaf.scale)
    return arrays


def with_codes(source: LayerSource, folder: Path, group_size: int) -> LayerSource:
    """A model whose linear weights are the 4-bit codes in a folder of `quantize_model`.

    Args:
      source: the model that the codes were chosen for.
      folder: of the codes.
      group_size: weights per scale.

    Returns:
      The source; each layer's codes are read with it.
    """

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        stored = load_file(layer_file(folder, index))

        def code(keys, leaf):
            path = _path(keys)
            if path + ".packed" not in stored:
                return leaf
            return QTensor(
                packed=jnp.asarray(stored[path + ".packed"]),
                scale=jnp.asarray(stored[path + ".scale"]),
                group_size=group_size,
                axis=0 if path.endswith("experts.w_down") else 1,
            )

        return jax.tree.map_with_path(code, layer)

    return mapped(source, change)
