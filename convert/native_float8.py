"""Pruned layers of a model that is stored in 8-bit floats, with its own codes instead of new ones.

128 channels share their scales, in gate, up and down alike. Channels that come from one block of
the model keep its codes and scales; where a block of the export has channels from several, it is
rounded a second time.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax import Array

from convert.checkpoint import Checkpoint
from convert.native import first_expert, with_coded
from convert.rules import TensorRule
from convert.view import OnRounded
from moe_jax.float8 import BLOCK, CODE, Float8Tensor, round_blocks
from moe_jax.transformer import DecoderLayer

Part = tuple[np.ndarray, np.ndarray]  # codes [rows, columns] and float32 scales, a row per block


def with_native_blocks(
    base: Checkpoint,
    index: int,
    layer: DecoderLayer,
    keep: np.ndarray | None,
    on_rounded: OnRounded | None = None,
) -> DecoderLayer:
    """Put the codes of a model in the place of the dequantised weights of a pruned layer.

    Args:
      base: the dense model, whose `about.native` is one of 8-bit floats.
      index: of the layer.
      layer: pruned, its weights dequantised, the widths of its experts multiples of 128.
      keep: bool [E, F], the channels it kept; None for a layer that was not pruned. Of a group of
        a layer both are its own.
      on_rounded: called with the blocks that are rounded again.

    Returns:
      The layer; weights that `about.is_native` are `Float8Tensor`, all others as they were.
    """

    def of_experts(rule: TensorRule, name: str, counts: np.ndarray, pool: Array) -> Float8Tensor:
        turned, first = rule.layout == "expert_columns", first_expert(layer)
        experts = _Experts(base, name, turned, keep, on_rounded, first)
        return _tensor(experts.parts(np.flatnonzero(counts)), len(pool))

    def of_matrix(codes: np.ndarray, scale: np.ndarray) -> Float8Tensor:
        return _tensor([(codes, scale.astype(np.float32))], len(codes))

    return with_coded(base, index, layer, of_experts, of_matrix)


@dataclass(frozen=True)
class _Experts:
    """One weight of every expert of a layer; `name` has its `{expert}` left open."""

    base: Checkpoint
    name: str
    turned: bool  # whether channels are columns on disk
    keep: np.ndarray | None  # [E, F]
    on_rounded: OnRounded | None
    first: int  # number of the first of them

    def parts(self, experts: Iterable[int]) -> Iterator[Part]:
        """Codes and scales of these experts, a row per channel."""
        for expert in experts:
            found = self.base.read_codes(self.name.replace("{expert}", str(self.first + expert)))
            codes, scale = (part.T for part in found) if self.turned else found
            if self.keep is None:
                yield codes, scale.astype(np.float32)
            else:
                yield self._kept(codes, scale, np.flatnonzero(self.keep[expert]))

    def _kept(self, codes: np.ndarray, scale: np.ndarray, channels: np.ndarray) -> Part:
        found = codes[channels]
        scales = np.empty((-(-len(channels) // BLOCK), scale.shape[1]), np.float32)
        for line, start in enumerate(range(0, len(channels), BLOCK)):
            here = slice(start, start + BLOCK)
            blocks = channels[here] // BLOCK
            if (blocks == blocks[0]).all():
                scales[line] = scale[blocks[0]]
                continue
            wide = np.repeat(scale[blocks].astype(np.float32), BLOCK, axis=1)
            before = found[here].astype(np.float32) * wide[:, : codes.shape[1]]
            power = self.base.about.has_powers_of_two
            found[here], again = round_blocks(before, scale.dtype, power_of_two=power)
            scales[line] = again[0]
            if self.on_rounded:
                wide = np.repeat(scales[line], BLOCK)[: codes.shape[1]]
                self.on_rounded(before, found[here].astype(np.float32) * wide)
        return found, scales


def _tensor(parts: Iterable[Part], rows: int) -> Float8Tensor:
    """Parts that follow each other as one matrix, filled up to `rows` with zeros."""
    codes, scales = (list(arrays) for arrays in zip(*parts, strict=True))
    codes.append(np.zeros((rows - sum(map(len, codes)), codes[0].shape[1]), CODE))
    below = -(-rows // BLOCK) - sum(map(len, scales))
    scales.append(np.ones((below, scales[0].shape[1]), np.float32))
    return Float8Tensor(*(jnp.asarray(np.concatenate(arrays)) for arrays in (codes, scales)))
