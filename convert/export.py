"""Writing a pruned model in one of the formats that other programs load."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert.checkpoint import Checkpoint, outer_tensors
from convert.description import Description
from convert.export_format import ExportFormat, check_constants, check_format, packed_format
from convert.families import find_family
from convert.formats import compressed_tensors, mxfp4, padded, ragged
from convert.interleaved import fuse_experts, fuse_specs
from convert.layer_tensors import Codes, layer_codes, layer_to_hf
from convert.layout import BFLOAT16, FLOAT32, Spec, weight_bytes
from convert.mtp import check_mtp_width, mtp_arrays, mtp_prefixes, mtp_specs, mtp_width
from convert.rules import EMBEDDING, Family, Widths, expected_tensors
from convert.writer import portable_config, write_folder
from moe_jax.config import ModelConfig
from moe_jax.errors import InputError
from moe_jax.quant import MIN_SCALE
from moe_jax.quantized import quantize_layer
from moe_jax.stream import LayerSource
from moe_jax.transformer import DecoderLayer

SUFFIXES = ("weight_packed", "weight_scale", "weight_shape")


@dataclass(frozen=True)
class _Stored:
    """A tensor of the model as an export holds it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    packed: bool

    def specs(self, name: str, form: ExportFormat) -> dict[str, Spec]:
        """Names, dtypes and shapes of the tensors that stand for it."""
        if not self.packed:
            return {name: (self.dtype, self.shape)}
        rows, columns = self.shape
        stem = name.removesuffix("weight")
        if form.is_float4:
            found = mxfp4.packed_specs(rows, columns)
            return {stem + suffix: spec for suffix, spec in found.items()}
        packed = compressed_tensors.packed_specs(rows, columns, form.group_size)
        return {stem + suffix: packed[suffix] for suffix in SUFFIXES}


@dataclass(frozen=True)
class _Source:
    """The dense model as the family it is exported as describes it."""

    family: Family
    hf_config: dict[str, Any]
    config: ModelConfig
    layer: Callable[[DecoderLayer], DecoderLayer]


def _source(base: Description) -> _Source:
    twin = base.family.twin
    if twin is None:
        hf_config = ragged.stock_config(base.hf_config, base.family)
        return _Source(base.family, hf_config, base.config, lambda layer: layer)
    family, hf_config = find_family(twin.model_type), twin.config(base.hf_config)
    return _Source(family, hf_config, family.config_from_hf(hf_config), twin.layer)


def _stored_tensors(base: Description, widths: Widths, form: ExportFormat) -> dict[str, _Stored]:
    source = _source(base)
    family, config = source.family, source.config
    config = ragged.emptied_model(config, form.constants)
    if form.is_padded:
        config = padded.padded_model(config, family, form.padded_width(widths))
    return {
        name: _Stored(
            shape,
            FLOAT32 if family.is_precise(name) else BFLOAT16,
            form.is_packed and family.is_linear(name) and (_of_expert(name) or not form.is_float4),
        )
        for name, shape in expected_tensors(family, config, form.stored_widths(widths)).items()
    }


def _of_expert(name: str) -> bool:
    return ".experts." in name


def _is_fused(family: Family, form: ExportFormat) -> bool:
    return family.interleaved and form.is_padded


def export_specs(base: Description, widths: Widths, form: ExportFormat) -> dict[str, Spec]:
    """Names, dtypes and shapes of every tensor of an export, before any work.

    Args:
      base: the dense model.
      widths: channels kept per layer and expert, () for dense layers.
      form: the format.

    Returns:
      Name -> (dtype, shape), in file order.
    """
    specs: dict[str, Spec] = {}
    for name, stored in _stored_tensors(base, widths, form).items():
        specs |= stored.specs(name, form)
    if _is_fused(_source(base).family, form):
        specs = fuse_specs(specs, base.config.moe.num_experts)
    return specs | mtp_specs(base, widths, form)


def export_bytes(base: Description, widths: Widths, form: ExportFormat) -> int:
    """Bytes of the weight files and index of an export, headers included, from shapes alone."""
    return weight_bytes(export_specs(base, widths, form))


def export_config(base: Description, widths: Widths, form: ExportFormat) -> dict[str, Any]:
    """config.json of an export: the source's, edited, in both spellings of transformers."""
    source = _source(base)
    config = portable_config(source.hf_config, with_mtp=form.mtp != "drop")
    config["dtype"] = config["torch_dtype"] = "bfloat16"
    pruned = mtp_width(base, widths, form) if form.mtp == "prune" else None
    if form.is_ragged:
        counts = [list(row) for row in widths]
        config = ragged.ragged_config(config, source.family, counts, form.constants, pruned)
    elif form.is_layered:
        layers = form.layer_widths(widths)
        config = ragged.layered_config(config, source.family, layers, pruned)
    else:
        width = form.padded_width(widths)
        config = padded.padded_config(config, source.config, source.family, width)
    if form.is_float4:
        config["quantization_config"] = mxfp4.quantization_config()
    elif form.is_packed:
        dense = [
            name.removesuffix(".weight")
            for name, stored in _stored_tensors(base, widths, form).items()
            if name.endswith(".weight") and len(stored.shape) == 2 and not stored.packed
            and name != EMBEDDING
        ]  # fmt: skip
        if source.config.tie_embeddings:
            dense.append("lm_head")
        if form.mtp != "drop":
            # Not by exact names: vLLM asks for some of these modules under the name of several.
            prefixes = mtp_prefixes(base.family, base.hf_config)
            dense += [f"re:{re.escape(prefix)}" for prefix in prefixes]
        config["quantization_config"] = compressed_tensors.quantization_config(
            dense, form.group_size
        )
    return config


