"""Models rounded as they are read: what an export will hold, and what a program makes of it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.errors import InputError
from moe_jax.experts.moe import MoE
from moe_jax.mxfp4 import round_experts
from moe_jax.quant import CODED, dequantize, quantize
from moe_jax.quantized import float8_layer, quantize_layer
from moe_jax.spread import Spread
from moe_jax.stream import LayerSource, mapped
from moe_jax.transformer import DecoderLayer

ROWS_AT_ONCE = 4096
INTEGER_BITS = {"int4": 4, "int8": 8}


def QuantizedSource(
    base: LayerSource, group_size: int, storage: str | Sequence[str] = "int4"
) -> LayerSource:
    """A model whose layers are rounded to few bits as they are read; embedding and head are not.

    Args:
      base: the model.
      group_size: weights per scale of integers.
      storage: as of an export: all linear layers to "int4" or "int8", or to "fp8" in blocks of 128
        x 128, or the experts to "mxfp4", as float values; or so for each layer, which "bf16"
        leaves as it is.

    Returns:
      The source.
    """
    each = [storage] * len(base) if isinstance(storage, str) else storage

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        how = each[index]
        return layer if how == "bf16" else rounded_layer(layer, group_size, how)

    return mapped(base, change, by_group=True)


def rounded_layer(layer: DecoderLayer, group_size: int, storage: str) -> DecoderLayer:
    """One layer of `QuantizedSource`."""
    if storage == "mxfp4":
        return round_experts(layer)
    if storage == "fp8":
        return float8_layer(layer)
    return quantize_layer(layer, group_size, bits=INTEGER_BITS[storage])


def rounded_as_cut(
    rounded: DecoderLayer,
    layer: DecoderLayer,
    keep: np.ndarray,
    group_size: int,
    storage: str = "int4",
) -> DecoderLayer:
    """What `rounded_layer` makes of a layer without some channels, with all of them in place.

    Weights that share a scale lie along the channels in `w_down` alone: there what is kept decides
    which these are.

    Args:
      rounded: all of the layer, rounded.
      layer: as it was, experts of F channels.
      keep: bool [E, F], in every expert whole groups.
      group_size: weights per scale.
      storage: "int4" or "int8".

    Returns:
      `rounded` with the rows of `w_down` that are kept rounded among themselves, and zeros.

    Raises:
      InputError: an expert keeps a part of a group.
    """
    assert isinstance(layer.mlp, MoE) and isinstance(rounded.mlp, MoE)
    if (wrong := keep.sum(axis=1) % group_size).any():
        kept = keep.sum(axis=1)[np.flatnonzero(wrong)[0]]
        raise InputError(
            f"an expert keeps {kept} channels, which are no whole groups of {group_size} weights; "
            f"plan with --block {group_size}"
        )
    first = np.argsort(~keep, axis=1, kind="stable")  # kept ones, as cutting leaves them
    order = (first + keep.shape[1] * np.arange(len(keep))[:, None]).ravel()
    down = dequantize(layer.mlp.experts.w_down)[order]
    cut = jnp.where(keep.ravel()[order][:, None], down, jnp.zeros((), down.dtype))
    bits = INTEGER_BITS[storage]
    codes = quantize(cut, group_size=group_size, axis=0, dtype=jnp.float32, bits=bits)
    experts = dataclasses.replace(
        rounded.mlp.experts, w_down=dequantize(codes)[np.argsort(order)]
    )  # fmt: skip
    return dataclasses.replace(rounded, mlp=dataclasses.replace(rounded.mlp, experts=experts))


class RoundingError:
    """What rounding did to weights, summed over those it is told of.

    Attributes:
      wrong: squared differences.
      total: squares of the weights before.
    """

    def __init__(self) -> None:
        self.wrong = self.total = 0.0
        self._added: list[tuple[float, float]] = []

    def __call__(self, before: np.ndarray, after: np.ndarray) -> None:
        """Add matrices of one shape; rows at a time, which bounds the temporaries."""
        for start in range(0, len(before), ROWS_AT_ONCE):
            old, new = (x[start : start + ROWS_AT_ONCE].astype(np.float64) for x in (before, after))
            self._added.append((float(np.square(new - old).sum()), float(np.square(old).sum())))
            self._add(*self._added[-1])

    def share(self, spread: Spread) -> None:
        """Add up what all processes were told, one after the other: who is told all of it in that
        order has the same bits."""
        self.wrong = self.total = 0.0
        for added in spread.told(self._added):
            for wrong, total in added:
                self._add(wrong, total)

    def _add(self, wrong: float, total: float) -> None:
        self.wrong += wrong
        self.total += total

    @property
    def relative(self) -> float:
        """Squared differences over squares; 0 if nothing was changed."""
        return self.wrong / self.total if self.wrong else 0.0


def compared(
    base: LayerSource,
    rounding: Callable[[LayerSource], LayerSource],
    on_rounded: Callable[[np.ndarray, np.ndarray], None],
) -> LayerSource:
    """A rounded model that tells of every weight it rounds, before and after; read once.

    Args:
      base: the model before.
      rounding: makes a rounded model of it.
      on_rounded: told.
    """
    before: list[DecoderLayer] = []

    def remember(index: int, layer: DecoderLayer) -> DecoderLayer:
        before[:] = [layer]
        return layer

    def compare(index: int, layer: DecoderLayer) -> DecoderLayer:
        leaves = (
            jax.tree.leaves(one, is_leaf=lambda leaf: isinstance(leaf, CODED))
            for one in (before.pop(), layer)
        )
        for old, new in zip(*leaves, strict=True):
            if new is not old:
                on_rounded(np.asarray(dequantize(old)), np.asarray(dequantize(new)))
        return layer

    return mapped(rounding(mapped(base, remember, by_group=True)), compare, by_group=True)


def bfloat16_experts(base: LayerSource) -> LayerSource:
    """A model as transformers 5 runs a padded 4-bit folder: dequantised experts in bfloat16."""

    def change(index: int, layer: DecoderLayer) -> DecoderLayer:
        if not isinstance(layer.mlp, MoE):
            return layer
        experts = layer.mlp.experts
        names = ("w_gate", "w_up", "w_down")
        narrow = {n: dequantize(getattr(experts, n)).astype(jnp.bfloat16) for n in names}
        mlp = dataclasses.replace(layer.mlp, experts=dataclasses.replace(experts, **narrow))
        return dataclasses.replace(layer, mlp=mlp)

    return mapped(base, change, by_group=True)
