"""The codes that GPTQ chose, as they lie in the file of a layer: names, rows, and the way back."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.groups import own_experts
from moe_jax.quant import QTensor
from moe_jax.transformer import DecoderLayer
from pruning.kit.array_files import WHOLE
from pruning.scores.states import States, temporary_states
from pruning.shrink.progress import LayerArrays, LayerFolder

POOLS = ("w_gate", "w_up", "w_down")
EXPERTS = "mlp.experts."
COUNT = EXPERTS + "count"  # channels of each expert
PIECE = 1 << 24  # bytes that are read at a time


def stored_codes(layer: DecoderLayer) -> dict[str, np.ndarray]:
    """Codes and scales of a layer by attribute path, those of experts without what fills the pools,
    and the widths of the experts."""
    experts = layer.mlp.experts if isinstance(layer.mlp, MoE) else None
    arrays = {}
    for keys, leaf in jax.tree.leaves_with_path(layer, is_leaf=_is_coded):
        path = _path(keys)
        if _is_coded(leaf) and not path.startswith(EXPERTS):
            arrays |= {f"{path}.packed": np.asarray(leaf.packed)}
            arrays |= {f"{path}.scale": np.asarray(leaf.scale)}
    if experts is None:
        return arrays
    return arrays | _of_experts(experts) | {COUNT: np.asarray(experts.count)}


class CodesInGroups:
    """Codes and scales of the experts of a layer, a group after the other, until they are stored.

    Args:
      most: channels that all of these have together at most.
      stack: closes what holds them.
      scratch: folder of what does not fit in memory; default the system's.
    """

    def __init__(self, most: int, stack: ExitStack, scratch: Path | None):
        self._most, self._stack, self._scratch = most, stack, scratch
        self._states: dict[str, States] = {}
        self._rows: dict[str, int] = {}  # that are there
        self._counts: list[np.ndarray] = []

    def put(self, experts: Experts) -> None:
        """Keep those of the next group."""
        self._counts.append(np.asarray(experts.count))
        for name, array in _of_experts(experts).items():
            if name not in self._states:
                shape = -(-self._most // _step(name, experts)), *array.shape[1:]
                self._states[name] = self._stack.enter_context(
                    temporary_states(1, shape, array.dtype, self._scratch)
                )
            start = self._rows.get(name, 0)
            stop = self._rows[name] = start + len(array)
            if len(array):
                self._states[name].put(0, slice(start, stop), array)

    def arrays(self) -> LayerArrays:
        """As of `stored_codes`, to be written in pieces."""
        pieces = {n: states.in_pieces(self._rows[n], PIECE) for n, states in self._states.items()}
        return {**pieces, COUNT: np.concatenate(self._counts)}


def with_stored_codes(
    index: int, layer: DecoderLayer, files: LayerFolder, group_size: int
) -> DecoderLayer:
    """A layer, or a group of one, with its own of the codes in a folder.

    Raises:
      InputError: a file is damaged, or of an earlier version and a group is asked for.
    """
    paths = [_path(keys) for keys, _ in jax.tree.leaves_with_path(layer)]
    rows = {f"{path}.{part}": WHOLE for path in paths for part in ("packed", "scale")}
    experts = layer.mlp.experts if isinstance(layer.mlp, MoE) else None
    if experts is not None:
        first, start = own_experts(layer).start, 0
        if first:
            found = files.rows(index, {COUNT: WHOLE})
            if COUNT not in found:
                raise InputError(
                    f"{files.path} holds codes without the widths of experts, as earlier versions "
                    "wrote them, so groups of these are not found; remove it and export again"
                )
            start = int(found[COUNT][:first].sum())
        stop = start + int(np.asarray(experts.count).sum())
        for name in POOLS:
            step = group_size if name == "w_down" else 1
            rows[f"{EXPERTS}{name}.packed"] = slice(start, stop)
            rows[f"{EXPERTS}{name}.scale"] = slice(start // step, stop // step)
    stored = files.rows(index, rows)

    def code(keys: Any, leaf: Any) -> Any:
        path = _path(keys)
        if f"{path}.packed" not in stored:
            return leaf
        packed, scale = (stored[f"{path}.{part}"] for part in ("packed", "scale"))
        axis = 0 if path == EXPERTS + "w_down" else 1
        if path.startswith(EXPERTS):
            packed = _filled(packed, leaf.shape[0])
            scale = _filled(scale, leaf.shape[0] // (1 if axis else group_size))
        return QTensor(jnp.asarray(packed), jnp.asarray(scale), group_size, axis)

    return jax.tree.map_with_path(code, layer)


def _of_experts(experts: Experts) -> dict[str, np.ndarray]:
    """Codes and scales of the channels that a pool has."""
    count, found = int(np.asarray(experts.count).sum()), {}
    for name in POOLS:
        weight = getattr(experts, name)
        for part in ("packed", "scale"):
            path = f"{EXPERTS}{name}.{part}"
            found[path] = np.asarray(getattr(weight, part))[: count // _step(path, experts)]
    return found


def _step(name: str, experts: Experts) -> int:
    """Channels for each row of an array of `_of_experts`."""
    assert isinstance(experts.w_down, QTensor)
    return experts.w_down.group_size if name == f"{EXPERTS}w_down.scale" else 1


def _filled(array: np.ndarray, rows: int) -> np.ndarray:
    """Rows of zeros behind those of an array, with which weights are zero."""
    return np.pad(array, ((0, rows - len(array)), (0, 0)))


def _is_coded(leaf: Any) -> bool:
    return isinstance(leaf, QTensor)


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator=".")
