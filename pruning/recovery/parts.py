"""Pruned experts dealt to devices: rows of equal number for each, whatever its experts keep.

A device has as many of a layer's experts as every other, one after the other, and their rows of the
pool from its first one on; rows behind them are nobody's, as in any pool.
"""

import dataclasses
from typing import Any, TypeVar

import jax
import numpy as np

from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.quant import dequantize
from moe_jax.transformer import DecoderLayer
from pruning.recovery.deltas import EXPERT_WEIGHTS

T = TypeVar("T")
WHOLE = 128  # rows that a part is a multiple of: no scale's group lies in two, tiles stay aligned


def dealt_rows(experts: Experts, parts: int) -> np.ndarray:
    """Which row of a pool each row of the dealt one is, int [parts * rows]; C where nobody's.

    Args:
      experts: of a layer.
      parts: devices; divides the number of experts.
    """
    counts = np.asarray(experts.count)
    owned = counts.reshape(parts, -1).sum(1)
    rows = -(-(int(owned.max()) + experts.block) // WHOLE) * WHOLE
    found = np.full((parts, rows), experts.w_gate.shape[0])
    for part, (stop, own) in enumerate(zip(np.cumsum(owned), owned, strict=True)):
        found[part, :own] = np.arange(stop - own, stop)
    return found.reshape(-1)


def dealt_layer(layer: DecoderLayer, rows: np.ndarray) -> DecoderLayer:
    """A layer whose experts have their rows so; 4-bit ones in the type they are multiplied in."""
    assert isinstance(layer.mlp, MoE)
    experts = layer.mlp.experts
    plain = {name: dequantize(getattr(experts, name)) for name in EXPERT_WEIGHTS}
    experts = dealt_deltas(dataclasses.replace(experts, **plain), rows)
    return dataclasses.replace(layer, mlp=dataclasses.replace(layer.mlp, experts=experts))


def dealt_deltas(tree: T, rows: np.ndarray) -> T:
    """Changes of a layer with the rows of their pool so."""

    def deal(path: tuple, leaf: Any) -> Any:
        if not _is_of_rows(path):
            return leaf
        leaf = np.asarray(leaf)
        return np.concatenate([leaf, np.zeros((1, *leaf.shape[1:]), leaf.dtype)])[rows]

    return jax.tree_util.tree_map_with_path(deal, tree)


def gathered_deltas(tree: T, rows: np.ndarray, count: int) -> T:
    """Changes whose rows were dealt, as those of a pool of so many rows; nobody's are zero."""
    owned = np.flatnonzero(rows < count)

    def gather(path: tuple, leaf: Any) -> Any:
        if not _is_of_rows(path):
            return leaf
        leaf = np.asarray(leaf)
        found = np.zeros((count, *leaf.shape[1:]), leaf.dtype)
        found[rows[owned]] = leaf[owned]
        return found

    return jax.tree_util.tree_map_with_path(gather, tree)


def _is_of_rows(path: tuple) -> bool:
    """Whether an array of the experts, or of their changes, has an entry per row of the pool."""
    names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
    if names[-1] == "magnitude":
        return "w_down" not in names
    return names[-1] in (*EXPERT_WEIGHTS, "b_gate", "b_up", "channel")
