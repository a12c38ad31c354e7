"""Experts of a layer merged into fewer: their channels aligned, their weights averaged.

The merged expert stands in the place of every expert of its group, so that a layer has as many
experts as before, some of them copies: the same function as fewer experts that share tokens.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from scipy.optimize import linear_sum_assignment

from moe_jax.experts.moe import MoE
from moe_jax.experts.pool import Experts
from moe_jax.quant import dequantize
from moe_jax.stream import LayerSource, mapped
from moe_jax.transformer import DecoderLayer
from pruning.budget.merged_layer import MergedLayer
from pruning.budget.merging import Align, MergeRule, shares
from pruning.budget.plan import PruningPlan
from pruning.scores.likeness import Likeness
from pruning.shrink.prune import cut_router


@dataclass(frozen=True, eq=False)
class Merging:
    """How the experts of a model are merged; `layers` by the model's layer."""

    layers: dict[int, MergedLayer]

    @property
    def plan(self) -> PruningPlan:
        """What a folder that has each merged expert once would hold: leaders whole, no others."""
        keep = [
            np.broadcast_to(one.is_leader[:, None], one.order.shape) for one in self.layers.values()
        ]
        return PruningPlan(np.stack(keep), tuple(self.layers))

    def written(self, provenance: Mapping[str, Any]) -> PruningPlan:
        """The plan of a folder that programs load: where the router is cut, leaders whole and no
        others, else every expert, those of a group all with the merged weights."""
        cut = all(one.cut for one in self.layers.values())
        keep = self.plan.keep if cut else np.ones_like(self.plan.keep)
        merged = tuple(self.layers.values())
        said = {**provenance, "cut_router": True} if cut else provenance
        return PruningPlan(keep, tuple(self.layers), said, merged=merged, cut_router=cut)


def merge_of(
    layer: DecoderLayer, rule: MergeRule, seen: Likeness, tokens: np.ndarray, groups: int
) -> MergedLayer:
    """How a rule merges the experts of a layer.

    Args:
      layer: with dense experts.
      rule: an entry of `MERGES`.
      seen: what a text shows of the experts.
      tokens: [E], how many go to each.
      groups: merged experts to be left, 1 to E.
    """
    assert isinstance(layer.mlp, MoE)
    leaders = rule.group(seen, tokens, groups)
    order = aligned_channels(layer.mlp.experts, leaders, rule.align, seen.hidden)
    return MergedLayer(leaders, shares(leaders, rule.weight(seen, tokens)), order, rule.cuts_router)


def aligned_channels(
    experts: Experts, leaders: np.ndarray, align: Align, hidden: np.ndarray
) -> np.ndarray:
    """The order in which the channels of experts are most like those of their leaders.

    Channels are matched one to one so that the sum of their inner products is largest, which for
    rows of given norms is the least squared distance: of the rows of gate, up and down projection
    with the biases and, by "activations", of what they make of the same tokens as well. Each kind
    is divided by the norms of the two experts (ours).

    Args:
      experts: dense, of F channels each.
      leaders: int [E].
      align: "" leaves channels as they are.
      hidden: float32 [E, F, S], of some tokens.

    Returns:
      int [E, F].

    Source: weight matching, arXiv 2209.04836, as M-SMoE, arXiv 2310.01334, uses it; with
    activations REAM, arXiv 2604.04356.
    """
    count = len(leaders)
    width = experts.w_gate.shape[0] // count
    order = np.tile(np.arange(width), (count, 1))
    if not align:
        return order
    kinds = [[np.asarray(dequantize(w)) for w in (experts.w_gate, experts.w_up, experts.w_down)]]
    kinds[0] += [np.asarray(b)[:, None] for b in (experts.b_gate, experts.b_up) if b is not None]
    if align == "activations":
        kinds.append([hidden.reshape(count * width, -1)])
    for expert in np.flatnonzero(leaders != np.arange(count)).tolist():
        alike = np.zeros((width, width))
        for kind in kinds:
            lead, own = (_rows(kind, one, width) for one in (int(leaders[expert]), expert))
            norms = np.linalg.norm(lead) * np.linalg.norm(own)
            alike += lead @ own.T / (norms or 1.0)
        order[expert] = linear_sum_assignment(alike, maximize=True)[1]
    return order


def _rows(pools: list[np.ndarray], expert: int, width: int) -> np.ndarray:  # float32 [F, ...]
    rows = slice(expert * width, (expert + 1) * width)
    return np.concatenate([pool[rows].astype(np.float32) for pool in pools], axis=1)


def merged_layer(layer: DecoderLayer, merge: MergedLayer) -> DecoderLayer:
    """A layer with the merged expert in the place of every expert of its group.

    Args:
      layer: with dense experts.
      merge: of them.

    Returns:
      The layer; a group of one is to the bit what it was. The router, its biases and a shared
      expert stay; where it is to be cut, those that lead are `alive` alone.
    """
    moe = layer.mlp
    assert isinstance(moe, MoE)
    experts = moe.experts
    pools = {n: getattr(experts, n) for n in ("w_gate", "w_up", "w_down", "b_gate", "b_up")}
    rows = {n: _averaged(p, merge, merge.order) for n, p in pools.items() if p is not None}
    if experts.b_down is not None:
        whole = np.zeros((len(merge.leaders), 1), int)
        rows["b_down"] = _averaged(experts.b_down, merge, whole)
    moe = dataclasses.replace(moe, experts=dataclasses.replace(experts, **rows))
    merged = dataclasses.replace(layer, mlp=moe)
    return cut_router(merged, merge.is_leader) if merge.cut else merged


def _averaged(pool, merge: MergedLayer, order: np.ndarray) -> Array:
    """A pool of `order.shape[1]` rows an expert, those of a group all their average."""
    stored = np.asarray(dequantize(pool))
    rows = stored.reshape(*order.shape, *stored.shape[1:])
    out = rows.copy()
    for leader in np.flatnonzero(merge.is_leader):
        members = np.flatnonzero(merge.leaders == leader)
        if len(members) == 1:
            continue
        average = np.zeros(rows.shape[1:], np.float32)
        for one in members:
            average += np.float32(merge.share[one]) * rows[one, order[one]].astype(np.float32)
        out[members] = average.astype(stored.dtype)
    return jnp.asarray(out.reshape(stored.shape))


def MergedSource(base: LayerSource, merging: Merging) -> LayerSource:
    """A model whose layers are merged as they are read, each of them whole."""

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        merge = merging.layers.get(index)
        return layer if merge is None else merged_layer(layer, merge)

    return mapped(base, change)
