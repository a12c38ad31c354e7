"""Pruned layers of a model that is stored in 4 bits, with its own codes instead of new ones.

Rows of gate and up are channels, so that any of them can be taken with their scales. Groups of
down lie along the channels: those that are kept or removed whole keep their codes; an expert that
keeps a part of some group is rounded a second time there.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from convert.checkpoint import Checkpoint
from convert.rules import TensorRule, layer_rules
from convert.view import OnRounded
from moe_jax.experts.moe import MoE
from moe_jax.quant import MIN_SCALE, QTensor, Weight, dequantize, quantize
from moe_jax.transformer import DecoderLayer


def with_native_codes(
    base: Checkpoint,
    index: int,
    layer: DecoderLayer,
    keep: np.ndarray | None,
    on_rounded: OnRounded | None = None,
) -> DecoderLayer:
    """Put the codes of a model in the place of the dequantised weights of a pruned layer.

    Args:
      base: the dense model, whose `about.native` is not None.
      index: of the layer.
      layer: pruned, its weights dequantised.
      keep: bool [E, F], the channels it kept; None for a layer that was not pruned. Of a group of
        a layer both are its own.
      on_rounded: called with the down projection of every expert that is rounded again.

    Returns:
      The layer; weights that `about.is_native` are `QTensor`, all others as they were.
    """
    assert base.about.native is not None and base.about.native.group_size is not None
    group = base.about.native.group_size

    def of_experts(rule: TensorRule, name: str, counts: np.ndarray, pool: Array) -> QTensor:
        experts = _Experts(base, name, counts, keep, group, first_expert(layer))
        rows = rule.layout == "expert_rows"
        parts = experts.rows() if rows else experts.columns(np.asarray(pool), on_rounded)
        return _tensor(parts, group, axis=int(rows), rows=len(pool))

    def of_matrix(codes: np.ndarray, scale: np.ndarray) -> QTensor:
        return _tensor([_part(codes, scale)], group, axis=1, rows=len(codes))

    return with_coded(base, index, layer, of_experts, of_matrix)


def with_coded(
    base: Checkpoint,
    index: int,
    layer: DecoderLayer,
    of_experts: Callable[[TensorRule, str, np.ndarray, Array], Weight],
    of_matrix: Callable[[np.ndarray, np.ndarray], Weight],
) -> DecoderLayer:
    """Put coded weights in the place of those that a model stores in few bits.

    Args:
      base: the dense model, whose `about.native` is not None.
      index: of the layer.
      layer: pruned, its weights dequantised.
      of_experts: (rule, name with `{expert}` left open, channels kept [E], pool of the experts'
        values) -> one weight of all experts; not asked of a layer that lost all of them.
      of_matrix: (codes, scale) as stored -> any other weight.

    Returns:
      The layer; weights that are not `about.is_native` are as they were.
    """
    about, coded, first = base.about, {}, first_expert(layer)
    for rule, name in layer_rules(about.family.rules, about.config, index):
        if rule.is_linear and rule.is_of_expert:
            assert isinstance(layer.mlp, MoE)
            counts = np.asarray(layer.mlp.experts.count)
            if counts.any():
                pool = getattr(layer.mlp.experts, rule.ours.rpartition(".")[2])
                coded[rule.ours] = of_experts(rule, name, counts, pool)
        elif rule.is_linear and about.is_native(name) and not first:
            coded[rule.ours] = of_matrix(*base.read_codes(name))

    def code(keys, leaf):
        return coded.get(jax.tree_util.keystr(keys, simple=True, separator="."), leaf)

    return jax.tree.map_with_path(code, layer)


def first_expert(layer: DecoderLayer) -> int:
    """Number of the first expert of a layer or group."""
    return layer.mlp.own.start if isinstance(layer.mlp, MoE) else 0


Part = tuple[np.ndarray, np.ndarray]  # packed codes uint8 [rows, D / 2] and scales, as in QTensor


@dataclass(frozen=True)
class _Experts:
    """One weight of every expert of a layer; `name` has its `{expert}` left open."""

    base: Checkpoint
    name: str
    counts: np.ndarray  # [E], channels kept
    keep: np.ndarray | None  # [E, F]
    group: int
    first: int  # number of the first of them

    def rows(self) -> Iterator[Part]:
        """Of gate or up: [F, D] with groups along D."""
        for expert in np.flatnonzero(self.counts):
            codes, scale = self._read(expert)
            kept = slice(None) if self.keep is None else self.keep[expert]
            yield _part(codes[kept], scale[kept])

    def columns(self, pool: np.ndarray, on_rounded: OnRounded | None) -> Iterator[Part]:
        """Of down: [D, F] on disk, [F, D] with groups along F here; `pool` has its values."""
        stops = np.cumsum(self.counts)
        for expert in np.flatnonzero(self.counts):
            codes, scale = (part.T for part in self._read(expert))
            if self.keep is None:
                yield _part(codes, scale)
                continue
            groups = self.keep[expert].reshape(-1, self.group)
            whole = groups.all(axis=1)
            if (whole == groups.any(axis=1)).all():
                yield _part(codes[self.keep[expert]], scale[whole])
                continue
            dense = pool[stops[expert] - self.counts[expert] : stops[expert]]
            again = quantize(jnp.asarray(dense), group_size=self.group, axis=0, dtype=jnp.float32)
            if on_rounded:
                on_rounded(dense, np.asarray(dequantize(again)))
            yield np.asarray(again.packed), np.asarray(again.scale)

    def _read(self, expert: np.integer) -> tuple[np.ndarray, np.ndarray]:
        return self.base.read_codes(self.name.replace("{expert}", str(self.first + expert)))


def _part(codes: np.ndarray, scale: np.ndarray) -> Part:
    nibbles = (codes + 8).astype(np.uint8)
    return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scale.astype(np.float32)


def _tensor(parts: Iterable[Part], group: int, *, axis: int, rows: int) -> QTensor:
    """Parts that follow each other as one matrix, filled up to `rows` with zeros."""
    packed, scales = (list(arrays) for arrays in zip(*parts, strict=True))
    fill = rows - sum(map(len, packed))
    packed.append(np.full((fill, packed[0].shape[1]), 0x88, np.uint8))  # twice code 0
    below = fill if axis else fill // group
    scales.append(np.full((below, scales[0].shape[1]), MIN_SCALE, np.float32))
    codes, scale = (jnp.asarray(np.concatenate(arrays)) for arrays in (packed, scales))
    return QTensor(packed=codes, scale=scale, group_size=group, axis=axis)