def packed_inputs(
    base: Description, widths: Widths | None = None, form: ExportFormat | None = None
) -> list[int]:
    """Input widths of the linear layers that a 4-bit export packs, each once, ascending.

    Args:
      base: the dense model.
      widths: channels kept per layer and expert, default all.
      form: the format, default the family's own.
    """
    form = form or packed_format(base.family)
    stored = _stored_tensors(base, widths or base.widths, form)
    return sorted({tensor.shape[1] for tensor in stored.values() if tensor.packed})


def check_widths(base: Description, widths: Widths, form: ExportFormat) -> None:
    """Raise ValueError unless the family has the format, it has a place for everything, every group
    of 4 bits is whole, and layers that predict further tokens are there and fit if wanted."""
    check_format(base.family, form)
    check_constants(base.config, form)
    check_mtp_width(base, widths, form)
    kept = {count for counts in widths for count in counts}
    if form.is_float4:
        mxfp4.check_widths(sorted(kept), base.config.d_model)
    elif form.is_packed:
        columns = [*packed_inputs(base, widths, form), *kept]
        compressed_tensors.check_group_size(form.group_size, columns)


def export_checkpoint(
    source: LayerSource,
    base: Checkpoint,
    widths: Widths,
    target: Path | str,
    form: ExportFormat,
    *,
    extra_files: Mapping[str, str | Path] | None = None,
    overwrite: bool = False,
    on_layer: Callable[[int], None] | None = None,
) -> Path:
    """Write a model, one layer in memory at a time; the folder is complete or absent.

    Args:
      source: the pruned model in the order of `base`'s layers; in a 4-bit format weights that are
        `QTensor` keep their codes and scales, others are rounded to nearest; MXFP4 always rounds,
        which leaves rounded weights as they are.
      base: the dense checkpoint, for names, config and tokenizer files.
      widths: channels per layer and expert of `source`, () for dense layers.
      target: folder to make.
      form: the format.
      extra_files: file name -> content, or path of a file to copy, such as a model card.
      overwrite: replace an existing folder.
      on_layer: called with the index of each finished layer.

    Returns:
      The folder.

    Raises:
      InputError: as of `check_widths`.
      FileExistsError: if the target exists.
      OSError: if the disk is too small.
    """
    check_widths(base, widths, form)
    file = ragged.MODELLING_FILE
    modelling = {} if form.is_padded else {file.name: file}
    return write_folder(
        target,
        export_specs(base, widths, form),
        _tensors(source, base, widths, form, on_layer),
        export_config(base, widths, form),
        base.folder,
        extra_files={**(extra_files or {}), **modelling},
        overwrite=overwrite,
    )


def _tensors(model: LayerSource, base: Checkpoint, widths: Widths, form: ExportFormat, on_layer):
    yield from ((name, value.astype(BFLOAT16)) for name, value in outer_tensors(model))
    source = _source(base)
    by_layer: dict[str, dict[str, _Stored]] = {}
    for name, stored in _stored_tensors(base, widths, form).items():
        by_layer.setdefault(".".join(name.split(".")[:3]), {})[name] = stored
    for index in range(len(model)):
        layer = source.layer(model.layer(index))
        parts = _layer_parts(source.family, layer, index, by_layer[f"model.layers.{index}"], form)
        if _is_fused(source.family, form):
            parts = fuse_experts(parts, base.config.moe.num_experts)
        yield from parts
        if on_layer:
            on_layer(index)
    yield from mtp_arrays(base, widths, form)


def _layer_parts(
    family: Family,
    layer: DecoderLayer,
    index: int,
    tensors: dict[str, _Stored],
    form: ExportFormat,
) -> Iterator[tuple[str, np.ndarray]]:
    """Tensors of one layer as they go to disk, experts one by one."""
    codes: dict[str, Codes] = {}
    if form.is_packed and not form.is_float4:
        layer = quantize_layer(layer, form.group_size)
        codes = dict(layer_codes(family.rules, layer, index))
    here = {n: v for n, v in layer_to_hf(family.rules, layer, index) if n not in codes}
    _require_all(here.keys() | codes.keys(), tensors.keys(), form)
    for name, stored in tensors.items():
        if not stored.packed:
            yield name, _padded(here.get(name), stored)
        elif form.is_float4:
            # Padded first: experts of one shape share a compilation.
            weight = _padded(here.get(name), dataclasses.replace(stored, dtype=FLOAT32))
            stem = name.removesuffix("weight")
            yield from ((stem + key, part) for key, part in mxfp4.pack(weight).items())
        else:
            yield from _as_coded(name, codes.get(name), stored.shape, form.group_size)


def _require_all(found: Set[str], wanted: Set[str], form: ExportFormat) -> None:
    # Only what fills an expert up may be made here, not given.
    missing = {name for name in wanted - found if form.is_ragged or not _of_expert(name)}
    if missing or found - wanted:
        raise InputError(
            f"the model is another than the one that {form.name} is to hold: it lacks "
            f"{sorted(missing)[:3]} and has {sorted(found - wanted)[:3]} beside; export it with "
            "the widths and the constants that it has"
        )


def _padded(value: np.ndarray | None, stored: _Stored) -> np.ndarray:
    """A tensor as it goes to disk; an emptied expert that is filled up is all zeros."""
    full = np.zeros(stored.shape, stored.dtype)
    if value is not None:
        full[tuple(slice(size) for size in value.shape)] = value.astype(stored.dtype)
    return full


def _as_coded(
    name: str, weight: Codes | None, shape: tuple[int, ...], group_size: int
) -> Iterator[tuple[str, np.ndarray]]:
    """A weight in 4 bits, bit for bit; padding is code 0 at the least scale."""
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
    parts = compressed_tensors.pack_codes(codes, scale)
    yield from ((name.removesuffix("weight") + key, part) for key, part in parts.items())
