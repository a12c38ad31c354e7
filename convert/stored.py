"""How an export holds each tensor of the model: in 16 bits or fewer, filled up to its width."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass

import numpy as np

from convert.disk_layer import Codes, layer_codes, layer_to_hf
from convert.export_format import ExportFormat
from convert.formats import compressed_tensors, float8, mxfp4
from convert.layout import FLOAT32, Spec
from convert.rules import Family
from moe_jax.errors import InputError
from moe_jax.quant import MIN_SCALE
from moe_jax.quantized import float8_layer, quantize_layer
from moe_jax.transformer import DecoderLayer


@dataclass(frozen=True)
class Stored:
    """A tensor of the model as an export holds it.

    Attributes:
      shape: as if it were not packed.
      dtype: of the file unless it is packed.
      packed: whether codes in few bits, and their scales, stand for it.
      of_expert: whether it is one routed expert's.
      scale: dtype of the file's scales of 8-bit floats.
      bits: of its codes, if it is packed.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    packed: bool
    of_expert: bool
    scale: np.dtype = FLOAT32
    bits: int = 4

    def specs(self, name: str, form: ExportFormat) -> dict[str, Spec]:
        """Names, dtypes and shapes of the tensors that stand for it."""
        if not self.packed:
            return {name: (self.dtype, self.shape)}
        rows, columns = self.shape
        if form.is_float4:
            found = mxfp4.packed_specs(rows, columns)
        elif form.is_float8:
            found = float8.packed_specs(rows, columns, self.scale)
        else:
            found = compressed_tensors.packed_specs(rows, columns, form.group_size, self.bits)
        stem = name.removesuffix("weight")
        return {stem + suffix: spec for suffix, spec in found.items()}


def stored_layer(
    family: Family,
    layer: DecoderLayer,
    index: int,
    tensors: Mapping[str, Stored],
    form: ExportFormat,
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of one decoder layer or group as they go to disk, experts one by one.

    Args:
      family: whose names they get.
      layer: the layer; `QTensor` weights keep their codes in integer formats, `Float8Tensor` ones
        in 8-bit floats.
      index: its position in the model.
      tensors: what the export holds of the layer or group, by name.
      form: the format.

    Raises:
      InputError: the layer has other tensors, or weights in groups of another size.
    """
    codes: dict[str, Codes] = {}
    packed = {name for name, stored in tensors.items() if stored.packed}
    if form.is_integer or form.is_float8:
        paths = _paths(family, packed)
        if form.is_float8:
            layer = float8_layer(layer, paths)
        else:
            layer = quantize_layer(layer, form.group_size, paths, form.bits)
        codes = dict(layer_codes(family.rules, layer, index))
    # Dequantised is only what does not go to disk as codes.
    coded = _paths(family, codes) - _paths(family, tensors.keys() - packed)
    rules = [rule for rule in family.rules if rule.ours not in coded]
    here = {n: v for n, v in layer_to_hf(rules, layer, index) if n not in packed or n not in codes}
    _require_all(here.keys() | codes.keys(), tensors, form)
    for name, stored in tensors.items():
        if not stored.packed:
            yield name, _filled(here.get(name), stored)
        elif form.is_float4:
            # Filled first: experts of one shape share a compilation.
            weight = _filled(here.get(name), dataclasses.replace(stored, dtype=FLOAT32))
            stem = name.removesuffix("weight")
            yield from ((stem + key, part) for key, part in mxfp4.pack(weight).items())
        elif form.is_float8:
            yield from _in_blocks(name, codes.get(name), stored)
        else:
            yield from _as_coded(name, codes.get(name), stored.shape, form)


def _paths(family: Family, names: Iterable[str]) -> set[str]:
    """Where a layer has the weights of these names."""
    return {rule.ours for rule in map(family.rule, names) if rule is not None}


def _require_all(found: Set[str], tensors: Mapping[str, Stored], form: ExportFormat) -> None:
    # Only what fills an expert up may be made here, not given.
    missing = {
        name for name in tensors.keys() - found if form.is_ragged or not tensors[name].of_expert
    }
    beside = found - tensors.keys()
    if missing or beside:
        raise InputError(
            f"the model is another than the one that {form.name} is to hold: it lacks "
            f"{sorted(missing)[:3]} and has {sorted(beside)[:3]} beside; export it with "
            "the widths and the constants that it has"
        )


def _filled(value: np.ndarray | None, stored: Stored) -> np.ndarray:
    """A tensor as it goes to disk; an emptied expert that is filled up is all zeros."""
    full = np.zeros(stored.shape, stored.dtype)
    if value is not None:
        full[tuple(slice(size) for size in value.shape)] = value.astype(stored.dtype)
    return full


def _in_blocks(name: str, weight: Codes | None, stored: Stored) -> Iterator[tuple[str, np.ndarray]]:
    """A weight in 8-bit floats, bit for bit; padding is zero at scale 1."""
    specs = float8.packed_specs(stored.shape[0], stored.shape[1], stored.scale)
    for (suffix, (dtype, shape)), part, fill in zip(
        specs.items(), (None, None) if weight is None else (weight.codes, weight.scale), (0, 1),
        strict=True,
    ):  # fmt: skip
        full = np.full(shape, fill, dtype)
        if part is not None:
            full[tuple(slice(size) for size in part.shape)] = part.astype(dtype)
        yield name.removesuffix("weight") + suffix, full


def _as_coded(
    name: str, weight: Codes | None, shape: tuple[int, ...], form: ExportFormat
) -> Iterator[tuple[str, np.ndarray]]:
    """A weight in integers, bit for bit; padding is code 0 at the least scale."""
    group_size = form.group_size
    codes = np.zeros(shape, np.int8)
    scale = np.full((shape[0], shape[1] // group_size), MIN_SCALE, np.float32)
    if weight is not None:
        own = weight.codes.shape[1] // weight.scale.shape[1]
        if own != group_size:
            raise InputError(
                f"{name} has one scale per {own} weights; export it with that group size instead "
                f"of {group_size}"
            )
        for full, part in ((codes, weight.codes), (scale, weight.scale)):
            full[tuple(slice(size) for size in part.shape)] = part
    parts = compressed_tensors.pack_codes(codes, scale, form.bits)
    yield from ((name.removesuffix("weight") + key, part) for key, part in parts.items())
